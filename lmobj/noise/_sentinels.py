"""Inputs and targets of a corrupted row: each span that one of the two lacks is marked by a sentinel.

    text     Thank you for inviting me to your party last week      noise: for inviting; last
    inputs   Thank you <0> me to your party <1> week
    targets  <0> for inviting <1> last <2>

Sentinel k has the id first_sentinel - k. As in the authors' code, and unlike the paper's figure 2, the targets mark
every run that is no noise: they begin with <0> if the text begins without noise, and have a closing sentinel only if it
ends without, which it never does after `noise_spans`.

Source: Raffel et al. 2020, section 3.1.4; `noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel` of the
authors' `preprocessors.py`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int
from numpy.typing import ArrayLike

from lmobj.errors import UserError

__all__ = ["Denoised", "join_spans", "prefix_inputs_targets", "sentinel_inputs_targets"]


class Denoised(NamedTuple):
    """What the encoder reads and what the decoder is to write; 0 after their ends."""

    inputs: Int[Array, " I"]
    input_length: Int[Array, ""]
    """Tokens of `inputs`, the end token included; int32."""
    targets: Int[Array, " T"]
    target_length: Int[Array, ""]
    """Tokens of `targets`, the end token included; int32. 0 with `input_length` 0 for a row to leave out."""


def sentinel_inputs_targets(
    tokens: Int[Array, " L"],
    noise: Bool[Array, " L"],
    length: Int[Array, ""] | int,
    *,
    first_sentinel: int,
    input_room: int,
    target_room: int,
    eos: int | None,
    num_sentinels: int | None = None,
) -> Denoised:
    """The row with a sentinel for each run of noise, and the noise with one for each run between.

    A row is left out, both lengths being 0, where it has fewer than 2 tokens, or does not fit: more tokens than there
    is room, or more sentinels than there are. It is never cut. A row without noise (`noise_tokens_iid`) stays in: its
    inputs are the text, its targets one sentinel.

    Args:
      tokens: the row.
      noise: True for noise.
      length: real tokens in the row.
      first_sentinel: id of sentinel 0, from which the others descend.
      input_room, target_room: I and T (static); `span_corruption_lengths` of the longest row cuts nothing.
      eos: the end token to append to both, or None.
      num_sentinels: how many ids are sentinels; None does not ask.

    Raises:
      UserError: more sentinels than ids down from `first_sentinel`.
    """
    if num_sentinels is not None and not 1 <= num_sentinels <= first_sentinel + 1:
        raise UserError(
            f"num_sentinels is {num_sentinels}, which descend from first_sentinel {first_sentinel}; accepted: 1 to "
            f"{first_sentinel + 1}."
        )
    real = jnp.arange(tokens.shape[0]) < length
    noise = noise & real
    inputs, seen, marks = _collapse(tokens, noise, real, first_sentinel, input_room, eos)
    targets, written, others = _collapse(tokens, real & ~noise, real, first_sentinel, target_room, eos)
    fits = (jnp.asarray(length) >= 2) & (seen <= input_room) & (written <= target_room)
    if num_sentinels is not None:
        fits &= jnp.maximum(marks, others) <= num_sentinels
    return _denoised(fits, inputs, seen, targets, written)


def prefix_inputs_targets(
    tokens: Int[Array, " L"],
    prefix_length: Int[Array, ""],
    length: Int[Array, ""] | int,
    *,
    input_room: int,
    target_room: int,
    eos: int | None,
) -> Denoised:
    """The first `prefix_length` tokens and the rest, without sentinels; the other arguments, and which rows are left
    out, as in `sentinel_inputs_targets`."""
    at = jnp.arange(tokens.shape[0], dtype=jnp.int32)
    inputs, seen = _place(tokens, at < jnp.minimum(prefix_length, length), input_room, eos)
    targets, written = _place(tokens, (at >= prefix_length) & (at < length), target_room, eos)
    fits = (jnp.asarray(length) >= 2) & (seen <= input_room) & (written <= target_room)
    return _denoised(fits, inputs, seen, targets, written)


def join_spans(inputs: ArrayLike, targets: ArrayLike, first_sentinel: int, count: int) -> np.ndarray:
    """The text that `sentinel_inputs_targets` made `inputs` and `targets` of, both without padding and end token.

    Args:
      inputs, targets: token ids.
      first_sentinel, count: the ids first_sentinel - count + 1 .. first_sentinel are sentinels, and stand for nothing
        else in the text.

    Raises:
      UserError: the two do not belong together.
    """
    sentinels = range(first_sentinel, first_sentinel - count, -1)
    parts = {}
    for name, ids in (("inputs", np.asarray(inputs).tolist()), ("targets", np.asarray(targets).tolist())):
        marks = [token for token in ids if token in sentinels]
        if marks != [*sentinels[: len(marks)]]:
            raise UserError(f"The sentinels of the {name} are {marks}; they must descend from {first_sentinel}.")
        runs = [[*run] for mark, run in itertools.groupby(ids, lambda token: token in sentinels) if not mark]
        parts[name] = runs, len(marks), ids[:1] == [first_sentinel]
    (clean, holes, noisy_start), (noise, gaps, clean_start) = parts["inputs"], parts["targets"]
    if (len(noise), len(clean)) != (holes, gaps) or (noisy_start == clean_start and len(clean) + len(noise) > 0):
        raise UserError(
            f"The inputs have {len(clean)} runs of text and {holes} sentinels, and the targets {len(noise)} and "
            f"{gaps}; each run of one must have its sentinel in the other."
        )
    first, second = (noise, clean) if noisy_start else (clean, noise)
    text = [token for both in itertools.zip_longest(first, second) for run in both if run for token in run]
    return np.asarray(text, np.asarray(inputs).dtype)


def _collapse(
    tokens: Int[Array, " L"],
    hidden: Bool[Array, " L"],
    real: Bool[Array, " L"],
    first_sentinel: int,
    room: int,
    eos: int | None,
) -> tuple[Int[Array, " N"], Int[Array, ""], Int[Array, ""]]:
    """The row with a sentinel for each hidden run; its length, and the number of sentinels."""
    starts = hidden & ~jnp.pad(hidden[:-1], (1, 0))
    number = jnp.cumsum(starts, dtype=jnp.int32)
    marked = jnp.where(starts, (first_sentinel + 1 - number).astype(tokens.dtype), tokens)
    row, length = _place(marked, real & (starts | ~hidden), room, eos)
    return row, length, number[-1]


def _place(
    values: Int[Array, " L"], kept: Bool[Array, " L"], room: int, eos: int | None
) -> tuple[Int[Array, " N"], Int[Array, ""]]:
    """The values kept, moved together, and the end token after them; and how many these are, room or not."""
    rank = jnp.cumsum(kept, dtype=jnp.int32)
    row = jnp.zeros((room,), values.dtype).at[jnp.where(kept, rank - 1, room)].set(values, mode="drop")
    if eos is None:
        return row, rank[-1]
    return row.at[rank[-1]].set(jnp.asarray(eos, values.dtype), mode="drop"), rank[-1] + 1


def _denoised(
    fits: Bool[Array, ""],
    inputs: Int[Array, " I"],
    input_length: Int[Array, ""],
    targets: Int[Array, " T"],
    target_length: Int[Array, ""],
) -> Denoised:
    """The four, or nothing."""
    return Denoised(*(jnp.where(fits, x, jnp.zeros_like(x)) for x in (inputs, input_length, targets, target_length)))
