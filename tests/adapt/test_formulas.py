"""Each method's formula with numbers worked out by hand, on single linear maps, attention and stacks; and mutants."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mutants import Mutant, assert_killed
from tiny_models import LENGTH, ROWS, SEEDS, equations, forget, hidden, model_of, moved, parted, tokens

from lmobj import adapt, masks
from lmobj.adapt import _dora, _freeze, _prompt
from lmobj.adapt._bottleneck import BottleneckLinear
from lmobj.adapt._dora import DoRALinear
from lmobj.adapt._ia3 import IA3Linear
from lmobj.adapt._lora import LoRALinear
from lmobj.models._block import Call
from lmobj.models._layers import Linear, zeros


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def linear_map(kernel: list[list[float]], bias: list[float] | None = None) -> Linear:
    base = Linear(
        len(kernel),
        len(kernel[0]),
        axes=("embed", "mlp"),
        init=zeros(),
        bias=bias is not None,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(params=0),
    )
    put(base, kernel=kernel)
    if bias is not None:
        put(base, bias=bias)
    return base


def put(module: Any, **values: Any) -> None:
    """Gives parameters their values."""
    for name, value in values.items():
        variable = getattr(module, name)
        assert variable.shape == np.shape(value)
        variable.set_value(jnp.asarray(value, jnp.float64))


def equal(seen: Any, expected: Any) -> None:
    np.testing.assert_allclose(seen, expected, rtol=1e-13, atol=1e-13)


X = [[1.0, 2.0]]
RNGS = nnx.Rngs(params=0)


def test_lora() -> None:
    """x A = [1, 2] [[1, 0], [1, -1]] = [3, -2]; times B = [[1], [2]]: -1; x W + b = 15; s = 6 / 2 or 6 / sqrt(2)."""
    for scaling, scale in (("rank", 3.0), ("root_rank", 6 / np.sqrt(2))):
        config = adapt.LoRA(rank=2, alpha=6.0, scaling=scaling)  # type: ignore[arg-type]
        adapted = LoRALinear(linear_map([[1.0], [2.0]], [10.0]), config, RNGS)
        equal(adapted(jnp.asarray(X)), [[15.0]])
        put(adapted, lora_a=[[1, 0], [1, -1]], lora_b=[[1], [2]])
        equal(adapted(jnp.asarray(X)), [[15 - scale]])
        equal(adapted.merged().kernel[...], [[1 + scale], [2 - scale]])  # A B = [[1], [-1]]
        equal(adapted.merged()(jnp.asarray(X)), [[15 - scale]])


def test_dora() -> None:
    """W = [[3, 1], [2, 2]], A = [[1], [0]], B = [[0, -1]], s = 2: W + s A B = [[3, -1], [2, 2]].

    The norms of its columns are sqrt(13) and sqrt(5); at first the lengths are those of W, the same here by chance.
    x (W + s A B) = [7, 3]; with m = [2 sqrt(13), -sqrt(5)] the result is [14, -3].
    """
    adapted = DoRALinear(linear_map([[3.0, 1.0], [2.0, 2.0]], [0.5, 0.0]), adapt.DoRA(rank=1, alpha=2.0), RNGS)
    equal(adapted.magnitude[...], np.sqrt([13, 5]))
    equal(adapted(jnp.asarray(X)), [[7.5, 5.0]])
    put(adapted, lora_a=[[1], [0]], lora_b=[[0, -1]], magnitude=[2 * np.sqrt(13), -np.sqrt(5)])
    equal(adapted(jnp.asarray(X)), [[14.5, -3.0]])
    equal(adapted.merged().kernel[...], [[6, 1], [4, -2]])


def test_the_norm_of_dora() -> None:
    """The thin products against the norm of the whole matrix, with ranks above one and a stack of layers."""
    generator = np.random.default_rng(0)
    base = linear_map([[0.0] * 4] * 3)
    base.kernel = base.kernel.replace(jnp.asarray(generator.normal(size=(2, 3, 4))))
    adapted = DoRALinear(base, adapt.DoRA(rank=2, alpha=3.0), RNGS)
    a, b = generator.normal(size=(2, 3, 2)), generator.normal(size=(2, 2, 4))
    put(adapted, lora_a=a, lora_b=b)
    whole = np.asarray(base.kernel[...]) + 1.5 * a @ b
    equal(adapted._column_norms(), np.sqrt((whole**2).sum(axis=1)))


def test_the_gradient_of_dora() -> None:
    """With n = ||W + s A B|| held: d/dB of sum y = s m / n * (A^T x^T 1), and not that of the norm beside it.

    W = [[3], [4]], A = [[1], [0]], B = [[0]], s = 1, m = 10, x = [1, 2]: n = 5, so 10 / 5 * 1 = 2. With the norm's own
    gradient there were y * -(w_1 / n) / n = -22 * 3 / 25 besides.
    """
    adapted = DoRALinear(linear_map([[3.0], [4.0]]), adapt.DoRA(rank=1, alpha=1.0), RNGS)
    put(adapted, lora_a=[[1], [0]], magnitude=[10])
    graph, params = nnx.split(adapted)
    grads = jax.grad(lambda params: nnx.merge(graph, params)(jnp.asarray(X)).sum())(nnx.to_pure_dict(params))
    equal(grads["lora_b"], [[2.0]])
    equal(grads["magnitude"], [11 / 5])


def test_ia3() -> None:
    """x = [1, 2], W = [[1, 3], [2, 4]], b = [1, 0]: x W + b = [6, 11]; times [2, -1], or of [3, 0] * x: [4, 9]."""
    for on_input, scale, expected in ((False, [2.0, -1.0], [[12, -11]]), (True, [3.0, 0.0], [[4, 9]])):
        adapted = IA3Linear(linear_map([[1.0, 3.0], [2.0, 4.0]], [1.0, 0.0]), on_input=on_input)
        equal(adapted(jnp.asarray(X)), [[6, 11]])
        put(adapted, scale=scale)
        equal(adapted(jnp.asarray(X)), expected)
        equal(adapted.merged()(jnp.asarray(X)), expected)


def test_bottleneck() -> None:
    """z = x W = [5]; z D + d = [5 - 6, 10 + 1] = [-1, 11], relu [0, 11]; times U = [[1], [2]], + u = 3: 25; z + 25."""
    adapted = BottleneckLinear(linear_map([[1.0], [2.0]]), 2, "relu", RNGS)
    equal(adapted(jnp.asarray(X)), [[5]])
    put(adapted, adapter_down=[[1, 2]], adapter_down_bias=[-6, 1], adapter_up=[[1], [2]], adapter_up_bias=[3])
    equal(adapted(jnp.asarray(X)), [[30]])


def test_prefix() -> None:
    """The first layer's attention against softmax over prefix and text in NumPy, packed rows and all heads."""
    base = model_of("decoder")
    model = moved(adapt.apply(base, adapt.Prefix(length=3), nnx.Rngs(params=0)))
    graph, state = nnx.split(model.stack.blocks.attention)
    layer = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    generator = np.random.default_rng(2)
    x = generator.normal(size=(ROWS, LENGTH, 8))
    segments = np.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
    call = Call(masks.causal().packed(jnp.asarray(segments)), jnp.zeros((ROWS, LENGTH), int))
    seen = layer(jnp.asarray(x), jnp.asarray(0), call, None)[0]

    q, k, v = (
        (x @ np.asarray(m.kernel[...]) + np.asarray(m.bias[...])).reshape(ROWS, LENGTH, 2, 4)
        for m in (layer.query, layer.key, layer.value)
    )
    prefix_k, prefix_v = (np.asarray(p[...]).reshape(3, 2, 4) for p in (layer.prefix_keys, layer.prefix_values))
    y = np.zeros((ROWS, LENGTH, 2, 4))
    for row, i, head in np.ndindex(ROWS, LENGTH, 2):
        visible = [j for j in range(i + 1) if segments[row, i] == segments[row, j]]
        keys = np.concatenate([prefix_k[:, head], k[row, visible, head]])
        weights = np.exp(keys @ q[row, i, head] / 2)
        y[row, i, head] = weights / weights.sum() @ np.concatenate([prefix_v[:, head], v[row, visible, head]])
    expected = y.reshape(ROWS, LENGTH, 8) @ np.asarray(layer.out.kernel[...]) + np.asarray(layer.out.bias[...])
    equal(seen, expected)


def test_decoding_with_a_cache_and_a_prefix() -> None:
    check_decoding(adapt.Prefix(length=3))


@pytest.mark.slow
def test_decoding_with_a_cache_and_frozen_layers() -> None:
    check_decoding(adapt.Freeze(layers=2))


def check_decoding(method: adapt.AdapterConfig) -> None:
    """Token by token the states are those of the whole row."""
    model = moved(adapt.apply(model_of("decoder"), method, nnx.Rngs(params=0)))
    graph, params = nnx.split(model)

    @jax.jit
    def decode(params: Any) -> Any:
        model = nnx.merge(graph, params)
        cache = model.init_cache(ROWS, LENGTH)
        first = jnp.broadcast_to(jnp.arange(2), (ROWS, 2))
        states, cache = model.step(tokens()[:, :2], cache, first)
        states = [states]
        for i in range(2, LENGTH):
            state, cache = model.step(tokens()[:, i : i + 1], cache, jnp.full((ROWS, 1), i))
            states.append(state)
        return jnp.concatenate(states, axis=1)

    equal(decode(params), hidden(model))


def test_a_prompt_of_one_vector() -> None:
    """Under a causal mask it is a token more before the row, of which the model gives back no state."""
    base = model_of("decoder")
    model = moved(adapt.apply(base, adapt.Prompt(length=1), nnx.Rngs(params=0)))
    x, call = base._embed(tokens(), masks.causal(), None, None, None)
    prompt = jnp.broadcast_to(model.stack.prompt[...], (ROWS, 1, 8))
    longer = base.stack(jnp.concatenate([prompt, x], axis=1), call)
    equal(hidden(model), base.finish(longer[:, 1:]))


@pytest.mark.parametrize("config", [adapt.Freeze(layers=2), adapt.Prompt(length=2)], ids=lambda config: config.name)
def test_the_last_blocks_input_of_adapted_stacks(config: adapt.AdapterConfig) -> None:
    """Of three layers two are frozen, and the input of the third is what they put out."""
    graph, params = nnx.split(moved(adapt.apply(model_of("decoder"), config, nnx.Rngs(params=0))))

    @jax.jit
    def both(params: Any) -> Any:
        model = nnx.merge(graph, params)
        states = model.block_states(tokens(), mask=masks.causal())
        return (states.before_last, states.hidden), model.hidden_layers(tokens(), mask=masks.causal())

    (before, after), layers = both(params)
    equal(before, layers[-2])
    equal(after, layers[-1])


def test_a_prompt_keeps_documents_apart() -> None:
    """A packed row in both directions: each document as if it were alone, and both changed by the prompt."""
    base = model_of("encoder")
    model = moved(adapt.apply(base, adapt.Prompt(length=2), nnx.Rngs(params=0)))
    segments = jnp.asarray([[1, 1, 2, 2, 2]] * ROWS)
    mask = masks.bidirectional().packed(segments)
    packed = hidden(model, mask)
    other = tokens().at[:, :2].set(1)
    equal(hidden(model, mask, of=other)[:, 2:], packed[:, 2:])
    assert np.all(np.max(np.abs(packed - hidden(base, mask)), axis=(0, 2)) > 1e-3)


def test_a_prompt_cannot_be_decoded_with_a_cache() -> None:
    model = adapt.apply(model_of("decoder"), adapt.Prompt(), nnx.Rngs(params=0))
    with pytest.raises(ValueError, match="decoding with a cache does not know"):
        model.step(tokens(), model.init_cache(ROWS, LENGTH), jnp.zeros((ROWS, LENGTH), int))


def test_frozen_layers_are_outside_the_backward_pass() -> None:
    """With frozen embeddings one scan of two layers goes forwards, and one of the last layer forwards and back."""
    model = adapt.apply(model_of("decoder"), adapt.Freeze(layers=2), nnx.Rngs(params=0))
    graph, trained, frozen = parted(model)

    def loss(trained: Any) -> Any:
        return jnp.sum(nnx.merge(graph, adapt.join(trained, frozen)).hidden(tokens(), mask=masks.causal()))

    program = jax.make_jaxpr(jax.grad(loss))(trained)
    scans = [e.params for e in equations(program) if e.primitive.name == "scan"]
    assert [(scan["length"], scan["reverse"]) for scan in scans] == [(2, False), (1, False), (1, True)]
    assert trained["stack"]["blocks"]["mlp"]["up"]["kernel"].shape == (1, 8, 12)
    assert frozen["stack"]["frozen"]["blocks"]["mlp"]["up"]["kernel"].shape == (2, 8, 12)


def test_frozen_layers_compute_what_they_did() -> None:
    """Every layer's output, with dropout, which goes by the number of a layer in the whole."""
    base = model_of("decoder")
    model = adapt.apply(base, adapt.Freeze(layers=2), nnx.Rngs(params=0))

    def layers(model: Any) -> Any:
        graph, params = nnx.split(model)
        run = jax.jit(lambda p: nnx.merge(graph, p).hidden_layers(tokens(), mask=masks.causal(), dropout=SEEDS))
        return run(params)

    equal(layers(model), layers(base))


def _norms_of_rows(_: Any) -> Any:
    return lambda self: jnp.linalg.norm(self.kernel[...] + self.scale * self.lora_a[...] @ self.lora_b[...], axis=-1)


def _scaled_by_rank(config: adapt.LoRA) -> float:
    return config.alpha / config.rank


MUTANTS = [
    (
        Mutant("rsLoRA scaled by the rank", adapt.LoRA, "scale", lambda _: property(lambda s: s.alpha / s.rank)),
        test_lora,
    ),
    (
        Mutant("a gradient through DoRA's norm", _dora.jax.lax, "stop_gradient", lambda _: lambda x: x),
        test_the_gradient_of_dora,
    ),
    (Mutant("DoRA's norm is of rows", DoRALinear, "_column_norms", _norms_of_rows), test_dora),
    (Mutant("(IA)^3 leaves the bias", IA3Linear, "merged", lambda merged: _merged_without_bias(merged)), test_ia3),
    (
        Mutant("frozen layers are trained", _freeze, "mark", lambda mark: lambda module, _: mark(module, True)),
        test_frozen_layers_are_outside_the_backward_pass,
    ),
]
SLOW_MUTANTS = [
    (
        Mutant("layers are counted from the lowest that is trained", _freeze, "_part", lambda part: _from_zero(part)),
        test_frozen_layers_compute_what_they_did,
    ),
    (
        Mutant("the prompt sees the first document", _prompt, "_PROMPT", lambda _: 1),
        test_a_prompt_keeps_documents_apart,
    ),
]


def _from_zero(part: Any) -> Any:
    return lambda base, layers_of, *, layers, first: part(base, layers_of, layers=layers, first=0)


def _merged_without_bias(merged: Any) -> Any:
    def mutant(self: Any) -> Any:
        plain = merged(self)
        plain.bias = self.bias
        return plain

    return mutant


def _name(value: Any) -> str:
    return str(value) if isinstance(value, Mutant) else value.__name__


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=_name)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, check: Callable[[], None]) -> None:
    assert_killed(monkeypatch, mutant, [check])


@pytest.mark.parametrize(("mutant", "check"), SLOW_MUTANTS, ids=_name)
@pytest.mark.slow
def test_more_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, check: Callable[[], None]) -> None:
    forget()
    assert_killed(monkeypatch, mutant, [check])
    forget()
