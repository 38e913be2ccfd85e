"""How probable a model of masked diffusion finds texts: a bound, estimated by predicting some of their tokens.

    -ln p(x) <= E_k E_S [ n / k * sum_{i in S} -ln p(x_i | x without S) ]    k even in 1 .. n, S any k of the n tokens

with p(x) of the model that unmasks the n tokens one after the other in random order. Under every order -ln p(x, order)
is a sum of n terms, and each term of its mean is that of a token next to be unmasked while k are hidden; p(x) is the
mean of p(x, order), and the logarithm of a mean is at least the mean of logarithms. It is an equation where the model
finds x as probable in every order. Tokens before those that are scored are never hidden: -ln p(x | prompt).

Nie et al. 2025, "Large Language Diffusion Models" (LLaDA), eq. 6 and algorithm 3; Ou et al. 2024, "Your Absorbing
Discrete Diffusion Secretly Models the Conditional Distributions of Clean Data", on random orders.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key
from numpy.typing import NDArray

from lmobj import losses, masks, noise
from lmobj.errors import UserError
from lmobj.evaluate._likelihood import ScoredText, batch_rows, row_shapes
from lmobj.models import LanguageModel

__all__ = ["DiffusionBounds", "diffusion_bounds"]

_MOST_SAMPLES = 2**20


class DiffusionBounds(NamedTuple):
    """Estimated upper bounds of -ln p of the scored tokens of R rows, in nats."""

    nats: NDArray[np.float64]
    """[R] means over the noised copies of each row."""
    errors: NDArray[np.float64]
    """[R] standard deviations of these means, at most: as if copies were masked independently of one another."""


def diffusion_bounds(
    model: LanguageModel,
    rows: Sequence[ScoredText],
    *,
    mask_id: int,
    samples: int = 128,
    seed: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> DiffusionBounds:
    """Bounds of -ln p of the scored tokens of each row given the tokens before them.

    Of each row `samples` copies are noised. How many tokens are masked is even in 1 .. n for each copy, and spread
    evenly over the copies: the bound's own mean, with less chance in it. The model reads a copy as one document, from
    both sides. Batches are of few distinct shapes, each of which is compiled once; no logits are stored.

    Args:
      model: reads each row under a bidirectional mask.
      rows: each with 0 <= start < its number of tokens.
      mask_id: what stands for a hidden token.
      samples: noised copies of a row, at least 2 (LLaDA: 128). A row of one scored token has but one, and no error.
      seed: of the noise, which depends on it and on the row's number.
      done: told after each batch how many rows are done.

    Raises:
      UserError: a row without a scored token, too few samples, rows longer than the model allows, or a model whose
        probabilities are not numbers.

    Source: LLaDA's evaluation, which spreads the counts over a batch in the same way. Deviation: [MASK] is no possible
    token here, as in MDLM and in `unmask`, so that the probabilities of all texts of a length add up to one.
    """
    for number, row in enumerate(rows):
        if not 0 <= row.start < len(row.tokens):
            raise UserError(
                f"row {number} has {len(row.tokens)} tokens, scored from {row.start}; accepted: at least one that is."
            )
    if not 2 <= samples <= _MOST_SAMPLES:
        raise UserError(f"samples is {samples}; accepted: 2 to {_MOST_SAMPLES} noised copies of each text.")
    graph, state = nnx.split(model)
    key = jax.random.key(seed, impl="threefry2x32")
    found = [np.zeros(samples if len(row.tokens) - row.start > 1 else 1) for row in rows]
    count = 0
    for numbers, length, places in row_shapes(model, [(len(row.tokens), len(row.tokens) - row.start) for row in rows]):
        copies = [(number, sample) for number in numbers for sample in range(len(found[number]))]
        size = batch_rows(length, len(copies))
        for first in range(0, len(copies), size):
            batch = copies[first : first + size]
            arrays = _batch(rows, batch, samples, size, length)
            values = np.asarray(_estimates(graph, state, key, *arrays, places, mask_id), np.float64)
            for (number, sample), value in zip(batch, values, strict=False):
                found[number][sample] = value
            count += sum(sample == len(found[number]) - 1 for number, sample in batch)
            done(count)
    if not all(np.isfinite(values).all() for values in found):
        raise UserError(
            "the model's probabilities are not finite numbers; accepted: weights of a run that went well, and texts "
            "without [MASK]."
        )
    errors = [np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0 for values in found]
    return DiffusionBounds(np.array([np.mean(values) for values in found]), np.array(errors))


def _batch(
    rows: Sequence[ScoredText], copies: Sequence[tuple[int, int]], samples: int, size: int, length: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Of each copy: tokens [size, length]; [size, 2] where the scored ones begin and end; [size, 2] its row's number
    and its own; [size] its part of the numbers from 0 to n - 1, which all copies of a row together cover."""
    tokens, bounds = np.zeros((size, length), np.int32), np.zeros((size, 2), np.int32)
    address, parts = np.zeros((size, 2), np.int32), np.zeros(size, np.int32)
    for i, (number, sample) in enumerate(copies):
        ids, start = rows[number]
        tokens[i, : len(ids)], bounds[i], address[i] = ids, (start, len(ids)), (number, sample)
        parts[i] = sample * (len(ids) - start) // samples
    return tokens, bounds, address, parts


@functools.partial(jax.jit, static_argnums=(0, 7, 8))
def _estimates(
    graph: nnx.GraphDef,
    state: nnx.State,
    key: Key[Array, ""],
    tokens: Int[Array, "B L"],
    bounds: Int[Array, "B 2"],
    address: Int[Array, "B 2"],
    parts: Int[Array, " B"],
    places: int,
    mask_id: int,
) -> Float[Array, " B"]:
    """n / k times the loss at the masked tokens of each copy."""
    model = nnx.merge(graph, state)
    index = jnp.arange(tokens.shape[1])
    start, end = bounds[:, :1], bounds[:, 1:]
    noised = jax.vmap(functools.partial(_noised, key, mask_id=mask_id))(
        tokens, (start <= index) & (index < end), address, parts
    )
    hidden = model.hidden(noised.tokens, mask=masks.bidirectional().packed((index < end).astype(jnp.int32)))
    where = jnp.minimum(start + jnp.arange(places), end - 1)  # the last one again, with weight 0
    weights = jnp.where(start + jnp.arange(places) < end, jnp.take_along_axis(noised.weights, where, axis=1), 0)
    head = model.head_table()
    nll = losses.linear_token_nll(
        model.head_hidden(jnp.take_along_axis(hidden, where[..., None], axis=1)),
        head.table,
        jnp.take_along_axis(tokens, where, axis=1),
        bias=head.bias,
        vocab_mask=jnp.arange(head.table.shape[0]) != mask_id,
        vocab_size=head.vocab_size,
        soft_cap=head.soft_cap,
    )
    return jnp.sum(jnp.where(weights > 0, nll, 0) * weights, axis=1)


def _noised(
    key: Key[Array, ""],
    tokens: Int[Array, " L"],
    candidates: Array,
    address: Int[Array, " 2"],
    part: Int[Array, ""],
    *,
    mask_id: int,
) -> noise.DiffusedTokens:
    """One copy of a row: its count is 1 + (a number of the row's own + the copy's part) mod n."""
    row, copy = address
    count_key, mask_key = jax.random.split(jax.random.fold_in(key, row))
    n = jnp.maximum(jnp.sum(candidates), 1)  # what fills up a batch has none
    count = 1 + (jax.random.randint(count_key, (), 0, n) + part) % n
    return noise.diffuse_count(jax.random.fold_in(mask_key, copy), tokens, candidates, count, mask_id=mask_id)
