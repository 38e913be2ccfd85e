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
from hf_tensors import (
    BERT_SETTINGS,
    HEADS,
    INNER,
    LAYERS,
    LENGTH,
    PAIR_SHAPES,
    POOLER_SHAPES,
    VOCAB,
    WIDTH,
    random_tensors,
)

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import bert
from lmobj.models import EncoderConfig, PairHead

CONFIG = bert.config_from_hf(BERT_SETTINGS)


def test_config() -> None:
    assert bert.config_from_hf(BERT_SETTINGS) == EncoderConfig(
        layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=INNER, max_length=LENGTH, token_types=3
    )
    # What BertConfig says of itself is what EncoderConfig's defaults are, except that the inner width is written out.
    assert bert.config_from_hf({}) == EncoderConfig(mlp_width=3072)
    for config in (CONFIG, dataclasses.replace(CONFIG, activation="gelu", dropout=0.2, embedding_dropout=0.2)):
        assert bert.config_from_hf(bert.config_to_hf(config, Vocabulary(VOCAB))) == config


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
    for change, named in {
        "embedding_dropout": (0.3, r"embedding_dropout is 0\.3;.*0\.1"),
        "share_layers": (True, "share_layers is True; in bert the only one accepted is False"),
        "embedding_width": (4, "embedding_width is 4; in bert"),
        "pre_norm": (True, "pre_norm is True"),
    }.items():
        with pytest.raises(UserError, match=named[1]):
            bert.config_to_hf(dataclasses.replace(CONFIG, **{change: named[0]}), Vocabulary(VOCAB))


def test_places(bert_tensors: dict[str, np.ndarray]) -> None:
    params = bert.to_lmobj(bert_tensors, CONFIG)
    # 37 tokens are padded up to a multiple of 128.
    assert params["embeddings"]["tokens"]["table"].shape == (128, WIDTH)
    assert params["head"]["bias"].shape == (128,)
    np.testing.assert_array_equal(params["head"]["bias"][:VOCAB], bert_tensors["cls.predictions.bias"])
    assert not params["head"]["bias"][VOCAB:].any()
    np.testing.assert_array_equal(
        params["head"]["dense"]["kernel"], bert_tensors["cls.predictions.transform.dense.weight"].T
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


def test_round_trip_from_lmobj() -> None:
    params = nnx.to_pure_dict(nnx.state(CONFIG.build(Vocabulary(VOCAB), nnx.Rngs(params=1))))
    back = bert.to_lmobj(bert.from_lmobj(params, CONFIG, VOCAB), CONFIG)
    tokens = params["embeddings"]["tokens"]
    tokens["table"] = tokens["table"].at[VOCAB:].set(0)  # the padding does not travel
    assert jax.tree.structure(params) == jax.tree.structure(back)
    jax.tree.map(np.testing.assert_array_equal, params, back)


@pytest.mark.parametrize("paired", [False, True])
def test_round_trip_from_tensors(bert_tensors: dict[str, np.ndarray], tmp_path: pathlib.Path, paired: bool) -> None:
    if paired:
        bert_tensors |= random_tensors(POOLER_SHAPES | PAIR_SHAPES)
    (tmp_path / "config.json").write_text(json.dumps(BERT_SETTINGS))
    safetensors.numpy.save_file(bert_tensors, tmp_path / "model.safetensors")
    config, vocab, params, pair_head = bert.load(tmp_path)
    assert config == CONFIG
    assert vocab == Vocabulary(VOCAB, pad=0)
    assert (pair_head is not None) is paired
    bert.save(tmp_path / "new", params, config, vocab, pair_head=pair_head)
    architecture = "BertForPreTraining" if paired else "BertForMaskedLM"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["architectures"] == [architecture]
    written = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == bert_tensors.keys()
    for name, tensor in bert_tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    if pair_head is not None:
        np.testing.assert_array_equal(pair_head["pooler"]["kernel"], bert_tensors["bert.pooler.dense.weight"].T)
        np.testing.assert_array_equal(pair_head["classifier"]["bias"], bert_tensors["cls.seq_relationship.bias"])
        head = nnx.eval_shape(lambda: PairHead(config.head_style, 2, nnx.Rngs(params=0)))
        assert jax.tree.map(np.shape, pair_head) == jax.tree.map(np.shape, nnx.to_pure_dict(nnx.state(head)))
        assert bert.load(tmp_path, ignore=["bert.pooler", "cls.seq_"]).pair_head is None
        with pytest.raises(UserError, match=r"has cls\.seq_relationship\.weight.* lacks bert\.pooler.*`ignore`"):
            bert.load(tmp_path, ignore=["bert.pooler"])


def test_older_names(bert_tensors: dict[str, np.ndarray]) -> None:
    # The original release says gamma and beta, and keeps the tied head and position ids.
    older = {}
    for name, tensor in bert_tensors.items():
        if "LayerNorm" in name:
            name = name.replace(".weight", ".gamma").replace("Norm.bias", "Norm.beta")
        older[name] = tensor
    older["cls.predictions.decoder.weight"] = older["bert.embeddings.word_embeddings.weight"].copy()
    older["cls.predictions.decoder.bias"] = older["cls.predictions.bias"].copy()
    older["bert.embeddings.position_ids"] = np.arange(LENGTH)[None]
    jax.tree.map(np.testing.assert_array_equal, bert.to_lmobj(older, CONFIG), bert.to_lmobj(bert_tensors, CONFIG))
    older["cls.predictions.decoder.bias"][1] += 1
    with pytest.raises(UserError, match=r"cls\.predictions\.decoder\.bias and cls\.predictions\.bias differ"):
        bert.to_lmobj(older, CONFIG)


def test_names_that_do_not_fit(bert_tensors: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"model: classifier\.bias, classifier\.weight; .*`ignore`"):
        bert.to_lmobj(bert_tensors | random_tensors({"classifier.weight": (2, 3), "classifier.bias": (2,)}), CONFIG)
    with pytest.raises(UserError, match=r"Missing: cls\.predictions\.bias\.$"):
        bert.to_lmobj({n: x for n, x in bert_tensors.items() if n != "cls.predictions.bias"}, CONFIG)
    name = "bert.encoder.layer.0.output.dense.weight"
    with pytest.raises(UserError, match=rf"{name} has the shape \[20, 12\]; .* \[12, 20\]"):
        bert.to_lmobj(bert_tensors | {name: bert_tensors[name].T}, CONFIG)
