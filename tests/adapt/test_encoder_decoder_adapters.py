"""Adapters of an encoder-decoder: both stacks and attention over the encoder are reached, and decoding knows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mutants import Mutant, assert_killed
from tiny_models import CONFIGS, LENGTH, METHODS, ROWS, VOCAB, forget, hidden, model_of, moved, parted, paths, states
from tiny_models import tokens as tokens_of

from lmobj import adapt, masks
from lmobj.adapt._freeze import PartlyFrozenStack
from lmobj.adapt._prefix import _Prefixed
from lmobj.errors import UserError
from lmobj.models._attention import Call, Cross, Seen
from lmobj.models._block import Stack


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


ENCODER, DECODER = "encoder/stack/blocks", "decoder/stack/blocks"
ATTENTION = (f"{ENCODER}/attention", f"{DECODER}/attention", f"{DECODER}/cross_attention")
DOWN = (f"{ENCODER}/mlp/down", f"{DECODER}/mlp/down")
NORMS = ("encoder/norm", "decoder/norm", *(f"{x}_norm" for x in (*ATTENTION, f"{ENCODER}/mlp", f"{DECODER}/mlp")))
BOTTLENECK = ("down", "down_bias", "up", "up_bias")
TRAINED = {
    "lora": [f"{x}/{name}/lora_{ab}" for x in ATTENTION for name in ("query", "value") for ab in "ab"],
    "rslora": [  # `attention/out` names that of attention over the row itself, as it says
        f"{x}/lora_{ab}"
        for x in (*DOWN, *(f"{y}/query" for y in ATTENTION), *(f"{y}/out" for y in ATTENTION[:2]))
        for ab in "ab"
    ],
    "adalora": [f"{x}/{name}/lora_{abe}" for x in ATTENTION for name in ("query", "value") for abe in "abe"],
    "ia3": [f"{x}/scale" for x in (*DOWN, *(f"{y}/{name}" for y in ATTENTION for name in ("key", "value")))],
    "houlsby": [
        *(f"{x}/adapter_{y}" for x in (*DOWN, *(f"{z}/out" for z in ATTENTION)) for y in BOTTLENECK),
        *(f"{x}/scale" for x in NORMS),
    ],
    "pfeiffer": [f"{x}/adapter_{y}" for x in DOWN for y in BOTTLENECK],
    "prefix": [f"{x}/prefix_{y}" for x in ATTENTION for y in ("keys", "values")],
    "prompt": ["encoder/stack/prompt"],
}
"""Of T5, which has no biases. The targets are PEFT's for it: q and v of every attention, and k, v and wo."""


@pytest.mark.parametrize("method", TRAINED)
def test_every_stack_and_attention_is_reached(method: str) -> None:
    model = nnx.eval_shape(
        lambda: adapt.apply(CONFIGS["t5"].build(VOCAB, nnx.Rngs(params=0)), METHODS[method], nnx.Rngs(params=1))
    )
    assert sorted(paths(parted(model)[1])) == sorted(TRAINED[method])


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt"])
def test_every_part_of_an_adapter_learns(method: str) -> None:
    """From the decoder's states alone: what is in the encoder through attention over it."""
    model = moved(adapt.apply(model_of("t5"), METHODS[method], nnx.Rngs(params=0)))
    graph, trained, frozen = parted(model)

    def total(trained: Any) -> Any:
        model = nnx.merge(graph, adapt.join(trained, frozen))
        return jnp.sum(jnp.sin(states(model, tokens_of(), masks.causal())))

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(trained)):
        assert np.all(np.max(np.abs(gradient), axis=tuple(range(1, gradient.ndim))) > 1e-6), path


def attended(layer: Any, x: np.ndarray, keys: np.ndarray, values: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Unscaled attention of two heads in NumPy; the bias is [H, Q, S], minus infinity where a key is not seen."""
    q = (x @ np.asarray(layer.query.kernel[...])).reshape(ROWS, -1, 2, 4)
    weights = np.exp(np.einsum("bqhd,bshd->bhqs", q, keys) + bias)
    weights /= weights.sum(-1, keepdims=True)
    y = np.einsum("bhqs,bshd->bqhd", weights, values)
    return y.reshape(ROWS, -1, 8) @ np.asarray(layer.out.kernel[...])


def test_prefixes_by_hand() -> None:
    """Of a decoder's first layer: no bias of positions on the prefix, and one before the encoder's states too."""
    model = moved(adapt.apply(model_of("t5"), adapt.Prefix(length=3), nnx.Rngs(params=0)))
    graph, state = nnx.split(model.decoder.stack.blocks)
    block = nnx.merge(graph, jax.tree.map(lambda x: x[0], state))
    generator = np.random.default_rng(2)
    x, encoded = generator.normal(size=(ROWS, LENGTH, 8)), generator.normal(size=(ROWS, 4, 8))
    bias = np.asarray(model.decoder.relative.row(LENGTH, jnp.float64))
    cross = Cross(masks.bidirectional(), jnp.asarray(encoded))
    call = Call(masks.causal(), jnp.zeros((ROWS, LENGTH), int), bias=jnp.asarray(bias), cross=cross)
    first = jnp.asarray(0)
    own = block.attention(jnp.asarray(x), first, call, None)[0]
    across = block.cross_attention(jnp.asarray(x), first, call)

    def seen_by(layer: Any, rows: np.ndarray) -> Any:
        for prefix, linear in ((layer.prefix_keys, layer.key), (layer.prefix_values, layer.value)):
            before = np.broadcast_to(np.asarray(prefix[...]).reshape(1, 3, 2, 4), (ROWS, 3, 2, 4))
            yield np.concatenate([before, (rows @ np.asarray(linear.kernel[...])).reshape(ROWS, -1, 2, 4)], axis=1)

    later = np.triu(np.full((LENGTH, LENGTH), -np.inf), 1)
    padded = np.concatenate([np.zeros((2, LENGTH, 3)), bias[0] + later], axis=-1)
    np.testing.assert_allclose(own, attended(block.attention, x, *seen_by(block.attention, x), padded), atol=1e-12)
    none = np.zeros((2, LENGTH, 7))
    expected = attended(block.cross_attention, x, *seen_by(block.cross_attention, encoded), none)
    np.testing.assert_allclose(across, expected, atol=1e-12)


def test_a_prompt_of_the_encoder() -> None:
    """One vector more before the row, that sees itself alone and stands at no distance; the decoder is as it was."""
    base = model_of("t5")
    model = moved(adapt.apply(base, adapt.Prompt(length=1), nnx.Rngs(params=0)))
    x = base.tokens(tokens_of(), jnp.float64)
    prompt = jnp.broadcast_to(model.encoder.stack.prompt[...], (ROWS, 1, 8))
    bias = np.zeros((1, 2, LENGTH + 1, LENGTH + 1))
    bias[:, :, 1:, 1:] = base.encoder.relative.row(LENGTH, jnp.float64)
    prompt_first = np.asarray([[1] + [2] * LENGTH] * ROWS)
    mask = masks.permutation(jnp.asarray(prompt_first), jnp.asarray(prompt_first - 1))
    call = Call(mask, jnp.zeros((ROWS, LENGTH + 1), int), bias=jnp.asarray(bias))
    encoded = base.encoder.finish(base.encoder.stack(jnp.concatenate([prompt, x], axis=1), call)[:, 1:])
    expected = base.decode(tokens_of(), encoded, mask=masks.causal(), cross_mask=masks.bidirectional())
    np.testing.assert_allclose(hidden(model), expected, atol=1e-12)


@pytest.mark.parametrize("method", ["freeze", "prefix"])
def test_decoding_with_a_cache(method: str) -> None:
    check_decoding(METHODS[method])


def check_decoding(method: adapt.AdapterConfig) -> None:
    """Token by token the states are those of the whole row."""
    model = moved(adapt.apply(model_of("t5"), method, nnx.Rngs(params=0)))
    graph, params = nnx.split(model)

    @jax.jit
    def decode(params: Any) -> Any:
        model = nnx.merge(graph, params)
        encoded = model.encode(tokens_of(), mask=masks.bidirectional())
        cache = model.init_cache(encoded, jnp.ones((ROWS, LENGTH), bool), LENGTH)
        first, cache = model.step(tokens_of()[:, :2], cache, jnp.broadcast_to(jnp.arange(2), (ROWS, 2)))
        rest = []
        for i in range(2, LENGTH):
            state, cache = model.step(tokens_of()[:, i : i + 1], cache, jnp.full((ROWS, 1), i))
            rest.append(state)
        return jnp.concatenate([first, *rest], axis=1)

    np.testing.assert_allclose(decode(params), hidden(model), rtol=1e-12, atol=1e-12)


def test_frozen_parts_of_both_stacks() -> None:
    """The first layer of each, every table that is read by index, and the norm over embeddings."""
    model = adapt.apply(model_of("bart"), adapt.Freeze(layers=1), nnx.Rngs(params=0))
    frozen = set(paths(parted(model)[2]))
    below = {path for path in frozen if "/stack/" not in path}
    sides = ("encoder", "decoder")
    norms = {f"{side}/embedding_norm/{x}" for side in sides for x in ("bias", "scale")}
    assert below == {"tokens/table", *(f"{side}/positions/table" for side in sides), *norms}
    layers = {path.split("/blocks/")[0] for path in frozen - below}
    assert layers == {f"{side}/stack/frozen" for side in sides}
    relative = adapt.apply(model_of("t5"), adapt.Freeze(), nnx.Rngs(params=0))
    assert set(paths(parted(relative)[2])) == {"tokens/table", *(f"{side}/relative/table/table" for side in sides)}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (adapt.BitFit(), "EncoderDecoder has no such biases; those that have some are none"),
        (adapt.LoRA(targets=("wq",)), "'wq', which EncoderDecoder lacks; its linear maps are down, gate, key, out"),
        (adapt.Freeze(layers=3), "the model has 2"),
    ],
    ids=["bitfit", "targets", "layers"],
)
def test_what_t5_has_no_place_for_is_refused(adapter: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        adapt.apply(model_of("t5"), adapter, nnx.Rngs(params=0))


def _biased(extended: Any) -> Any:
    """Distances from the prefix, as if it stood before the row."""

    def mutant(self: Any, seen: Seen) -> Seen:
        found = extended(self, seen)
        if seen.bias is None:
            return found
        return found._replace(bias=jnp.pad(seen.bias, ((0, 0), (0, 0), (0, 0), (3, 0)), mode="edge"))

    return mutant


MUTANTS = [
    (
        Mutant("the cache has the layers that learn alone", PartlyFrozenStack, "cross_cache", lambda _: _upper),
        lambda: check_decoding(METHODS["freeze"]),
    ),
    (Mutant("the prefix has distances", _Prefixed, "extended", _biased), test_prefixes_by_hand),
]


def _upper(self: Any, encoded: Any) -> Any:
    return Stack.cross_cache(self, encoded)


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=["cache", "prefix"])
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, check: Callable[[], None]) -> None:
    forget()
    assert_killed(monkeypatch, mutant, [check])
    forget()
