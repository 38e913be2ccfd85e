"""Blockwise statistics against full logits, in float64 unless the test is about another type."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from lmobj import losses
from lmobj.errors import UserError
from lmobj.losses import LogitStats
from lmobj.losses._blocks import Blocks, choose_blocks

WIDTH = 8


class Case(NamedTuple):
    hidden: jax.Array
    table: jax.Array
    bias: jax.Array
    targets: jax.Array


def make_case(classes: int = 24, tokens: tuple[int, ...] = (3, 4), dtype: Any = jnp.float64, real: int = 0) -> Case:
    keys = jax.random.split(jax.random.key(classes), 4)
    return Case(
        jax.random.normal(keys[0], (*tokens, WIDTH), dtype),
        jax.random.normal(keys[1], (classes, WIDTH), dtype),
        jax.random.normal(keys[2], (classes,), dtype),
        jax.random.randint(keys[3], tokens, 0, real or classes),
    )


def full(
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    *,
    bias: jax.Array | None = None,
    soft_cap: float | None = None,
    vocab_mask: jax.Array | None = None,
    vocab_size: int | None = None,
) -> LogitStats:
    """The same by full logits; `test_logit_stats` checks these."""
    logits = hidden @ table.T
    if bias is not None:
        logits = logits + bias
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    return losses.logit_stats(logits, targets, vocab_mask=vocab_mask, vocab_size=vocab_size)


def weighted(stats: LogitStats) -> jax.Array:
    """A scalar in which each token and each statistic has a weight of its own, so that no gradient cancels."""
    tokens = stats.logsumexp.size
    weights = [1 + 0.1 * jnp.arange(tokens), 2 - 0.05 * jnp.arange(tokens), 0.01 * jnp.arange(tokens)]
    return sum(jnp.sum(x.reshape(-1) * w) for x, w in zip(stats[:3], weights, strict=True))


def assert_same(case: Case, block_size: int | None, *, bias: bool = True, **settings: Any) -> None:
    """Statistics and gradients agree with full logits to 1e-10."""

    def run(function: Any, hidden: jax.Array, table: jax.Array, bias_: jax.Array) -> tuple[Any, Any]:
        def scalar(*arrays: jax.Array) -> tuple[jax.Array, LogitStats]:
            stats = function(arrays[0], arrays[1], case.targets, bias=arrays[2] if bias else None, **settings)
            return weighted(stats), stats

        (_, stats), grads = jax.value_and_grad(scalar, argnums=(0, 1, 2), has_aux=True)(hidden, table, bias_)
        return stats, grads

    arrays = (case.hidden, case.table, case.bias)
    blockwise = functools.partial(losses.linear_logit_stats, block_size=block_size)
    stats, grads = jax.jit(functools.partial(run, blockwise))(*arrays)
    expected, expected_grads = jax.jit(functools.partial(run, full))(*arrays)
    for name, x, y in zip(stats._fields, stats, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10, err_msg=name)
    for name, x, y in zip(("hidden", "table", "bias"), grads, expected_grads, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-10, err_msg=f"gradient of {name}")


@pytest.mark.parametrize(
    ("classes", "block_size"),
    [
        (24, 1),
        (24, 4),
        (24, 5),  # blocks of 4: 5 divides nothing
        (24, 24),  # one block, whose logits are kept
        (24, 100),
        (24, None),
        (37, 16),  # a prime: runs of rows, the last two overlap
        (94, 24),  # 2 * 47: the same
        (94, 47),
    ],
)
def test_any_block_size_gives_what_full_logits_give(classes: int, block_size: int | None) -> None:
    with jax.enable_x64(True):
        assert_same(make_case(classes), block_size)


@pytest.mark.parametrize("block_size", [6, 24])
@pytest.mark.parametrize(
    "settings",
    [
        {"bias": False},
        {"soft_cap": 2.0},
        {"vocab_size": 19},
        {"vocab_mask": True},
        {"vocab_size": 21, "vocab_mask": True, "soft_cap": 2.0},
    ],
    ids=str,
)
def test_settings_give_what_full_logits_give(settings: dict[str, Any], block_size: int) -> None:
    with jax.enable_x64(True):
        case = make_case(real=settings.get("vocab_size", 0))
        if "vocab_mask" in settings:
            # The targets exist, and of the others every third does not.
            exists = (jnp.arange(24) % 3 != 1).at[case.targets].set(True)
            assert not exists.all()
            settings = settings | {"vocab_mask": exists}
        assert_same(case, block_size, **settings)


def test_settings_in_overlapping_blocks() -> None:
    with jax.enable_x64(True):
        exists = jnp.arange(37) % 4 != 3
        case = make_case(37)
        case = case._replace(targets=case.targets // 4 * 4)
        assert_same(case, 16, vocab_size=36, vocab_mask=exists, soft_cap=3.0)


@pytest.mark.parametrize(
    ("size", "block_size", "expected"),
    [
        (100, 100, Blocks(100, 100, 1, strided=True)),
        (131072, 4096, Blocks(131072, 4096, 32, strided=True)),
        # Widths up to 4096 that divide 128000 = 2^10 * 5^3 and are multiples of 128: 3200 is the widest.
        (128000, 4096, Blocks(128000, 3200, 40, strided=True)),
        # 50304 = 2^7 * 3 * 131: in range, 2096 = 2^4 * 131 has the most twos; 3144 = 2^3 * 3 * 131 is wider.
        (50304, 4096, Blocks(50304, 2096, 24, strided=True)),
        # 30522 = 2 * 3 * 5087: nothing from 512 to 4096 divides it; eight runs of 3816 reach 30528.
        (30522, 4096, Blocks(30522, 3816, 8, strided=False)),
        (37, 16, Blocks(37, 13, 3, strided=False)),
    ],
)
def test_choice_of_blocks(size: int, block_size: int, expected: Blocks) -> None:
    blocks = choose_blocks(size, block_size)
    assert blocks == expected
    fresh = [blocks.rows(b)[blocks.fresh(b)] for b in jnp.arange(min(blocks.count, 8))]
    if blocks.count <= 8:
        np.testing.assert_array_equal(np.sort(np.concatenate(fresh)), np.arange(size))
    elif blocks.strided:
        np.testing.assert_array_equal(fresh[3], 3 + blocks.count * np.arange(blocks.width))


def test_finite_differences() -> None:
    with jax.enable_x64(True):
        case = make_case(12, (3,))

        def stats(hidden: jax.Array, table: jax.Array, bias: jax.Array) -> tuple[jax.Array, ...]:
            return losses.linear_logit_stats(
                hidden, table, case.targets, bias=bias, soft_cap=5.0, vocab_size=11, block_size=4
            )[:3]

        case = case._replace(targets=jnp.minimum(case.targets, 10))
        check_grads(jax.jit(stats), (case.hidden, case.table, case.bias), order=1, modes=["rev"])


def test_masked_equals_subset() -> None:
    with jax.enable_x64(True):
        case = make_case(real=12)
        keep = np.flatnonzero(np.arange(24) % 2 == 0)
        exists = jnp.zeros(24, bool).at[keep].set(True)

        def nll(hidden: jax.Array, table: jax.Array, bias: jax.Array, **settings: Any) -> tuple[jax.Array, jax.Array]:
            nll = losses.linear_token_nll(
                hidden, table, settings.pop("targets"), bias=bias, label_smoothing=0.1, z_loss=0.1, **settings
            )
            return nll.sum(), nll

        masked = functools.partial(nll, targets=case.targets * 2, vocab_mask=exists, block_size=6)
        subset = functools.partial(nll, targets=case.targets, block_size=4)
        fewer = (case.hidden, case.table[keep], case.bias[keep])
        (grads, got), (expected_grads, expected) = (
            jax.jit(jax.grad(f, argnums=(0, 1, 2), has_aux=True))(*arrays)
            for f, arrays in ((masked, (case.hidden, case.table, case.bias)), (subset, fewer))
        )
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        np.testing.assert_allclose(grads[0], expected_grads[0], atol=1e-12)
        for grad, expected_grad in zip(grads[1:], expected_grads[1:], strict=True):
            np.testing.assert_allclose(grad[keep], expected_grad, atol=1e-12)
            assert not np.delete(grad, keep, axis=0).any()


def test_padding_of_the_table_is_never_seen() -> None:
    with jax.enable_x64(True):
        case = make_case(20)

        def loss(table: jax.Array, **settings: Any) -> jax.Array:
            return jnp.sum(losses.linear_token_nll(case.hidden, table, case.targets, **settings))

        run = jax.jit(jax.value_and_grad(functools.partial(loss, vocab_size=20, label_smoothing=0.1, block_size=8)))
        expected, expected_grad = jax.jit(jax.value_and_grad(functools.partial(loss, label_smoothing=0.1)))(case.table)
        for garbage in (0.0, 1e3, math.inf, math.nan):
            value, grad = run(jnp.concatenate([case.table, jnp.full((12, WIDTH), garbage)]))
            np.testing.assert_allclose(value, expected, rtol=1e-13)
            np.testing.assert_allclose(grad[:20], expected_grad, atol=1e-12)
            np.testing.assert_array_equal(grad[20:], 0)


def test_compositions() -> None:
    with jax.enable_x64(True):
        case = make_case()
        arrays = (case.hidden, case.table, case.targets)
        settings = [{}, {"label_smoothing": 0.1}, {"offtarget_smoothing": 0.1}, {"z_loss": 1e-2}]

        @jax.jit
        def blockwise(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> list[jax.Array]:
            nll = functools.partial(losses.linear_token_nll, bias=case.bias, soft_cap=4.0, block_size=6)
            return [nll(hidden, table, targets, **x) for x in settings]

        stats = full(*arrays, bias=case.bias, soft_cap=4.0)
        expected = [
            losses.nll(stats),
            losses.label_smoothed_nll(stats, epsilon=0.1, num_classes=24),
            losses.offtarget_smoothed_nll(stats, epsilon=0.1, num_classes=24),
            losses.nll(stats) + 1e-2 * losses.z_loss(stats),
        ]
        for x, y in zip(blockwise(*arrays), expected, strict=True):
            assert x.shape == case.targets.shape
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_the_classes_of_smoothing_are_those_that_exist() -> None:
    with jax.enable_x64(True):
        case = make_case(real=1)
        exists = jnp.arange(24) < 8
        nll = functools.partial(losses.linear_token_nll, vocab_mask=exists, vocab_size=6, label_smoothing=0.3)
        got = jax.jit(nll)(case.hidden, case.table, case.targets)
        stats = full(case.hidden, case.table[:6], case.targets)
        np.testing.assert_allclose(got, losses.label_smoothed_nll(stats, epsilon=0.3, num_classes=6), rtol=1e-12)


def test_correct_is_argmax() -> None:
    case = make_case(64, (64,), jnp.float32)
    best = jnp.argmax(jax.nn.tanh((case.hidden @ case.table.T + case.bias) / 3), axis=-1)
    targets = jnp.where(jnp.arange(64) % 2 == 0, best, (best + 1) % 64)
    for block_size in (8, 64):
        stats = jax.jit(
            functools.partial(losses.linear_logit_stats, bias=case.bias, soft_cap=3.0, block_size=block_size)
        )(case.hidden, case.table, targets)
        np.testing.assert_array_equal(stats.correct, jnp.arange(64) % 2 == 0)


def test_max_logit_is_a_constant() -> None:
    case = make_case(dtype=jnp.float32)

    def top(hidden: jax.Array) -> jax.Array:
        return jnp.sum(losses.linear_logit_stats(hidden, case.table, case.targets).max_logit)

    assert not jax.jit(jax.grad(top))(case.hidden).any()


def test_a_target_that_does_not_exist() -> None:
    with jax.enable_x64(True):
        case = make_case()
        targets = jnp.array([-100, -1, 24, 20])[jnp.arange(12) % 4].reshape(3, 4)
        stats = jax.jit(functools.partial(losses.linear_logit_stats, vocab_size=20, block_size=6))(
            case.hidden, case.table, targets
        )
        assert jnp.isneginf(stats.target_logit).all()
        assert jnp.isposinf(losses.nll(stats)).all()
        assert not stats.correct.any()
        expected = full(case.hidden, case.table, case.targets, vocab_size=20)
        np.testing.assert_allclose(stats.logsumexp, expected.logsumexp, rtol=1e-12)


def test_no_class_at_all() -> None:
    case = make_case(dtype=jnp.float32)

    def loss(hidden: jax.Array) -> tuple[jax.Array, LogitStats]:
        stats = losses.linear_logit_stats(
            hidden, case.table, case.targets, vocab_mask=jnp.zeros(24, bool), block_size=6
        )
        return jnp.sum(stats.logsumexp), stats

    (_, stats), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(case.hidden)
    assert jnp.isneginf(stats.logsumexp).all()
    assert not stats.sum_logits.any()
    assert not grad.any()


def test_large_logits_do_not_overflow() -> None:
    case = make_case(dtype=jnp.float32)
    hidden = case.hidden * 1e4

    def logsumexp(hidden: jax.Array) -> jax.Array:
        return losses.linear_logit_stats(hidden, case.table, case.targets, block_size=6).logsumexp

    value, vjp = jax.vjp(jax.jit(logsumexp), hidden)
    np.testing.assert_allclose(value, full(hidden, case.table, case.targets).logsumexp, rtol=1e-6)
    assert jnp.isfinite(vjp(value)[0]).all()


def test_float32_is_exact_enough_over_many_tokens() -> None:
    # The figures that the measured size must reach: sums over tokens must not lose more with their number.
    with jax.enable_x64(True):
        case = make_case(32, (32768,))
        weights = jnp.arange(32768) % 7 + 1.0

        def nll(hidden: jax.Array, table: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
            stats = losses.linear_logit_stats(hidden, table, case.targets, bias=bias, block_size=8)
            return jnp.sum(losses.nll(stats) * weights.astype(hidden.dtype)), stats

        run = jax.jit(jax.grad(nll, argnums=(0, 1, 2), has_aux=True))
        arrays = tuple(x.astype(jnp.float32) for x in (case.hidden, case.table, case.bias))
        grads, stats = run(*arrays)
        expected_grads, expected = run(*(x.astype(jnp.float64) for x in arrays))
        assert stats.logsumexp.dtype == jnp.float32
        error = jnp.abs(losses.nll(stats) - losses.nll(expected)) / jnp.maximum(1, jnp.abs(expected.logsumexp))
        assert error.max() < 1e-6
        for x, y in zip(grads, expected_grads, strict=True):
            assert x.dtype == jnp.float32
            assert jnp.linalg.norm(x - y) < 2e-6 * jnp.linalg.norm(y)


def test_bfloat16() -> None:
    case = make_case(dtype=jnp.bfloat16)

    def nll(hidden: jax.Array, table: jax.Array, bias: jax.Array) -> jax.Array:
        return losses.linear_token_nll(hidden, table, case.targets, bias=bias, block_size=6)

    arrays = (case.hidden, case.table, case.bias)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    got = jax.jit(nll)(*arrays)
    assert got.dtype == jnp.float32
    # Products of bfloat16 numbers are exact in float32, and they add up in float32.
    np.testing.assert_allclose(got, jax.jit(nll)(*wide), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda *x: nll(*x).sum(), argnums=(0, 1, 2)))
    grads, expected = gradient(*arrays), gradient(*wide)
    for grad, array, reference in zip(grads, arrays, expected, strict=True):
        assert grad.dtype == array.dtype
        # d_logits and the result are rounded to 8 bits.
        difference = np.linalg.norm(np.asarray(grad, np.float32) - reference)
        assert difference < 2**-7 * np.linalg.norm(reference)


def test_mixed_types_take_the_wider() -> None:
    case = make_case(dtype=jnp.float32)
    hidden = case.hidden.astype(jnp.bfloat16)
    gradient = jax.jit(jax.grad(lambda h, t: losses.linear_token_nll(h, t, case.targets).sum(), argnums=(0, 1)))
    got, (_, expected) = gradient(hidden, case.table), gradient(hidden.astype(jnp.float32), case.table)
    assert (got[0].dtype, got[1].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(got[1], expected, rtol=1e-6)


def test_any_number_of_token_axes() -> None:
    case = make_case(dtype=jnp.float32)
    nll = jax.jit(losses.linear_token_nll)
    expected = nll(case.hidden, case.table, case.targets)
    flat = nll(case.hidden.reshape(12, WIDTH), case.table, case.targets.reshape(12))
    np.testing.assert_allclose(flat, expected.reshape(12), rtol=1e-6)
    one = nll(case.hidden[1, 2], case.table, case.targets[1, 2])
    np.testing.assert_allclose(one, expected[1, 2], rtol=1e-6)
    for rows, columns in ((3, 0), (0, 4)):
        assert nll(case.hidden[:rows, :columns], case.table, case.targets[:rows, :columns]).shape == (rows, columns)


@pytest.mark.parametrize("block_size", [6, 24])
def test_vmap(block_size: int) -> None:
    with jax.enable_x64(True):
        case = make_case()
        tables = jnp.stack([case.table, case.table[::-1] * 0.5, case.table**2])

        def value_and_grads(hidden: jax.Array, table: jax.Array, targets: jax.Array) -> Any:
            def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
                return losses.linear_token_nll(hidden, table, targets, bias=case.bias, block_size=block_size).sum()

            return jax.value_and_grad(loss, argnums=(0, 1))(hidden, table)

        single = jax.jit(value_and_grads)
        for axes, arrays in (
            ((0, None, 0), (case.hidden, case.table, case.targets)),
            ((None, 0, None), (case.hidden, tables, case.targets)),
        ):
            got = jax.jit(jax.vmap(value_and_grads, in_axes=axes))(*arrays)
            for i in range(3):
                parts = [x[i] if axis == 0 else x for x, axis in zip(arrays, axes, strict=True)]
                for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(single(*parts)), strict=True):
                    np.testing.assert_allclose(x[i], y, rtol=1e-11, atol=1e-11)


def test_no_array_holds_all_logits() -> None:
    # 96 tokens and 640 classes are sizes that appear together only in full logits.
    case = make_case(640, (96,), jnp.float32)

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return losses.linear_token_nll(hidden, table, case.targets, block_size=64).sum()

    blockwise = str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(case.hidden, case.table))
    naive = str(jax.make_jaxpr(lambda h, t: losses.nll(full(h, t, case.targets)))(case.hidden, case.table))
    assert "f32[96,640]" in naive
    sizes = [math.prod(map(int, dims.split(","))) for dims in _float_shapes(blockwise)]
    # The largest are the table and its gradient; a block's logits are 96 x 64.
    assert max(sizes) == 96 * 64


def _float_shapes(text: str) -> list[str]:
    return [part.split("]")[0] for part in text.split("f32[")[1:] if not part.startswith("]")]


def test_memory_of_the_gradient_is_a_few_blocks() -> None:
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((512, 64), (8192, 64), (8192,))]
    targets = jax.ShapeDtypeStruct((512,), jnp.int32)

    def temp(function: Any) -> int:
        run = jax.jit(jax.value_and_grad(lambda h, t, b, y: function(h, t, b, y).sum(), argnums=(0, 1, 2)))
        return int(run.lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes)

    blockwise = temp(lambda h, t, b, y: losses.linear_token_nll(h, t, y, bias=b, block_size=128))
    naive = temp(lambda h, t, b, y: losses.token_nll(h @ t.T + b, y))
    # 64 blocks of 512 x 128 logits, three of which may live at once, beside copies of small arrays.
    assert blockwise <= 0.06 * naive


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": jnp.zeros((3, 4, 7))}, r"hidden \(3, 4, 7\) and table \(24, 8\)"),
        ({"targets": jnp.zeros((3,), jnp.int32)}, r"integers of shape \(3, 4\), not int32\[3\]"),
        ({"targets": jnp.zeros((3, 4))}, "not float32"),
        ({"bias": jnp.zeros(7)}, r"bias must have shape \(24,\)"),
        ({"vocab_mask": jnp.ones(24)}, r"vocab_mask must be bool\[24\]"),
        ({"vocab_size": 25}, "vocab_size is 25; the table has 24 rows"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"soft_cap": 0.0}, r"soft_cap is 0\.0; it must be above 0"),
        ({"block_size": 0}, "block_size is 0; it must be at least 1"),
        ({"label_smoothing": 0.1, "offtarget_smoothing": 0.2}, r"label_smoothing is 0\.1"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    case = make_case(dtype=jnp.float32)
    arguments = {"hidden": case.hidden, "table": case.table, "targets": case.targets} | change
    with pytest.raises(UserError, match=message):
        losses.linear_token_nll(**arguments)
