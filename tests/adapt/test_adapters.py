"""What every method keeps: a fresh adapter's function, what is trained, parts and their union, merging, refusals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest
from flax import nnx
from tiny_models import (
    CONFIGS,
    METHODS,
    SEEDS,
    VOCAB,
    equations,
    hidden,
    mask_of,
    model_of,
    moved,
    parted,
    paths,
    tokens,
)

from lmobj import adapt, partition
from lmobj.errors import UserError

UNMERGEABLE = {"houlsby", "pfeiffer", "prefix", "prompt"}
CHANGED = {"prefix", "prompt"}
"""Methods that no initial value makes the identity."""
OTHERS = {
    "llama": ["lora", "ia3", "prefix", "prompt"],
    "encoder": ["dora", "houlsby", "prefix", "prompt", "bitfit", "freeze"],
    "albert": ["lora", "prefix"],
    "electra": ["lora", "prompt", "freeze"],
    "xlnet": ["dora", "ia3", "pfeiffer", "bitfit"],
    "t5": ["lora", "dora", "adalora", "ia3", "houlsby", "pfeiffer", "prefix", "prompt", "freeze"],
    "bart": ["lora", "houlsby", "prefix", "prompt", "bitfit", "freeze"],
}
"""What is new in a family, of all that it has a place for."""


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("method", METHODS)
def test_a_decoder(method: str) -> None:
    check_function("decoder", method)


@pytest.mark.parametrize(
    ("family", "method"),
    [(family, method) for family, methods in OTHERS.items() for method in methods],
)
@pytest.mark.slow
def test_other_families(family: str, method: str) -> None:
    check_function(family, method)


def check_function(family: str, method: str) -> None:
    """A fresh adapter computes what the model does, with dropout too; a trained one what it is merged to."""
    base = model_of(family)
    before = hidden(base, dropout=SEEDS)
    model = adapt.apply(base, METHODS[method], nnx.Rngs(params=0))
    fresh = hidden(model, dropout=SEEDS)
    if method in CHANGED:
        assert np.max(np.abs(fresh - before)) > 1e-3
    else:
        np.testing.assert_allclose(fresh, before, rtol=0, atol=1e-13)
    trained = moved(model)
    after = hidden(trained, dropout=SEEDS)
    assert np.max(np.abs(after - fresh)) > 1e-3
    if method in UNMERGEABLE:
        with pytest.raises(UserError, match=r"adapter\.name is .*; accepted: the adapted model"):
            adapt.merge(trained)
        return
    merged = adapt.merge(trained)
    assert nnx.graphdef(merged) == nnx.graphdef(base)
    np.testing.assert_allclose(hidden(merged, dropout=SEEDS), after, rtol=0, atol=1e-12)


BLOCK = "stack/blocks/"
TRAINED = {
    "lora": [f"{BLOCK}attention/{name}/lora_{x}" for name in ("query", "value") for x in "ab"],
    "rslora": [f"{BLOCK}{name}/lora_{x}" for name in ("attention/out", "attention/query", "mlp/down") for x in "ab"],
    "dora": [f"{BLOCK}{name}/{x}" for name in ("attention/value", "mlp/up") for x in ("lora_a", "lora_b", "magnitude")],
    "adalora": [f"{BLOCK}attention/{name}/lora_{x}" for name in ("query", "value") for x in "abe"],
    "ia3": [f"{BLOCK}{name}/scale" for name in ("attention/key", "attention/value", "mlp/down")],
    "houlsby": [
        *(
            f"{BLOCK}{name}/adapter_{x}"
            for name in ("attention/out", "mlp/down")
            for x in ("down", "down_bias", "up", "up_bias")
        ),
        *(f"{name}/{x}" for name in ("norm", f"{BLOCK}attention_norm", f"{BLOCK}mlp_norm") for x in ("bias", "scale")),
    ],
    "pfeiffer": [f"{BLOCK}mlp/down/adapter_{x}" for x in ("down", "down_bias", "up", "up_bias")],
    "prefix": [f"{BLOCK}attention/prefix_{x}" for x in ("keys", "values")],
    "prompt": ["stack/prompt"],
    "bitfit": [
        f"{name}/bias"
        for name in (
            "norm",
            *(f"{BLOCK}attention/{x}" for x in ("key", "out", "query", "value")),
            *(f"{BLOCK}{x}" for x in ("attention_norm", "mlp/down", "mlp/up", "mlp_norm")),
        )
    ],
}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained(method: str) -> None:
    """By name; the model may be abstract, and the rest keeps the paths that it had, so weights of the base fit."""
    base = nnx.eval_shape(lambda: CONFIGS["decoder"].build(VOCAB, nnx.Rngs(params=0)))
    model = nnx.eval_shape(
        lambda: adapt.apply(CONFIGS["decoder"].build(VOCAB, nnx.Rngs(params=0)), METHODS[method], nnx.Rngs(params=1))
    )
    assert adapt.trainable(model) == adapt.trainable(nnx.state(model))
    _, trained, frozen = parted(model)
    everything = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.structure(adapt.join(trained, frozen)) == jax.tree.structure(everything)
    of_base = paths(nnx.to_pure_dict(nnx.state(base)))
    if method == "freeze":
        in_blocks = [path.removeprefix("stack/") for path in of_base if path.startswith("stack/")]
        assert sorted(paths(trained)) == sorted(["norm/bias", "norm/scale", *(f"stack/{path}" for path in in_blocks)])
        tables = ["positions/table", "tokens/table"]
        assert sorted(paths(frozen)) == sorted([*tables, *(f"stack/frozen/{path}" for path in in_blocks)])
        return
    assert sorted(paths(trained)) == sorted(TRAINED[method])
    assert set(of_base) <= set(paths(everything))
    if method not in ("bitfit", "houlsby"):
        assert sorted(paths(frozen)) == sorted(of_base)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "pfeiffer", "prefix", "prompt"])
def test_logical_axes_fit(method: str) -> None:
    """Each parameter has a name for each of its dimensions but that of the layers; ranks and places are whole."""
    model = adapt.apply(model_of("decoder"), METHODS[method], nnx.Rngs(params=0))
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        axes, stacked = variable.get_metadata()["axes"], "blocks" in path
        assert len(axes) == variable.ndim - stacked, path
        partition.spec(axes, partition.DEFAULT_RULES, rank=variable.ndim)
    if method == "lora":
        query = model.stack.blocks.attention.query
        assert query.lora_a.get_metadata()["axes"] == ("embed", None)
        assert query.lora_b.get_metadata()["axes"] == (None, "heads")


def matrices_formed(model: Any) -> set[tuple[int, ...]]:
    """Shapes of kernels that an equation of loss and gradient puts out, forwards or backwards."""
    graph, trained, frozen = parted(model)

    def loss(trained: Any, frozen: Any) -> Any:
        model = nnx.merge(graph, adapt.join(trained, frozen))
        return jnp.sum(jnp.sin(model.hidden(tokens(), mask=mask_of(model))))

    program = jax.make_jaxpr(jax.grad(loss))(trained, frozen)
    kernels = {(8, 8), (8, 12), (12, 8)}
    kernels |= {(3, *kernel) for kernel in kernels}
    return {v.aval.shape for equation in equations(program) for v in equation.outvars} & kernels


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3", "houlsby", "prefix", "prompt", "bitfit"])
def test_no_matrix_as_large_as_a_kernel_is_formed(method: str) -> None:
    """Neither W + A B, nor the gradient of a frozen kernel."""
    adapter = adapt.DoRA(rank=3, targets=("query", "up", "down")) if method == "dora" else METHODS[method]
    assert matrices_formed(adapt.apply(model_of("decoder"), adapter, nnx.Rngs(params=0))) == set()


def test_large_matrices_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the check above: a model that is trained whole, and LoRA that adds A B to W before the product."""
    assert matrices_formed(adapt.apply(model_of("decoder"), adapt.Freeze(), nnx.Rngs(params=0)))

    def naive(self: Any, x: Any) -> Any:
        return x @ (self.kernel[...] + self.scale * self.lora_a[...] @ self.lora_b[...])

    monkeypatch.setattr("lmobj.adapt._lora.LoRALinear.__call__", naive)
    assert (8, 8) in matrices_formed(adapt.apply(model_of("decoder"), METHODS["lora"], nnx.Rngs(params=0)))


def test_parts_of_anything() -> None:
    params = {"a": {"x": 1, "y": (None, "embed")}, "b": {"z": 3}, "c": 4}
    marks = {"a": {"x": True, "y": False}, "b": {"z": False}, "c": True}
    trained, frozen = adapt.split(params, marks)
    assert (trained, frozen) == ({"a": {"x": 1}, "c": 4}, {"a": {"y": (None, "embed")}, "b": {"z": 3}})
    assert adapt.join(trained, frozen) == params
    with pytest.raises(ValueError, match="both parts hold the parameter 'x'"):
        adapt.join({"a": {"x": 1}}, {"a": {"x": 2}})


def test_the_model_itself_is_left_as_it_is() -> None:
    base = model_of("decoder")
    graph = nnx.graphdef(base)
    model = adapt.apply(base, adapt.LoRA(), nnx.Rngs(params=0))
    adapt.merge(model)
    assert nnx.graphdef(base) == graph
    assert model.tokens.table.get_value() is base.tokens.table.get_value()
    assert all(jax.tree.leaves(adapt.trainable(base)))


@pytest.mark.parametrize(
    ("family", "adapter", "message"),
    [
        (
            "decoder",
            adapt.LoRA(targets=("gate",)),
            "'gate', which Decoder lacks; its linear maps are down, key, out",
        ),
        ("decoder", adapt.LoRA(targets=("uery",)), r"adapter\.targets has 'uery'"),
        ("xlnet", adapt.Prefix(), "XLNet has no attention that takes one"),
        ("xlnet", adapt.Prompt(), "the layers of XLNet cannot take one"),
        ("xlnet", adapt.Freeze(layers=1), r"adapter\.layers is 1, and the layers of XLNet cannot be parted"),
        ("albert", adapt.Freeze(layers=1), "one block is all its layers; accepted: 0, or all 2"),
        ("decoder", adapt.Freeze(layers=4), "the model has 3"),
        ("llama", adapt.BitFit(), "Decoder has no such biases; those that have some are none"),
        ("decoder", adapt.BitFit(targets=("gate",)), "'gate', and Decoder has no such biases"),
    ],
)
def test_refusals_name_what_there_is(family: str, adapter: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt.apply(model_of(family), adapter, nnx.Rngs(params=0))


def test_a_second_adapter_is_refused() -> None:
    model = adapt.apply(model_of("decoder"), adapt.BitFit(), nnx.Rngs(params=0))
    with pytest.raises(UserError, match=r"adapter\.name is lora, and Decoder has an adapter already"):
        adapt.apply(model, adapt.LoRA(), nnx.Rngs(params=0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (lambda: adapt.LoRA(rank=0), r"adapter\.rank is 0; it must be at least 1"),
        (lambda: adapt.DoRA(alpha=0.0), r"adapter\.alpha is 0\.0; it must be above 0"),
        (lambda: adapt.IA3(targets=("key",)), r"adapter\.inputs has 'down'"),
        (lambda: adapt.Pfeiffer(bottleneck=0), r"adapter\.bottleneck is 0"),
        (lambda: adapt.Prefix(length=0), r"adapter\.length is 0"),
        (lambda: adapt.Prompt(init_std=-1.0), r"adapter\.init_std is -1\.0"),
        (lambda: adapt.Freeze(embeddings=False), "nothing is frozen"),
        (lambda: adapt.AdaLoRA(initial_rank=8), r"adapter\.target_rank is 8"),
        (lambda: adapt.AdaLoRA(beta1=1.0), r"adapter\.beta1 is 1\.0"),
        (lambda: adapt.AdaLoRA(total_steps=9, initial_steps=4, final_steps=5), "leave none of adapter.total_steps, 9"),
    ],
)
def test_settings_that_cannot_be(settings: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings()


def test_settings_are_told_apart_by_name() -> None:
    """And unknown keys are refused, in methods that take over another's settings too."""
    union = pydantic.TypeAdapter(adapt.AdapterConfig)
    for adapter in METHODS.values():
        read = union.validate_python({"name": adapter.name})
        assert type(read) is type(adapter)
        with pytest.raises(pydantic.ValidationError, match="rang"):
            union.validate_python({"name": adapter.name, "rang": 1})
    assert union.validate_python({"name": "dora", "targets": ["key"]}) == adapt.DoRA(targets=("key",))
