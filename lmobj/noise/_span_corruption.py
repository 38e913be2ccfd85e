"""Span corruption: which tokens of a row are noise, for an encoder-decoder to reconstruct.

A row is `tokens [L]`, of which the first `length` are real. Noise is drawn in spans (`noise_spans`), token by token
(`noise_tokens_iid`) or as all that follows a prefix (`split_prefix`); `_sentinels` makes inputs and targets of it.

    n = clip(round(length * noise_density), 1, length - 1)      tokens of noise
    s = clip(round(n / mean_span), 1, min(n, length - n))       spans of noise, and as many of other tokens

Rates and mean spans may be Python numbers or traced float32 scalars. Each draw is one-dimensional over positions, so
padding a row further changes nothing.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
sections 3.1.4 and 3.3; `random_spans_helper`, `random_spans_noise_mask`, `iid_noise_mask` and
`random_prefix_noise_mask` of the authors' `preprocessors.py`.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.noise._counts import half_even
from lmobj.noise._masking import selection_scores

__all__ = [
    "noise_spans",
    "noise_tokens_iid",
    "raw_length_for",
    "shortest_prefix",
    "span_corruption_lengths",
    "split_prefix",
]


def span_corruption_lengths(length: int, noise_density: float, mean_span: float) -> tuple[int, int]:
    """The inputs and the targets of `length` raw tokens: (length - n + s + 1, n + s + 1), each with its end token.

    Raises:
      UserError: fewer than 2 tokens, a density not between 0 and 1, or a mean span below 1.
    """
    _check_spans(noise_density, mean_span)
    if length < 2:
        raise UserError(f"length is {length}; span corruption needs at least 2 tokens, one of noise and one to see.")
    noisy, spans = span_counts(length, noise_density, mean_span, np)
    return int(length - noisy + spans + 1), int(noisy + spans + 1)


def raw_length_for(length: int, noise_density: float, mean_span: float, *, joined: bool = False) -> int:
    """The most raw tokens whose corrupted inputs have `length`, or with `joined` inputs and targets together.

    512 inputs hold 568 raw tokens at density 0.15 and mean span 3, and 766 at 0.5. As in the authors' helper, density
    0.5 gives one token less where the targets would be longer than the inputs: 766 tokens have 512 targets, 767 have
    513.

    Raises:
      UserError: as `span_corruption_lengths`, or a length below what 2 raw tokens need: 3 of inputs, 6 in all.
    """
    _check_spans(noise_density, mean_span)
    least = 6 if joined else 3
    if length < least:
        text = (
            "two tokens, and a sentinel and the end token twice" if joined else "a token, a sentinel and the end token"
        )
        raise UserError(f"length is {length}; at least {least} are needed: {text}.")

    def fits(raw: int) -> bool:
        inputs, targets = span_corruption_lengths(raw, noise_density, mean_span)
        return inputs + targets * joined <= length

    low, high = 2, 4  # neither shrinks with the raw tokens
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    inputs, targets = span_corruption_lengths(low, noise_density, mean_span)
    return low - 1 if not joined and noise_density == 0.5 and targets > inputs and low > 2 else low


def noise_spans(
    key: Key[Array, ""],
    length: Int[Array, ""] | int,
    *,
    max_length: int,
    noise_density: Float[Array, ""] | float,
    mean_span: Float[Array, ""] | float,
) -> Bool[Array, " L"]:
    """True for noise: s spans of n tokens in all, each at least 1 long, and all such placements equally likely.

    The n tokens are divided into s spans, and the length - n others into s as well, each uniformly among all ways; they
    alternate, the first being no noise. So a row always begins without noise and ends in it. Rows of fewer than 2
    tokens have no noise.

    Deviation: s is at most the number of tokens that are no noise. The authors' code has no such bound and fails where
    that matters (10 tokens at density 0.9 and mean span 1: 9 spans between 1 other token).

    Args:
      key: the row's threefry key.
      length: real tokens in the row, 0 to `max_length`.
      max_length: L (static).
      noise_density: share of the tokens that are noise, between 0 and 1.
      mean_span: average tokens of a span, at least 1.

    Raises:
      UserError: a Python number out of range.
    """
    _check_spans(noise_density, mean_span)
    length = jnp.asarray(length, jnp.int32)
    noisy, spans = span_counts(jnp.maximum(length, 2), noise_density, mean_span, jnp)
    clean = jnp.maximum(length, 2) - noisy
    noise_key, clean_key = jax.random.split(key)
    span, _ = _divide(noise_key, noisy, spans, max_length)
    _, ends = _divide(clean_key, clean, spans, max_length)
    at = jnp.arange(max_length, dtype=jnp.int32)
    # The j-th token of noise comes after all j before it, and after what is clean up to its span.
    places = jnp.where((at < noisy) & (length >= 2), at + ends[span], max_length)
    return jnp.zeros((max_length,), bool).at[places].set(True, mode="drop")


def noise_tokens_iid(
    key: Key[Array, ""],
    length: Int[Array, ""] | int,
    *,
    max_length: int,
    noise_density: Float[Array, ""] | float,
) -> Bool[Array, " L"]:
    """True for noise: each of the first `length` tokens with probability `noise_density`; there may be none.

    Raises:
      UserError: a density that is a Python number and not between 0 and 1.
    """
    _check_spans(noise_density, 1.0)
    draws = jax.random.uniform(key, (max_length,), jnp.float32)
    return (draws < noise_density) & (jnp.arange(max_length) < length)


def split_prefix(
    key: Key[Array, ""], length: Int[Array, ""] | int, *, noise_density: Float[Array, ""] | float = 0.5
) -> Int[Array, ""]:
    """How many of `length` tokens are the prefix: uniform over max(1, round((1 - 2 d) (length - 1))) .. length - 1.

    So a share d of the tokens is predicted on average, for d up to 0.5, where the prefix is uniform over
    1 .. length - 1; UL2's S denoiser has d = 0.25. Rows of fewer than 2 tokens get 0.

    Raises:
      UserError: a density that is a Python number and not between 0 and 1.

    Source: Raffel et al. 2020, section 3.2.1; `random_prefix_noise_mask` of the authors' code for d = 0.5, the only one
    that it has. For other d the range is chosen so that its mean is as said.
    """
    _check_spans(noise_density, 1.0)
    most = jnp.asarray(length, jnp.int32) - 1
    least = _least_prefix(most, noise_density, jnp)
    drawn = jax.random.randint(key, (), least, jnp.maximum(most, least) + 1, jnp.int32)
    return jnp.where(most >= 1, drawn, 0)


def shortest_prefix(length: int, noise_density: float) -> int:
    """The least that `split_prefix` draws for `length` tokens.

    Raises:
      UserError: fewer than 2 tokens, or a density not between 0 and 1.
    """
    _check_spans(noise_density, 1.0)
    if length < 2:
        raise UserError(f"length is {length}; a prefix and what follows it are at least 2 tokens.")
    return int(_least_prefix(np.asarray(length - 1), noise_density, np))


def _least_prefix(most: Any, noise_density: Any, xp: types.ModuleType) -> Any:
    """Of at most `most` tokens, by `numpy` in float64 or by `jax.numpy` in float32, with the same outcome."""
    real = np.float64 if xp is np else jnp.float32
    share = xp.asarray(1, real) - 2 * xp.asarray(noise_density, real)
    return xp.clip(half_even(share * most.astype(real), xp), 1, xp.maximum(most, 1)).astype(np.int32)


def span_counts(length: Any, noise_density: Any, mean_span: Any, xp: types.ModuleType) -> tuple[Any, Any]:
    """(n, s) of at least 2 tokens, by `numpy` in float64 or by `jax.numpy` in float32, with the same outcome."""
    real = np.float64 if xp is np else jnp.float32
    size = xp.asarray(length, real)
    noisy = xp.clip(half_even(size * xp.asarray(noise_density, real), xp), 1, size - 1)
    spans = xp.clip(half_even(noisy / xp.asarray(mean_span, real), xp), 1, xp.minimum(noisy, size - noisy))
    return noisy.astype(np.int32), spans.astype(np.int32)


def _divide(
    key: Key[Array, ""], items: Int[Array, ""], parts: Int[Array, ""], max_length: int
) -> tuple[Int[Array, " L"], Int[Array, " L"]]:
    """`items` >= `parts` >= 1 items in a row, cut into that many non-empty parts, all ways equally likely.

    Returns:
      The part of each item, from 0; and how many items there are up to the end of each part.
    """
    at = jnp.arange(max_length, dtype=jnp.int32)
    # Of the items - 1 places between two items, parts - 1 are cut.
    order = jnp.argsort(selection_scores(key, at < items - 1))
    cut = jnp.zeros((max_length,), jnp.int32).at[order].set((at < parts - 1).astype(jnp.int32), unique_indices=True)
    before = jnp.cumsum(cut, dtype=jnp.int32)
    part = before - cut
    ends = jnp.full((max_length,), items, jnp.int32).at[jnp.where(cut > 0, part, max_length)].set(at + 1, mode="drop")
    return part, ends


def _check_spans(noise_density: Any, mean_span: Any) -> None:
    """Raises UserError for Python numbers that no row can satisfy; traced ones pass."""
    if isinstance(noise_density, float | int) and not 0.0 < noise_density < 1.0:
        raise UserError(f"noise_density is {noise_density}; it is the share of tokens to corrupt, above 0 and below 1.")
    if isinstance(mean_span, float | int) and not mean_span >= 1.0:
        raise UserError(f"mean_span is {mean_span}; it is the average number of tokens in a span, at least 1.")
