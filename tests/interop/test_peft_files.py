"""Adapters in PEFT's files without PEFT: names and shapes, round trips, and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lmobj import adapt
from lmobj.adapt._adapted import AdaptedLinear
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import peft
from lmobj.models import DecoderConfig, EncoderConfig, EncoderDecoderConfig
from tests.styles import BART

SIZE: dict[str, Any] = {"layers": 2, "width": 4, "heads": 2, "mlp_width": 6, "max_length": 8, "vocab_multiple": 1}
CONFIGS = {
    "gpt2": DecoderConfig(**SIZE),
    "bert": EncoderConfig(**SIZE),
    "albert": EncoderConfig(**SIZE, share_layers=True, embedding_width=2),
    "t5": EncoderDecoderConfig(**SIZE, decoder_layers=1, head_width=3),
    "bart": EncoderDecoderConfig(
        **SIZE,
        **BART,
    ),
}


def base_model(family: str) -> Any:
    """A model with random weights."""
    model = nnx.eval_shape(lambda: CONFIGS[family].build(Vocabulary(9), nnx.Rngs(params=0)))
    return randomised(model, lambda _: True)


def randomised(model: Any, chosen: Any) -> Any:
    generator = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        if chosen(variable):
            variable.set_value(jnp.asarray(generator.normal(size=variable.shape), jnp.float32))
    return model


def adapted_model(family: str, adapter: Any) -> Any:
    """A model whose adapters have random values."""
    model = adapt.apply(base_model(family), adapter, nnx.Rngs(params=0))
    return randomised(model, lambda variable: variable.get_metadata()["trainable"])


def kernels(model: Any) -> dict[str, np.ndarray]:
    """What the model computes with, adapters folded in."""
    return {"/".join(map(str, p)): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(adapt.merge(model)))}


@pytest.mark.parametrize(
    ("family", "adapter"),
    [
        ("bert", adapt.LoRA(rank=2, targets=("query", "down", "head/dense"))),
        ("bert", adapt.IA3()),
        ("albert", adapt.DoRA(rank=2)),
        ("gpt2", adapt.LoRA(rank=2, scaling="root_rank", targets=("query", "value", "up"))),
        ("gpt2", adapt.DoRA(rank=2, targets=("key",))),
        ("gpt2", adapt.AdaLoRA(initial_rank=2, target_rank=1, targets=("query", "key", "down"))),
        ("gpt2", adapt.IA3(targets=("value", "down"))),
        ("t5", adapt.LoRA(rank=2, targets=("query", "cross_attention/out", "gate"))),
        ("t5", adapt.IA3()),
        ("bart", adapt.DoRA(rank=2)),
    ],
)
def test_round_trip(tmp_path: pathlib.Path, family: str, adapter: Any) -> None:
    """The same function, to rounding; and where nothing is fused the very same adapters and settings."""
    model = adapted_model(family, adapter)
    peft.save(tmp_path, model, adapter, family)  # type: ignore[arg-type]
    again, settings = peft.load(tmp_path, base_model(family), family)  # type: ignore[arg-type]
    before, after = kernels(model), kernels(again)
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_allclose(after[path], before[path], rtol=2e-5, atol=2e-5, err_msg=path)
    if family != "gpt2":
        for path, variable in nnx.to_flat_state(nnx.state(again)):
            ours = dict(nnx.to_flat_state(nnx.state(model)))[path]
            np.testing.assert_array_equal(variable[...], ours[...])
        assert type(settings) is type(adapter)
        adapted = [path for path, module in nnx.iter_modules(model) if isinstance(module, AdaptedLinear)]
        assert sorted(settings.targets) == sorted("/".join(map(str, path)) for path in adapted)


def test_layout(tmp_path: pathlib.Path) -> None:
    """PEFT's names and shapes; of GPT-2's fused map the parts that are adapted, in the order of its columns."""
    adapter = adapt.LoRA(rank=3, alpha=6.0, targets=("query", "value", "down"))
    model = adapted_model("gpt2", adapter)
    peft.save(tmp_path, model, adapter, "gpt2")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["peft_type"], settings["r"], settings["lora_alpha"]) == ("LORA", 6, 12.0)  # the scale stays 2
    assert settings["fan_in_fan_out"] is True
    modules = [f"transformer.h.{i}.{name}" for name in ("attn.c_attn", "mlp.c_proj") for i in range(2)]
    assert sorted(settings["target_modules"]) == sorted(modules)
    tensors = safetensors.numpy.load_file(tmp_path / "adapter_model.safetensors")
    names = {f"base_model.model.{module}.lora_{x}.weight" for module in modules for x in "AB"}
    assert set(tensors) == names
    a, b = (tensors[f"base_model.model.transformer.h.1.attn.c_attn.lora_{x}.weight"] for x in "AB")
    assert (a.shape, b.shape) == ((6, 4), (12, 6))
    attention = model.stack.blocks.attention
    np.testing.assert_array_equal(a[:3].T, attention.query.lora_a[1])
    np.testing.assert_array_equal(a[3:].T, attention.value.lora_a[1])
    np.testing.assert_array_equal(b[:4, :3].T, attention.query.lora_b[1])
    np.testing.assert_array_equal(b[8:, 3:].T, attention.value.lora_b[1])
    rest = b.copy()
    rest[:4, :3] = rest[8:, 3:] = 0
    assert not rest.any()


@pytest.mark.parametrize(
    ("family", "adapter", "message"),
    [
        ("bert", adapt.Pfeiffer(), "adapter.name is pfeiffer; accepted in PEFT's files"),
        ("bert", adapt.LoRA(targets=("query",)), "family is 'xlnet'; accepted: albert, bart, bert, gpt2, roberta, t5"),
        ("t5", adapt.LoRA(), "family is 'bert' and the model is of the family encoder_decoder; accepted: bart, t5"),
        ("gpt2", adapt.IA3(targets=("query", "down"), inputs=("query",)), "which has one input"),
    ],
)
def test_what_cannot_be_written(tmp_path: pathlib.Path, family: str, adapter: Any, message: str) -> None:
    model = adapted_model(family, adapter)
    told = next((name for name in ("xlnet", "bert") if f"family is '{name}'" in message), family)
    with pytest.raises(UserError, match=message):
        peft.save(tmp_path, model, adapter, told)  # type: ignore[arg-type]


def test_what_cannot_be_read(tmp_path: pathlib.Path) -> None:
    adapter = adapt.LoRA(rank=2)
    peft.save(tmp_path / "good", adapted_model("bert", adapter), adapter, "bert")
    settings = json.loads((tmp_path / "good/adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "good/adapter_model.safetensors")

    def refused(message: str, *, drop: str = "", rename: str = "", **changed: Any) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(settings | changed))
        kept = {
            name.replace("query", rename or "query"): x for name, x in tensors.items() if not drop or drop not in name
        }
        safetensors.numpy.save_file(kept, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            peft.load(folder, base_model("bert"), "bert")

    refused("peft_type is 'LOHA'; accepted: 'LORA', 'ADALORA', 'IA3'", peft_type="LOHA")
    refused(r"modules_to_save is \['cls'\]; accepted: none", modules_to_save=["cls"])
    refused("bias is 'all'", bias="all")
    refused("lora_a of stack/blocks/attention/query has the shape", r=3)
    refused("differ from layer to layer", drop="layer.1.attention.self.query")
    refused("self.queries.lora_A.weight.* has a place in the family bert", rename="queries")
    with pytest.raises(UserError, match=r"adapter_config\.json exists"):
        peft.save(tmp_path / "good", adapted_model("bert", adapter), adapter, "bert")
    with pytest.raises(UserError, match=r"adapter_config\.json does not exist"):
        peft.load(tmp_path, base_model("bert"), "bert")
