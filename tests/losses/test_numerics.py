"""Every public loss in numbers of 16, 32 and 64 bits, beside its plain formula in numbers of 50 digits.

Inputs are random ones of four sizes, up to logits of some 10^4, and extremes: all equal, one far above or below the
rest, zeros, tiny vectors, vectors that coincide or are opposite, targets with probabilities of exactly 0 and logits of
-inf. A loss that becomes public needs a row in `ROWS`, or the first test fails:

    Row("huber_loss", ("scalars", "scalars"), plain.huber, {"delta": 0.5})

says what kinds of arrays it takes, its formula for one element, and settings that both get.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import plain_formulas as plain
import pytest
from loss_inputs import CLASSES, EXTREME, RANDOM, WIDTH, make_array
from mpmath import mpf

from lmobj import losses

_EPSILON = {"float32": 1e-6, "float64": 2e-15}
"""Allowed error in values, relative to the value and to the size of what it is made of: some 16 roundings."""
_GRADIENT_EPSILON = {"float32": 1e-5, "float64": 1e-13}


def _of_one(inputs: tuple[Any, ...]) -> float:
    """That of logarithms of probabilities and of cosines, however large logits and vectors are."""
    return 1


def _of_inputs(inputs: tuple[Any, ...]) -> float:
    """The largest finite number that goes in, at least 1: of losses that add such numbers up."""
    flat = np.concatenate([np.ravel(x) for x in inputs if x.dtype.kind == "f"])
    return max(1, float(np.max(np.abs(flat[np.isfinite(flat)]))))


def _of_squares(inputs: tuple[Any, ...]) -> float:
    return WIDTH * _of_inputs(inputs) ** 2


def _of_result(inputs: tuple[Any, ...]) -> float:
    """Errors relative to the result alone."""
    return 0


@dataclass(frozen=True)
class Row:
    """One loss beside its formula.

    name: in `losses`.
    kinds: of its arrays, see `loss_inputs.make_array`.
    formula: of one element's arguments and the settings, by mpmath.
    call: what gives the loss of the arrays, where it is not `losses.<name>` itself.
    size: of the numbers that the loss adds up, to which rounding errors are relative, besides the loss itself.
    slopes_hold_values: whether gradients are differences to the loss, p (log p - log q - KL), and as exact as that.
    """

    name: str
    kinds: tuple[str, ...]
    formula: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    call: Callable[..., Any] | None = None
    size: Callable[..., float] = _of_one
    slopes_hold_values: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])

    def loss(self, *arrays: jax.Array) -> jax.Array:
        call = getattr(losses, self.name) if self.call is None else self.call
        return call(*arrays, **self.settings)


def _on_stats(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """A loss of statistics as one of logits."""
    return lambda logits, targets, **settings: function(losses.logit_stats(logits, targets), **settings)


def _fields(function: Callable[..., losses.LogitStats]) -> Callable[..., jax.Array]:
    """Statistics side by side, without the highest logit, which passes no gradient back."""
    return lambda *arrays, **settings: jnp.stack(function(*arrays, **settings)[:3], axis=-1)


def _of_differences(similarity: jax.Array, targets: jax.Array, *, temperature: float) -> jax.Array:
    """What the statistics of similarities say beside the highest one, from which they count."""
    stats = losses.similarity_stats(similarity, targets, temperature=temperature)
    differences = [stats.logsumexp - stats.target_logit, stats.sum_logits - CLASSES * stats.target_logit]
    return jnp.stack(differences, axis=-1)


def _stats(logits: plain.Vector, target: int) -> list[mpf]:
    return [logits[target], plain.log_sum_exp(logits), mpmath.fsum(logits)]


def _similarity_stats(similarity: plain.Vector, target: int, temperature: float) -> list[mpf]:
    found, logsumexp, total = _stats([x / mpf(temperature) for x in similarity], target)
    return [logsumexp - found, total - CLASSES * found]


def _offtarget(logits: plain.Vector, target: int, epsilon: float, num_classes: int) -> mpf:
    return plain.smoothed(logits, target, 1 - mpf(epsilon), mpf(epsilon) / (num_classes - 1))


def _label_smoothed(logits: plain.Vector, target: int, epsilon: float, num_classes: int) -> mpf:
    low = mpf(epsilon) / num_classes
    return plain.smoothed(logits, target, 1 - mpf(epsilon) + low, low)


def _linear_loss(hidden: plain.Vector, table: Any, target: int, soft_cap: float, z_loss: float) -> mpf:
    logits = plain.through_table(hidden, table, cap=soft_cap)
    return plain.nll(logits, target) + mpf(z_loss) * plain.log_sum_exp(logits) ** 2


def _triplet(measure: Callable[..., mpf]) -> Callable[..., mpf]:
    return lambda a, p, n, margin: plain.hinge(measure(a, p), measure(a, n), margin)


def _pair(measure: Callable[..., mpf]) -> Callable[..., mpf]:
    return lambda a, b, similar, margin: plain.contrastive(measure(a, b), similar, margin)


def _cosine_embedding(a: plain.Vector, b: plain.Vector, similar: bool, margin: float) -> mpf:
    return 1 - plain.cosine(a, b) if similar else max(mpf(0), plain.cosine(a, b) - mpf(margin))


def _cosine_distance(a: plain.Vector, b: plain.Vector) -> mpf:
    return 1 - plain.cosine(a, b)


def _squared_distance(a: plain.Vector, b: plain.Vector) -> mpf:
    return plain.distance(a, b) ** 2


def _forward_kl(s: plain.Vector, t: plain.Vector, temperature: float) -> mpf:
    return plain.kl(plain.softmax(t, temperature), plain.softmax(s, temperature))


def _jensen_shannon(s: plain.Vector, t: plain.Vector, beta: float, temperature: float) -> mpf:
    return plain.jensen_shannon(plain.softmax(s, temperature), plain.softmax(t, temperature), beta)


_CLASS, _TRIPLE, _TWO = ("logits", "classes"), ("vectors",) * 3, ("vectors",) * 2
_EPS = {"epsilon": 0.1, "num_classes": CLASSES}

ROWS = [
    Row("token_nll", _CLASS, plain.nll),
    Row("logit_stats", _CLASS, _stats, call=_fields(losses.logit_stats), size=_of_inputs),
    Row("nll", _CLASS, plain.nll, call=_on_stats(losses.nll), size=_of_inputs),
    Row("label_smoothed_nll", _CLASS, _label_smoothed, _EPS, _on_stats(losses.label_smoothed_nll), size=_of_inputs),
    Row("offtarget_smoothed_nll", _CLASS, _offtarget, _EPS, _on_stats(losses.offtarget_smoothed_nll), size=_of_inputs),
    Row("z_loss", _CLASS, lambda x, t: plain.log_sum_exp(x) ** 2, call=_on_stats(losses.z_loss), size=_of_inputs),
    Row("linear_token_nll", ("hidden", "table", "classes"), _linear_loss, {"soft_cap": 50.0, "z_loss": 0.01},
        size=_of_inputs),
    Row(
        "linear_logit_stats",
        ("hidden", "table", "classes"),
        lambda x, table, t, block_size: _stats(plain.through_table(x, table), t),
        {"block_size": 2},
        _fields(losses.linear_logit_stats),
        _of_inputs,
    ),
    Row("binary_nll", ("scalars", "labels"), plain.binary_nll),
    Row("binary_focal_loss", ("scalars", "labels"), plain.binary_focal, {"gamma": 2.0, "alpha": 0.25}),
    Row("binary_focal_loss", ("scalars", "labels"), plain.binary_focal, {"gamma": 0.5, "alpha": None}),
    Row("focal_loss", _CLASS, plain.focal, {"gamma": 2.0}),
    Row("focal_loss", _CLASS, plain.focal, {"gamma": 0.5}),
    Row("focal_loss", _CLASS, plain.focal, {"gamma": 0}),
    Row("squared_error", ("scalars", "scalars"), lambda x, y: (x - y) ** 2, size=_of_result),
    Row("huber_loss", ("scalars", "scalars"), plain.huber, {"delta": 0.5}, size=_of_result),
    Row("soft_target_nll", ("logits", "probabilities"), lambda x, q: plain.cross_entropy(q, plain.softmax(x))),
    Row("forward_kl", ("logits", "support"), _forward_kl, {"temperature": 2.0}, slopes_hold_values=True),
    Row("reverse_kl", ("support", "logits"), lambda s, t, **x: _forward_kl(t, s, **x), {"temperature": 0.3},
        slopes_hold_values=True),
    Row("jensen_shannon", ("logits", "support"), _jensen_shannon, {"beta": 0.5, "temperature": 1.0}),
    Row("jensen_shannon", ("support", "logits"), _jensen_shannon, {"beta": 0.9, "temperature": 0.3}),
    Row("info_nce", ("logits", "classes"), lambda s, t, temperature: plain.info_nce(s, t, None, temperature),
        {"temperature": 0.05}),
    Row("info_nce", ("logits", "classes", "candidates"), lambda s, t, c: plain.info_nce(s, t, c, 1),
        call=lambda s, t, c: losses.info_nce(s, t, candidates=c)),
    Row("similarity_stats", _CLASS, _similarity_stats, {"temperature": 0.05}, _of_differences),
    Row("euclidean_contrastive_loss", (*_TWO, "bits"), _pair(plain.distance), {"margin": 2.0}),
    Row("cosine_contrastive_loss", (*_TWO, "bits"), _pair(_cosine_distance), {"margin": 0.5}),
    Row("cosine_embedding_loss", (*_TWO, "bits"), _cosine_embedding, {"margin": -0.3}),
    Row("margin_ranking_loss", ("scalars", "scalars"), lambda x, y, margin: plain.hinge(y, x, margin), {"margin": 0.5},
        size=_of_inputs),
    Row("cosine_triplet_loss", _TRIPLE, _triplet(_cosine_distance), {"margin": 0.5}),
    Row("euclidean_triplet_loss", _TRIPLE, _triplet(plain.distance), {"margin": 0.5}, size=_of_inputs),
    Row("squared_euclidean_triplet_loss", _TRIPLE, _triplet(_squared_distance), {"margin": 0.5}, size=_of_squares),
    Row("unit_vectors", ("vectors",), plain.unit_vector, size=_of_result),
    Row("cosine_similarity", _TWO, plain.cosine),
    Row("cosine_distance", _TWO, _cosine_distance),
    Row("euclidean_distance", _TWO, plain.distance, size=_of_result),
]  # fmt: skip

NO_LOSS = {
    "LogitStats": "what `logit_stats` gives",
    "linear_gumbel_sample": "draws classes",
    "offtarget_smoothing_entropy": "a number made of two numbers; its own test is below",
}


def _arrays(row: Row, dtype: str = "float32") -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(len(row.name))
    arrays = [make_array(kind, place, rng) for place, kind in enumerate(row.kinds)]
    return tuple(x.astype(dtype) if x.dtype == np.float32 else x for x in arrays)


def _floats(arrays: tuple[Any, ...]) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating))


def _run(row: Row, arrays: tuple[Any, ...]) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Values, gradients of their sum, and gradients where all have a weight of 0."""
    places = _floats(arrays)

    @jax.jit
    def all_of_it(*arrays: jax.Array) -> Any:
        def of_floats(*floats: jax.Array) -> jax.Array:
            given = dict(zip(places, floats, strict=True))
            return row.loss(*(given.get(i, x) for i, x in enumerate(arrays)))

        def unweighted(*floats: jax.Array) -> jax.Array:
            weights = jnp.zeros(())
            return jnp.sum(of_floats(*floats) * weights) / jnp.maximum(weights, 1)

        value, back = jax.vjp(of_floats, *(arrays[i] for i in places))
        masked, masked_back = jax.vjp(unweighted, *(arrays[i] for i in places))
        return value, back(jnp.ones_like(value)), (masked, *masked_back(jnp.ones_like(masked)))

    value, gradients, masked = all_of_it(*map(jnp.asarray, arrays))
    return np.asarray(value), [np.asarray(g) for g in gradients], [np.asarray(g) for g in masked]


def _elements(row: Row, arrays: tuple[np.ndarray, ...]) -> list[tuple[np.ndarray, ...]]:
    """The arguments of each element of the loss."""
    return [
        tuple(x if kind == "table" else x[n] for kind, x in zip(row.kinds, arrays, strict=True))
        for n in range(RANDOM + EXTREME)
    ]


def _exact(x: np.ndarray) -> Any:
    """The same numbers, and lists of them, in mpmath's precision; integers and booleans as Python's."""
    if np.ndim(x):
        return [_exact(each) for each in x]
    return mpf(float(x)) if np.asarray(x).dtype.kind == "f" else x.item()


@functools.cache
def _expected(index: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Values [N, ...], gradients of their sums, and sizes [N] of a row by its formula.

    A gradient is NaN where there is none to compare: in a kink, and for a table.
    """
    row = ROWS[index]
    values, sizes = [], []
    arrays = _arrays(row)
    gradients = [np.full(arrays[i].shape, np.nan) for i in _floats(arrays)]
    for n, inputs in enumerate(_elements(row, arrays)):
        exact = [_exact(x) for x in inputs]
        value = row.formula(*exact, **row.settings)
        values.append([float(x) for x in value] if isinstance(value, list) else float(value))
        sizes.append(row.size(inputs))
        for gradient, i in zip(gradients, _floats(arrays), strict=True):
            if row.kinds[i] != "table":
                gradient[n] = _slopes(row, exact, i)
    return np.asarray(values), gradients, np.asarray(sizes)


def _slopes(row: Row, exact: list[Any], place: int) -> Any:
    """The derivatives with respect to one argument, a number or a vector, by differences to the left and right.

    In a kink those two differ, and in a jump (the direction of a vector of zeros) those of two steps do.
    """

    def at(v: int | None, step: mpf) -> mpf:
        moved = list(exact)
        moved[place] = exact[place] + step if v is None else [x + step * (u == v) for u, x in enumerate(exact[place])]
        value = row.formula(*moved, **row.settings)
        return mpmath.fsum(value) if isinstance(value, list) else value

    def slope(v: int | None) -> float:
        if v is not None and mpmath.isinf(exact[place][v]):
            return 0.0
        middle = at(v, mpf(0))
        slopes = [(at(v, step) - middle) / step for step in map(mpf, ("1e-22", "-1e-22", "1e-25"))]
        largest = max(map(abs, slopes))
        smooth = max(slopes) - min(slopes) <= mpf("1e-10") * largest + mpf("1e-15")
        return float((slopes[0] + slopes[1]) / 2) if smooth else np.nan

    x = exact[place]
    return [slope(v) for v in range(len(x))] if isinstance(x, list) else slope(None)


def test_every_public_loss_has_a_row() -> None:
    named = {row.name for row in ROWS}
    assert named | set(NO_LOSS) == set(losses.__all__)
    assert not named & set(NO_LOSS)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("index", range(len(ROWS)), ids=lambda index: str(ROWS[index]))
def test_values_and_gradients(index: int, dtype: str) -> None:
    row = ROWS[index]
    arrays = _arrays(row, dtype)
    with jax.enable_x64(dtype == "float64"):
        value, gradients, masked = _run(row, arrays)
    assert value.dtype == dtype
    expected, slopes, sizes = _expected(index)
    sizes = sizes.reshape(-1, *[1] * (expected.ndim - 1))
    allowed = _EPSILON[dtype] * (np.abs(expected) + sizes)
    assert np.all(np.isfinite(expected))
    _assert_within(value, expected, allowed, "value")
    for place, gradient, slope, nothing in zip(_floats(arrays), gradients, slopes, masked[1:], strict=True):
        assert np.all(np.isfinite(gradient)), f"gradient of argument {place}: {gradient}"
        np.testing.assert_array_equal(nothing, np.zeros_like(gradient))
        steep = np.nanmax(np.abs(slope), axis=tuple(range(1, slope.ndim)), keepdims=True, initial=0)
        if row.slopes_hold_values:
            steep = np.maximum(steep, np.abs(expected).reshape(steep.shape))
        allowed = _GRADIENT_EPSILON[dtype] * (np.abs(slope) + np.maximum(steep, 1))
        _assert_within(gradient, slope, allowed, f"gradient of argument {place}")
    assert masked[0] == 0


@pytest.mark.parametrize("index", range(len(ROWS)), ids=lambda index: str(ROWS[index]))
def test_bfloat16_is_computed_in_float32(index: int) -> None:
    """Values are those of the same numbers in 32 bits, and gradients those in 32 bits, rounded once.

    But with a table: there products take part in 16 bits on the way back, too, and gradients need only be finite.
    """
    row = ROWS[index]
    narrow = tuple(x.astype(jnp.bfloat16) if x.dtype == np.float32 else x for x in _arrays(row))
    wide = tuple(x.astype(np.float32) if x.dtype == jnp.bfloat16 else x for x in narrow)
    value, gradients, masked = _run(row, narrow)
    expected, wide_gradients, _ = _run(row, wide)
    assert value.dtype == np.float32
    sizes = np.asarray([row.size(x) for x in _elements(row, wide)])
    sizes = sizes.reshape(-1, *[1] * (value.ndim - 1))
    _assert_within(value, expected, 2 * _EPSILON["float32"] * (np.abs(expected) + sizes), "value")
    for gradient, wide_gradient, nothing in zip(gradients, wide_gradients, masked[1:], strict=True):
        assert gradient.dtype == jnp.bfloat16
        np.testing.assert_array_equal(nothing.astype(np.float32), np.zeros(gradient.shape))
        assert np.all(np.isfinite(gradient.astype(np.float32)))
        if "table" not in row.kinds:
            np.testing.assert_allclose(gradient.astype(np.float32), wide_gradient, rtol=2**-8, atol=1e-6)


def _assert_within(found: np.ndarray, expected: np.ndarray, allowed: np.ndarray, what: str) -> None:
    """|found - expected| <= allowed, where something is expected."""
    assert found.shape == expected.shape
    wrong = ~(np.abs(found.astype(np.float64) - expected) <= allowed) & ~np.isnan(expected)
    assert not wrong.any(), (
        f"{what} at {np.argwhere(wrong).tolist()}: {found[wrong]}, not {expected[wrong]} within {allowed[wrong]}"
    )


@pytest.mark.parametrize("epsilon", [1e-30, 1e-3, 0.1, 0.5, 1 - 1e-12])
def test_offtarget_smoothing_entropy(epsilon: float) -> None:
    e = mpf(epsilon)
    expected = -(1 - e) * mpmath.log(1 - e) - e * mpmath.log(e / 9)
    found = losses.offtarget_smoothing_entropy(epsilon=epsilon, num_classes=10)
    assert found == pytest.approx(float(expected), rel=1e-14)
