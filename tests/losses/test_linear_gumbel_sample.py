"""Samples without logits: those of full logits with the same noise, the softmax's frequencies, the same on any mesh."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from scipy import stats

from lmobj import losses, noise, partition
from lmobj.errors import UserError

ROWS, SLOTS, WIDTH, CLASSES = 8, 3, 8, 96
SETTINGS: dict[str, Any] = {"vocab_size": CLASSES - 4, "soft_cap": 3.0, "temperature": 0.7}
VOCAB_MASK = jnp.arange(CLASSES) % 3 != 1


@functools.cache
def make_arrays(classes: int = CLASSES) -> dict[str, jax.Array]:
    """hidden, table, bias, seeds, and for each slot a class to exclude: the one that it would draw without."""
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = {
        "hidden": jax.random.normal(keys[0], (ROWS, SLOTS, WIDTH)),
        "table": jax.random.normal(keys[1], (classes, WIDTH)),
        "bias": jax.random.normal(keys[2], (classes,)),
        "seeds": noise.fold_index(jax.random.bits(keys[3], (ROWS, 1), "uint32"), jnp.arange(SLOTS)),
    }
    return arrays | {"excluded": full(**arrays, mask=jnp.ones(classes, bool))}


@jax.jit
def full(hidden: Any, table: Any, bias: Any, seeds: Any, mask: Any, excluded: Any = None) -> jax.Array:
    """The definition, by full logits."""
    logits = 3.0 * jnp.tanh((hidden @ table.T + bias) / 3.0)
    classes = jnp.arange(table.shape[0])
    exists = mask & (classes < CLASSES - 4)
    if excluded is not None:
        exists = exists & (classes != excluded[..., None])
    return jnp.argmax(jnp.where(exists, logits / 0.7 + noise.gumbel(seeds[..., None], classes), -jnp.inf), axis=-1)


@pytest.mark.parametrize("block_size", [None, 4, 7, 48, 50, CLASSES])
def test_samples_are_those_of_full_logits(block_size: int | None) -> None:
    # 7 does not divide 96, and the widest divisor up to 50 is 48; 4 makes 24 blocks.
    arrays = make_arrays()
    sample = functools.partial(losses.linear_gumbel_sample, vocab_mask=VOCAB_MASK, block_size=block_size, **SETTINGS)
    got = jax.jit(sample)(**arrays)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, full(**arrays, mask=VOCAB_MASK))
    assert len(np.unique(got)) > 8


def test_blocks_that_overlap_and_padding_of_the_table_change_nothing() -> None:
    # 101 classes are prime: runs of 26 rows, of which the last two overlap. Rows from 92 on are not real.
    arrays, longer = make_arrays(), dict(make_arrays(101))
    for name in ("table", "bias"):
        longer[name] = longer[name].at[:CLASSES].set(arrays[name])
    longer |= {name: arrays[name] for name in ("hidden", "seeds", "excluded")}
    got = jax.jit(functools.partial(losses.linear_gumbel_sample, block_size=26, **SETTINGS))(**longer)
    np.testing.assert_array_equal(got, full(**arrays, mask=jnp.ones(CLASSES, bool)))


def test_frequencies_are_the_softmax() -> None:
    # One distribution over 30 classes, 200,000 draws: 1000 rows of 200 slots.
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, table = jax.random.normal(keys[0], (WIDTH,)), jax.random.normal(keys[1], (30, WIDTH))
    seeds = noise.fold_index(jax.random.bits(keys[2], (1000, 1), "uint32"), jnp.arange(200))
    tokens = jnp.broadcast_to(hidden, (*seeds.shape, WIDTH))
    for temperature, excluded in ((1.0, None), (2.5, 3)):
        settings = {} if excluded is None else {"excluded": jnp.full(seeds.shape, excluded)}
        sample = functools.partial(losses.linear_gumbel_sample, temperature=temperature, block_size=10)
        drawn = jax.jit(sample)(tokens, table, seeds, **settings)
        logits = np.asarray(table @ hidden, np.float64) / temperature
        if excluded is not None:
            logits[excluded] = -np.inf
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        counts = np.bincount(np.asarray(drawn).ravel(), minlength=30)
        assert counts[probabilities == 0].sum() == 0
        likely = probabilities * counts.sum() > 5
        pooled = [np.append(x[likely], x[~likely].sum()) for x in (counts, probabilities * counts.sum())]
        pooled = [x if pooled[1][-1] > 5 else x[:-1] for x in pooled]
        assert pooled[1].sum() == pytest.approx(200_000, rel=1e-4)
        pooled[1] *= pooled[0].sum() / pooled[1].sum()
        assert stats.chisquare(*pooled).pvalue > 1e-3


def test_one_token_and_no_gradient() -> None:
    arrays = make_arrays()
    one = {name: x if name in ("table", "bias") else x[2, 1] for name, x in arrays.items()}
    assert int(losses.linear_gumbel_sample(**one, **SETTINGS)) == full(**arrays, mask=jnp.ones(CLASSES, bool))[2, 1]

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        drawn = losses.linear_gumbel_sample(hidden, table, arrays["seeds"], block_size=8)
        return jnp.sum(hidden * table[drawn])  # passes through the hidden states and the rows drawn, not the draw

    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(arrays["hidden"], arrays["table"])
    drawn = full_without_settings(arrays)
    np.testing.assert_allclose(grads[0], arrays["table"][drawn])
    np.testing.assert_allclose(
        grads[1], jnp.zeros((CLASSES, WIDTH)).at[drawn].add(arrays["hidden"]), rtol=1e-5, atol=1e-5
    )


def full_without_settings(arrays: dict[str, jax.Array]) -> jax.Array:
    logits = arrays["hidden"] @ arrays["table"].T
    return jnp.argmax(logits + noise.gumbel(arrays["seeds"][..., None], jnp.arange(CLASSES)), axis=-1)


BY_WIDTH = dict(partition.DEFAULT_RULES, batch=("data", "fsdp"))
BY_CLASS = dict(BY_WIDTH, vocab=("tensor", "fsdp"))
NAMES = {
    "hidden": ("batch", None, None),
    "table": ("vocab", "embed"),
    "bias": ("vocab",),
    "seeds": ("batch",),
    "excluded": ("batch",),
}


@functools.cache
def on_one_device() -> np.ndarray:
    return np.asarray(full(**make_arrays(), mask=VOCAB_MASK))


@pytest.mark.parametrize(
    ("shape", "rules"),
    [
        pytest.param((8, 1, 1), BY_WIDTH, id="data"),
        pytest.param((1, 8, 1), BY_WIDTH, id="fsdp"),
        pytest.param((1, 1, 8), BY_WIDTH, id="tensor"),
        pytest.param((2, 2, 2), BY_WIDTH, id="all three"),
        pytest.param((2, 2, 2), BY_CLASS, id="all three by class"),
    ],
)
def test_layouts_draw_the_same_and_gather_nothing(shape: tuple[int, int, int], rules: partition.Rules) -> None:
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    at = {name: NamedSharding(mesh, partition.spec(axes, rules)) for name, axes in NAMES.items()}
    arrays = {name: jax.device_put(x, at[name]) for name, x in make_arrays().items()}
    with jax.set_mesh(mesh), partition.rules(rules):
        run = jax.jit(
            lambda arrays: losses.linear_gumbel_sample(**arrays, vocab_mask=VOCAB_MASK, block_size=4, **SETTINGS),
            out_shardings=at["seeds"],
        )
        compiled = run.lower(arrays).compile()
    text = str(compiled.as_text())
    assert "all-gather" not in text
    # Under fsdp the table goes round a ring instead.
    assert ("collective-permute" in text) == (shape[1] > 1)
    np.testing.assert_array_equal(compiled(arrays), on_one_device())


@pytest.mark.parametrize("block_size", [4, CLASSES])
def test_classes_have_32_bits_in_float64_too(block_size: int) -> None:
    """Round the ring and over blocks, where loops must carry what they were given."""
    mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in make_arrays().items()}
    for name in ("hidden", "table", "bias"):
        shapes[name] = jax.ShapeDtypeStruct(shapes[name].shape, jnp.float64)
    with jax.enable_x64(True), jax.set_mesh(mesh), partition.rules(BY_WIDTH):
        sample = functools.partial(losses.linear_gumbel_sample, block_size=block_size, **SETTINGS)
        assert jax.eval_shape(lambda arrays: sample(**arrays), shapes).dtype == jnp.int32


def test_the_compiled_text_holds_blocks_and_no_logits() -> None:
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in make_arrays().items()}
    sample = jax.jit(lambda arrays, size: losses.linear_gumbel_sample(**arrays, block_size=size), static_argnums=1)
    logits = "f32[1,1,8,3,1,96]"
    assert logits in str(sample.lower(shapes, CLASSES).compile().as_text()).replace(" ", "")
    blocks = str(sample.lower(shapes, 8).compile().as_text())
    assert "8,3,1,96]" not in blocks
    assert "8,3,96]" not in blocks


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": jnp.zeros((ROWS, SLOTS), jnp.int32)}, "seeds must be uint32, not int32"),
        ({"seeds": jnp.zeros((ROWS,), jnp.uint32)}, r"linear_gumbel_sample: seeds must be integers of shape \(8, 3\)"),
        ({"excluded": jnp.zeros((ROWS, SLOTS))}, "excluded must be integers"),
        ({"temperature": 0.0}, r"temperature is 0\.0; it must be above 0"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        losses.linear_gumbel_sample(**make_arrays() | changed)
