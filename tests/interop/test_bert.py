"""BERT's tensors to the encoder's parameters and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hf_tensors import BERT_SETTINGS, HEADS, INNER, LAYERS, LENGTH, POOLER_SHAPES, VOCAB, WIDTH, random_tensors

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import bert
from lmobj.models import EncoderConfig

CONFIG = bert.config_from_hf(BERT_SETTINGS)
POOLED = dataclasses.replace(CONFIG, pooler=True)


def test_config() -> None:
    assert bert.config_from_hf(BERT_SETTINGS) == EncoderConfig(
        layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=INNER, max_length=LENGTH, token_types=3
    )
    # What BertConfig says of itself is what EncoderConfig's defaults are, except that the inner width is written out.
    assert bert.config_from_hf({}) == EncoderConfig(mlp_width=3072)
    for config in (CONFIG, dataclasses.replace(CONFIG, activation="gelu", dropout=0.2, embedding_dropout=0.2)):
        assert bert.config_from_hf(bert.config_to_hf(config, Vocabulary(VOCAB))) == config
    assert bert.config_from_hf(BERT_SETTINGS, pooler=True) == POOLED


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'.*'gelu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'.*'absolute'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps is '1e-12'.*type float"),
    ],
)
def test_config_refusals(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        bert.config_from_hf(BERT_SETTINGS | change)


def test_refuses_what_bert_does_not_have() -> None:
    with pytest.raises(UserError, match=r"embedding_dropout is 0\.3;.*0\.1"):
        bert.config_to_hf(dataclasses.replace(CONFIG, embedding_dropout=0.3), Vocabulary(VOCAB))


def test_places(bert_tensors: dict[str, np.ndarray]) -> None:
    params = bert.to_lmobj(bert_tensors, CONFIG)
    # 37 tokens are padded up to a multiple of 128.
    assert params["tokens"]["table"].shape == (128, WIDTH)
    assert params["head_bias"].shape == (128,)
    np.testing.assert_array_equal(params["head_bias"][:VOCAB], bert_tensors["cls.predictions.bias"])
    assert not params["head_bias"][VOCAB:].any()
    np.testing.assert_array_equal(
        params["head_dense"]["kernel"], bert_tensors["cls.predictions.transform.dense.weight"].T
    )
    block = params["stack"]["blocks"]
    for i in range(LAYERS):
        for theirs, ours in {
            "attention.self.query": block["attention"]["query"],
            "attention.self.key": block["attention"]["key"],
            "attention.self.value": block["attention"]["value"],
            "attention.output.dense": block["attention"]["out"],
            "intermediate.dense": block["mlp"]["up"],
            "output.dense": block["mlp"]["down"],
        }.items():
            prefix = f"bert.encoder.layer.{i}.{theirs}"
            np.testing.assert_array_equal(ours["kernel"][i], bert_tensors[f"{prefix}.weight"].T)
            np.testing.assert_array_equal(ours["bias"][i], bert_tensors[f"{prefix}.bias"])
        for theirs, ours in {
            "attention.output.LayerNorm": block["attention_norm"],
            "output.LayerNorm": block["mlp_norm"],
        }.items():
            prefix = f"bert.encoder.layer.{i}.{theirs}"
            np.testing.assert_array_equal(ours["scale"][i], bert_tensors[f"{prefix}.weight"])
            np.testing.assert_array_equal(ours["bias"][i], bert_tensors[f"{prefix}.bias"])


@pytest.mark.parametrize("config", [CONFIG, POOLED], ids=["plain", "pooled"])
def test_round_trip_from_lmobj(config: EncoderConfig) -> None:
    params = nnx.to_pure_dict(nnx.state(config.build(Vocabulary(VOCAB), nnx.Rngs(params=1))))
    back = bert.to_lmobj(bert.from_lmobj(params, config, VOCAB), config)
    params["tokens"]["table"] = params["tokens"]["table"].at[VOCAB:].set(0)  # the padding does not travel
    assert jax.tree.structure(params) == jax.tree.structure(back)
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize("pooled", [False, True])
def test_round_trip_from_tensors(bert_tensors: dict[str, np.ndarray], tmp_path: pathlib.Path, pooled: bool) -> None:
    if pooled:
        bert_tensors |= random_tensors(POOLER_SHAPES)
    (tmp_path / "config.json").write_text(json.dumps(BERT_SETTINGS))
    safetensors.numpy.save_file(bert_tensors, tmp_path / "model.safetensors")
    config, vocab, params = bert.load(tmp_path)
    assert config == (POOLED if pooled else CONFIG)
    assert vocab == Vocabulary(VOCAB, pad=0)
    bert.save(tmp_path / "new", params, config, vocab)
    written = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == bert_tensors.keys()
    for name, tensor in bert_tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    if pooled:
        assert bert.load(tmp_path, ignore=["bert.pooler"]).config == CONFIG


def test_older_names(bert_tensors: dict[str, np.ndarray]) -> None:
    # The original release says gamma and beta, and keeps the tied head, position ids and next-sentence classifier.
    older = {}
    for name, tensor in bert_tensors.items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace("Norm.bias", "Norm.beta")
        older[name] = tensor
    older["cls.predictions.decoder.weight"] = older["bert.embeddings.word_embeddings.weight"].copy()
    older["cls.predictions.decoder.bias"] = older["cls.predictions.bias"].copy()
    older["bert.embeddings.position_ids"] = np.arange(LENGTH)[None]
    older |= random_tensors({"cls.seq_relationship.weight": (2, WIDTH), "cls.seq_relationship.bias": (2,)})
    with pytest.raises(UserError, match=r"cls\.seq_relationship\.bias, cls\.seq_relationship\.weight; .*`ignore`"):
        bert.to_lmobj(older, CONFIG)
    jax.tree.map(
        np.testing.assert_array_equal,
        bert.to_lmobj(older, CONFIG, ignore=["cls.seq_relationship"]),
        bert.to_lmobj(bert_tensors, CONFIG),
    )
    older["cls.predictions.decoder.bias"][1] += 1
    with pytest.raises(UserError, match=r"cls\.predictions\.decoder\.bias and cls\.predictions\.bias differ"):
        bert.to_lmobj(older, CONFIG, ignore=["cls.seq_relationship"])


def test_names_that_do_not_fit(bert_tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"model: bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight; "):
        bert.to_lmobj(bert_tensors | random_tensors(POOLER_SHAPES), CONFIG)
    with pytest.raises(UserError, match=r"Missing: bert\.pooler\.dense\.weight, bert\.pooler\.dense\.bias\.$"):
        bert.to_lmobj(bert_tensors, POOLED)
    name = "bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(UserError, match=rf"{name} has the shape \[20, 12\]; .* \[12, 20\]"):
        bert.to_lmobj(bert_tensors | {name: bert_tensors[name].T}, CONFIG)
