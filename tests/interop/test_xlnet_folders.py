"""XLNet's tensors to lmobj's parameters and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hf_tensors import random_tensors

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import xlnet
from lmobj.models import XLNetConfig

WIDTH, HEADS, LAYERS, INNER, VOCAB = 12, 3, 2, 20, 37
SETTINGS: dict[str, Any] = {
    "model_type": "xlnet",
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "n_head": HEADS,
    "d_head": 4,
    "n_layer": LAYERS,
    "d_inner": INNER,
    "mem_len": None,
    "untie_r": True,
}
LAYER = {
    **{f"rel_attn.{name}": (WIDTH, HEADS, 4) for name in "qkvro"},
    **{f"rel_attn.r_{name}_bias": (HEADS, 4) for name in "wrs"},
    "rel_attn.seg_embed": (2, HEADS, 4),
    "rel_attn.layer_norm.weight": (WIDTH,),
    "rel_attn.layer_norm.bias": (WIDTH,),
    "ff.layer_norm.weight": (WIDTH,),
    "ff.layer_norm.bias": (WIDTH,),
    "ff.layer_1.weight": (INNER, WIDTH),
    "ff.layer_1.bias": (INNER,),
    "ff.layer_2.weight": (WIDTH, INNER),
    "ff.layer_2.bias": (WIDTH,),
}
SHAPES = {
    "transformer.word_embedding.weight": (VOCAB, WIDTH),
    "transformer.mask_emb": (1, 1, WIDTH),
    **{f"transformer.layer.{i}.{name}": shape for i in range(LAYERS) for name, shape in LAYER.items()},
    "lm_loss.bias": (VOCAB,),
}
CONFIG = xlnet.config_from_hf(SETTINGS)


def test_config() -> None:
    assert XLNetConfig(
        layers=LAYERS, width=WIDTH, heads=HEADS, mlp_width=INNER, memory_length=0, activation="gelu_exact"
    ) == (CONFIG)
    large = XLNetConfig(layers=24, width=1024, heads=16, mlp_width=4096, memory_length=512, activation="gelu_exact")
    assert xlnet.config_from_hf({}) == large
    other = dataclasses.replace(
        CONFIG, activation="gelu", direction="backward", memory_length=5, clamp_distance=9, init_std=0.1
    )
    for config in (CONFIG, other):
        assert xlnet.config_from_hf(xlnet.config_to_hf(config, Vocabulary(VOCAB))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ff_activation": "relu"}, "ff_activation is 'relu'.*'gelu'"),
        ({"attn_type": "both"}, "attn_type is 'both'.*'bi', 'uni'"),
        ({"bi_data": True}, "bi_data is True"),
        ({"same_length": True}, "same_length is True"),
        ({"untie_r": False}, "untie_r is False"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"d_head": 5}, "d_head is 5; accepted: d_model / n_head, here 12 / 3"),
        ({"d_head": "4"}, "d_head is '4'"),
        ({"mem_len": "4"}, "mem_len is '4'.*type int"),
    ],
)
def test_config_refusals(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        xlnet.config_from_hf(SETTINGS | change)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attention_dropout": 0.3}, r"attention_dropout is 0\.3;.*0\.1"),
        ({"segments": False}, "segments is False"),
        ({"query_stream": False}, "query_stream is False"),
        ({"untie_biases": False}, "untie_biases is False"),
    ],
)
def test_refuses_what_xlnet_does_not_have(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        xlnet.config_to_hf(dataclasses.replace(CONFIG, **change), Vocabulary(VOCAB))


def test_places() -> None:
    tensors = random_tensors(SHAPES)
    params = xlnet.to_lmobj(tensors, CONFIG)
    # 37 tokens are padded up to a multiple of 128.
    assert params["tokens"]["table"].shape == (128, WIDTH)
    np.testing.assert_array_equal(params["head_bias"][:VOCAB], tensors["lm_loss.bias"])
    np.testing.assert_array_equal(params["query_start"], tensors["transformer.mask_emb"][0, 0])
    attention, x, heads = params["stack"]["attention"], np.random.default_rng(1).normal(size=WIDTH), np.ones((HEADS, 4))
    for i in range(LAYERS):
        theirs = {name: tensors[f"transformer.layer.{i}.{name}"] for name in LAYER}
        # Their products, written out: x_h w_hnd into heads, y_nd w_hnd back.
        names = {"q": "query", "k": "key", "v": "value", "r": "position"}
        for letter, name in names.items():
            expected = np.einsum("h,hnd->nd", x, theirs[f"rel_attn.{letter}"])
            np.testing.assert_allclose((x @ attention[name]["kernel"][i]).reshape(HEADS, 4), expected, atol=1e-6)
        back = np.einsum("nd,hnd->h", heads * x[:4], theirs["rel_attn.o"])
        np.testing.assert_allclose((heads * x[:4]).reshape(-1) @ attention["out"]["kernel"][i], back, atol=1e-6)
        for letter, name in {"w": "content", "r": "position", "s": "segment"}.items():
            expected = theirs[f"rel_attn.r_{letter}_bias"].reshape(-1)
            np.testing.assert_array_equal(attention["biases"][name][i], expected)
        np.testing.assert_array_equal(attention["segments"][i].reshape(2, HEADS, 4), theirs["rel_attn.seg_embed"])
        np.testing.assert_array_equal(params["stack"]["mlp"]["up"]["kernel"][i], theirs["ff.layer_1.weight"].T)
        np.testing.assert_array_equal(params["stack"]["mlp_norm"]["scale"][i], theirs["ff.layer_norm.weight"])


def test_round_trip_from_lmobj() -> None:
    params = nnx.to_pure_dict(nnx.state(CONFIG.build(Vocabulary(VOCAB), nnx.Rngs(params=1))))
    back = xlnet.to_lmobj(xlnet.from_lmobj(params, CONFIG, VOCAB), CONFIG)
    params["tokens"]["table"] = params["tokens"]["table"].at[VOCAB:].set(0)  # the padding does not travel
    assert jax.tree.structure(params) == jax.tree.structure(back)
    jax.tree.map(np.testing.assert_array_equal, params, back)


def test_round_trip_from_tensors(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(SHAPES)
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    tied = {"lm_loss.weight": tensors["transformer.word_embedding.weight"].copy()}
    safetensors.numpy.save_file(tensors | tied, tmp_path / "model.safetensors")
    config, vocab, params, _ = xlnet.load(tmp_path, dropout=0.0)
    assert config == dataclasses.replace(CONFIG, dropout=0.0)
    assert vocab == Vocabulary(VOCAB, pad=5, bos=1, eos=2)  # Transformers' defaults, which a file need not repeat
    xlnet.save(tmp_path / "new", params, CONFIG, vocab)
    written = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor)


def test_tensors_that_do_not_fit() -> None:
    tensors = random_tensors(SHAPES)
    with pytest.raises(UserError, match=r"Without a place in the model: logits_proj\.weight;.*`ignore`"):
        xlnet.to_lmobj(tensors | {"logits_proj.weight": np.zeros((2, WIDTH), np.float32)}, CONFIG)
    with pytest.raises(UserError, match=r"lm_loss\.weight and transformer\.word_embedding\.weight differ"):
        xlnet.to_lmobj(tensors | {"lm_loss.weight": np.zeros((VOCAB, WIDTH), np.float32)}, CONFIG)
    name = "transformer.layer.1.rel_attn.o"
    with pytest.raises(UserError, match=rf"{name} has the shape \[12, 2, 6\]; .* \[12, 3, 4\]"):
        xlnet.to_lmobj(tensors | {name: tensors[name].reshape(WIDTH, 2, 6)}, CONFIG)
    del tensors["transformer.mask_emb"]
    with pytest.raises(UserError, match=r"Missing: transformer\.mask_emb"):
        xlnet.to_lmobj(tensors, CONFIG)
