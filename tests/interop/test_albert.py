"""ALBERT's tensors to the encoder's parameters and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hf_tensors import (
    ALBERT_PAIR_SHAPES,
    ALBERT_SETTINGS,
    ALBERT_SHAPES,
    HEADS,
    INNER,
    LAYERS,
    LENGTH,
    NARROW,
    VOCAB,
    WIDTH,
    random_tensors,
)

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import albert
from lmobj.models import EncoderConfig

CONFIG = albert.config_from_hf(ALBERT_SETTINGS)


def test_config() -> None:
    no_dropout = {"dropout": 0.0, "attention_dropout": 0.0, "embedding_dropout": 0.0}
    assert (
        EncoderConfig(
            layers=LAYERS,
            width=WIDTH,
            heads=HEADS,
            mlp_width=INNER,
            max_length=LENGTH,
            token_types=3,
            embedding_width=NARROW,
            share_layers=True,
            activation="gelu",
            **no_dropout,
        )
        == CONFIG
    )
    # What AlbertConfig says of itself is the largest of the released models, xxlarge.
    assert albert.config_from_hf({}) == EncoderConfig(
        width=4096, heads=64, mlp_width=16384, embedding_width=128, share_layers=True, activation="gelu", **no_dropout
    )
    assert albert.config_from_hf(albert.config_to_hf(CONFIG, Vocabulary(VOCAB))) == CONFIG


def test_refusals() -> None:
    with pytest.raises(UserError, match="num_hidden_groups is 2; accepted: 1"):
        albert.config_from_hf(ALBERT_SETTINGS | {"num_hidden_groups": 2})
    with pytest.raises(UserError, match="inner_group_num is 3; accepted: 1"):
        albert.config_from_hf(ALBERT_SETTINGS | {"inner_group_num": 3})
    with pytest.raises(UserError, match="share_layers is False; in albert the only one accepted is True"):
        albert.config_to_hf(dataclasses.replace(CONFIG, share_layers=False), Vocabulary(VOCAB))
    for width in (None, WIDTH):
        with pytest.raises(UserError, match=f"embedding_width is {width}; in albert the embedding is projected"):
            albert.config_to_hf(dataclasses.replace(CONFIG, embedding_width=width), Vocabulary(VOCAB))


@pytest.mark.parametrize("paired", [False, True])
def test_round_trip(tmp_path: pathlib.Path, paired: bool) -> None:
    tensors = random_tensors(ALBERT_SHAPES | (ALBERT_PAIR_SHAPES if paired else {}))
    (tmp_path / "config.json").write_text(json.dumps(ALBERT_SETTINGS))
    # Older files keep the tied head too.
    copies = {"predictions.decoder.weight": tensors["albert.embeddings.word_embeddings.weight"].copy()}
    safetensors.numpy.save_file(tensors | copies, tmp_path / "model.safetensors")
    config, vocab, params, pair_head = albert.load(tmp_path)
    assert config == CONFIG
    block = params["stack"]["blocks"]
    assert block["mlp"]["up"]["kernel"].shape == (1, WIDTH, INNER)
    layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    np.testing.assert_array_equal(block["mlp_norm"]["scale"][0], tensors[f"{layer}.full_layer_layer_norm.weight"])
    np.testing.assert_array_equal(block["attention_norm"]["scale"][0], tensors[f"{layer}.attention.LayerNorm.weight"])
    shapes = nnx.eval_shape(lambda: config.build(vocab, nnx.Rngs(params=0)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, nnx.to_pure_dict(nnx.state(shapes)))
    albert.save(tmp_path / "new", params, config, vocab, pair_head=pair_head)
    written = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
