"""GPT-2's tensors to the decoder's parameters and back."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hf_tensors import GPT2_SETTINGS, HEADS, INNER, LAYERS, LENGTH, VOCAB, WIDTH, random_tensors

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import gpt2
from lmobj.models import DecoderConfig, MoEConfig

CONFIG = gpt2.config_from_hf(GPT2_SETTINGS)
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)


def write_folder(
    folder: pathlib.Path, tensors: dict[str, np.ndarray], settings: dict[str, object] | None = None
) -> pathlib.Path:
    (folder / "config.json").write_text(json.dumps(GPT2_SETTINGS | (settings or {})))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def test_config() -> None:
    assert gpt2.config_from_hf(GPT2_SETTINGS) == DecoderConfig(
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        mlp_width=INNER,
        max_length=LENGTH,
        dropout=0.25,
        attention_dropout=0.1,
        embedding_dropout=0.1,
    )
    # What GPT2Config says of itself: 12 layers, 768 wide, 12 heads, 1024 positions, dropout 0.1 everywhere, gelu_new.
    assert gpt2.config_from_hf({}) == DecoderConfig(dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1)
    for config in (CONFIG, UNTIED, dataclasses.replace(CONFIG, activation="gelu_exact", mlp_width=None)):
        assert gpt2.config_from_hf(gpt2.config_to_hf(config, Vocabulary(VOCAB))) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'.*'gelu_new'"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"n_embd": "12"}, "n_embd is '12'.*type int"),
        ({"n_layer": True}, "n_layer is True.*type int"),
        ({"n_head": 5}, "model.heads is 5"),
    ],
)
def test_config_refusals(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=named):
        gpt2.config_from_hf(GPT2_SETTINGS | change)


@pytest.mark.parametrize(
    "change",
    [
        {"positions": "rotary"},
        {"moe": MoEConfig()},
        {"norm": "rmsnorm"},
        {"activation": "swiglu"},
        {"bias": False},
        {"kv_heads": 1},
        {"pre_norm": False},
        {"window": 4},
        {"soft_cap": 30.0},
        {"attention_soft_cap": 50.0},
    ],
)
def test_refuses_what_gpt2_does_not_have(change: dict[str, object]) -> None:
    config = dataclasses.replace(CONFIG, **change)
    (key,) = change
    with pytest.raises(UserError, match=f"model.{key} is"):
        gpt2.config_to_hf(config, Vocabulary(VOCAB))
    with pytest.raises(UserError, match=f"model.{key} is"):
        gpt2.from_lmobj({}, config, VOCAB)


def test_places(gpt2_tensors: dict[str, np.ndarray]) -> None:
    params = gpt2.to_lmobj(gpt2_tensors, CONFIG)
    # 37 tokens are padded up to a multiple of 128.
    assert params["tokens"]["table"].shape == (128, WIDTH)
    np.testing.assert_array_equal(params["tokens"]["table"][:VOCAB], gpt2_tensors["transformer.wte.weight"])
    assert not params["tokens"]["table"][VOCAB:].any()
    block = params["stack"]["blocks"]
    for i in range(LAYERS):
        fused = gpt2_tensors[f"transformer.h.{i}.attn.c_attn.weight"]
        bias = gpt2_tensors[f"transformer.h.{i}.attn.c_attn.bias"]
        for part, name in enumerate(("query", "key", "value")):
            here = slice(part * WIDTH, (part + 1) * WIDTH)
            np.testing.assert_array_equal(block["attention"][name]["kernel"][i], fused[:, here])
            np.testing.assert_array_equal(block["attention"][name]["bias"][i], bias[here])
        for theirs, ours in {
            "ln_1.weight": block["attention_norm"]["scale"],
            "ln_2.bias": block["mlp_norm"]["bias"],
            "attn.c_proj.weight": block["attention"]["out"]["kernel"],
            "mlp.c_fc.weight": block["mlp"]["up"]["kernel"],
            "mlp.c_proj.weight": block["mlp"]["down"]["kernel"],
        }.items():
            np.testing.assert_array_equal(ours[i], gpt2_tensors[f"transformer.h.{i}.{theirs}"])


@pytest.mark.parametrize("config", [CONFIG, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_from_lmobj(config: DecoderConfig, dtype: str) -> None:
    config = dataclasses.replace(config, param_dtype=dtype)
    params = nnx.to_pure_dict(nnx.state(config.build(Vocabulary(VOCAB), nnx.Rngs(params=1))))
    tensors = gpt2.from_lmobj(params, config, VOCAB)
    back = gpt2.to_lmobj(tensors, config)
    for table in ("tokens", "head"):
        if table in params:
            params[table]["table"] = params[table]["table"].at[VOCAB:].set(0)  # the padding does not travel
    assert jax.tree.structure(params) == jax.tree.structure(back)
    jax.tree.map(np.testing.assert_array_equal, params, back)
    assert {x.dtype for x in jax.tree.leaves(back)} == {jnp.dtype(dtype)}
    assert ("lm_head.weight" in tensors) is not config.tie_embeddings


def test_round_trip_from_tensors(gpt2_tensors: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
    vocab = Vocabulary(VOCAB, bos=3, eos=4)
    gpt2.save(tmp_path / "new", gpt2.to_lmobj(gpt2_tensors, CONFIG), CONFIG, vocab)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["config.json", "model.safetensors"]
    settings = json.loads((tmp_path / "new" / "config.json").read_text())
    assert settings["pad_token_id"] is None  # or else generation there would not see token 0
    written = safetensors.numpy.load_file(tmp_path / "new" / "model.safetensors")
    assert written.keys() == gpt2_tensors.keys()
    for name, tensor in gpt2_tensors.items():
        np.testing.assert_array_equal(written[name], tensor)
    checkpoint = gpt2.load(tmp_path / "new")
    assert checkpoint.config == CONFIG
    assert checkpoint.vocab == vocab


def test_the_model_takes_them(gpt2_tensors: dict[str, np.ndarray], tmp_path: pathlib.Path) -> None:
    checkpoint = gpt2.load(write_folder(tmp_path, gpt2_tensors), vocab_multiple=1, dropout=0.5)
    assert checkpoint.config == dataclasses.replace(CONFIG, vocab_multiple=1, dropout=0.5)
    graph = nnx.split(nnx.eval_shape(lambda: checkpoint.config.build(checkpoint.vocab, nnx.Rngs(params=0))))[0]
    model = nnx.merge(graph, checkpoint.params)
    hidden = model.hidden(jnp.asarray([[1, 2, 3]]), mask=masks.causal())
    assert hidden.shape == (1, 3, WIDTH)
    assert model.head_table().table.shape == (VOCAB, WIDTH)


def test_older_names(gpt2_tensors: dict[str, np.ndarray]) -> None:
    # The original release has no prefix, and its files hold the causal masks too; some hold the tied output table.
    older = {name.removeprefix("transformer."): tensor for name, tensor in gpt2_tensors.items()}
    for i in range(LAYERS):
        older[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, LENGTH, LENGTH), np.float32))
        older[f"h.{i}.attn.masked_bias"] = np.float32(-1e4)
    older["lm_head.weight"] = older["wte.weight"].copy()
    jax.tree.map(np.testing.assert_array_equal, gpt2.to_lmobj(older, CONFIG), gpt2.to_lmobj(gpt2_tensors, CONFIG))
    older["lm_head.weight"][3, 4] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight and transformer\.wte\.weight differ"):
        gpt2.to_lmobj(older, CONFIG)
    np.testing.assert_array_equal(gpt2.to_lmobj(older, UNTIED)["head"]["table"][:VOCAB], older["lm_head.weight"])


def test_names_that_do_not_fit(gpt2_tensors: dict[str, np.ndarray]) -> None:
    more = gpt2_tensors | random_tensors({"score.weight": (2, WIDTH), "transformer.h.0.extra": (1,)})
    with pytest.raises(UserError, match=r"transformer\.h\.0\.extra, transformer\.score\.weight; .*`ignore`"):
        gpt2.to_lmobj(more, CONFIG)
    with pytest.raises(UserError, match=r"model: transformer\.score\.weight; "):
        gpt2.to_lmobj(more, CONFIG, ignore=["h.0.extra"])
    jax.tree.map(
        np.testing.assert_array_equal,
        gpt2.to_lmobj(more, CONFIG, ignore=["h.0.extra", "score."]),
        gpt2.to_lmobj(gpt2_tensors, CONFIG),
    )
    fewer = {n: x for n, x in gpt2_tensors.items() if n not in ("transformer.wte.weight", "transformer.h.1.ln_2.bias")}
    with pytest.raises(UserError, match=r"Missing: transformer\.wte\.weight, transformer\.h\.1\.ln_2\.bias\.$"):
        gpt2.to_lmobj(fewer, CONFIG)
    with pytest.raises(UserError, match=r"Missing: lm_head\.weight\.$"):
        gpt2.to_lmobj(gpt2_tensors, UNTIED)
    with pytest.raises(UserError, match="and 4 more"):  # two more layers are 24 names, 20 of them shown
        gpt2.to_lmobj(gpt2_tensors, dataclasses.replace(CONFIG, layers=4))
    with pytest.raises(UserError, match="twice"):
        gpt2.to_lmobj(gpt2_tensors | random_tensors({"wte.weight": (VOCAB, WIDTH)}), CONFIG)


def test_tensors_that_do_not_fit(gpt2_tensors: dict[str, np.ndarray]) -> None:
    name = "transformer.h.1.attn.c_attn.weight"
    with pytest.raises(UserError, match=rf"{name} has the shape \[36, 12\]; .* \[12, 36\]"):
        gpt2.to_lmobj(gpt2_tensors | {name: gpt2_tensors[name].T}, CONFIG)
    with pytest.raises(UserError, match=rf"{name} has the dtype int8"):
        gpt2.to_lmobj(gpt2_tensors | {name: gpt2_tensors[name].astype(np.int8)}, CONFIG)
    with pytest.raises(UserError, match=r"wte\.weight has the shape \[37, 12\]; .* \[38, 12\]"):
        gpt2.to_lmobj(gpt2_tensors, CONFIG, vocab_size=38)


def test_parameters_that_do_not_fit(gpt2_tensors: dict[str, np.ndarray]) -> None:
    params = gpt2.to_lmobj(gpt2_tensors, CONFIG)
    with pytest.raises(UserError, match="missing are none; unknown are extra/kernel"):
        gpt2.from_lmobj(params | {"extra": {"kernel": np.zeros(3)}}, CONFIG, VOCAB)
    with pytest.raises(UserError, match="missing are norm/bias, norm/scale; unknown are none"):
        gpt2.from_lmobj({key: value for key, value in params.items() if key != "norm"}, CONFIG, VOCAB)
    with pytest.raises(UserError, match=r"tokens/table has the shape \[128, 12\]; the model's has \[256, 12\]"):
        gpt2.from_lmobj(params, CONFIG, 129)
