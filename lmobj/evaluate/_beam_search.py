"""Beam search over a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmobj.errors import UserError
from lmobj.evaluate._cached import Generated, WritingModel, check_counts, extend, prefill
from lmobj.models import Cache

__all__ = ["BeamConfig", "beam_search"]


@dataclass(frozen=True)
class BeamConfig:
    """Beam search: the most probable continuations, by a search of limited width."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["beam"] = "beam"
    """Search for the most probable continuations."""
    max_new_tokens: int = 128
    """Most tokens to generate, at least 1; what is cut off here counts as a result too."""
    num_beams: int = 4
    """Continuations kept at each step, at least 1 (1: greedy)."""
    num_samples: int = 1
    """Best results returned per prompt, from 1 to `num_beams`."""
    length_penalty: float = 0.6
    """Exponent a of the divisor ((5 + length) / 6)^a of log-probabilities, at least 0 (0: none); larger, longer."""

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "num_beams")
        if not 1 <= self.num_samples <= self.num_beams:
            raise UserError(f"num_samples is {self.num_samples}; with beams it must be 1 .. {self.num_beams}.")
        if not 0 <= self.length_penalty < math.inf:
            raise UserError(f"length_penalty is {self.length_penalty}; it must be at least 0.")


class _Beams(NamedTuple):
    """The state after `step` new tokens: K open continuations per row, and the K best closed ones."""

    step: Int[Array, ""]
    cache: Cache
    tokens: Int[Array, "B K T"]
    log_probs: Float[Array, "B K T"]
    totals: Float[Array, "B K"]
    """Sums of log-probabilities; -inf where there is no continuation."""
    closed: Generated
    """[B, K], best first; score -inf where there is none."""


def beam_search(
    model: WritingModel,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    *,
    settings: BeamConfig,
    eos: int | None = None,
) -> Generated:
    """The best continuations of each row, best first; jit-able with `settings` and `eos` static.

    At each step the 2K best extensions of the K open continuations are formed; those that end with `eos` compete for
    the K closed ones by score, the best K others stay open. The score of y is ln p(y) / ((5 + |y|) / 6)^a, |y| with
    `eos` (Wu et al. 2016, eq. 14, without coverage). The search stops when no open continuation can beat the closed
    ones, or at `max_new_tokens`, where the open ones are closed as they are.

    Args:
      model: a causal model with a cache, or a decoder beside what it reads (`lmobj.evaluate.write_targets`).
      prompts: token ids, padded on the right.
      lengths: tokens of each prompt, at least 1.
      settings: width, length and penalty.
      eos: the token that closes a continuation; None: all have `max_new_tokens` tokens.

    Returns:
      Rows of [num_samples, max_new_tokens]. Where fewer continuations exist, the rest has length 0 and score -inf.
    """
    limit, beams = settings.max_new_tokens, settings.num_beams
    logits, cache = prefill(model, prompts, lengths, limit - 1)
    logits, cache = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), (logits, cache))
    starts = jnp.repeat(lengths, beams)

    def advance(state: _Beams) -> _Beams:
        last = state.step - 1
        logits, cache = extend(model, state.tokens[:, :, last].reshape(-1), state.cache, starts + last)
        return _expand(state._replace(cache=cache), logits, settings, eos)

    def is_open(state: _Beams) -> Array:
        # Totals only fall, and the divisor is largest at the limit: no open continuation will score above this.
        bound = state.totals[:, 0] / _divisor(limit, settings)
        return (state.step < limit) & ~jnp.all(bound <= state.closed.scores[:, -1])

    state = _expand(_start(logits, cache, prompts.shape[0], settings), logits, settings, eos)
    state = jax.lax.while_loop(is_open, advance, state)
    closed = _close_open(state, settings)
    return jax.tree.map(lambda x: x[:, : settings.num_samples], closed)


def _start(logits: Float[Array, "BK V"], cache: Cache, rows: int, settings: BeamConfig) -> _Beams:
    """One open, empty continuation per row."""
    shape = (rows, settings.num_beams, settings.max_new_tokens)
    tokens, log_probs = jnp.zeros(shape, jnp.int32), jnp.zeros(shape, logits.dtype)
    none = jnp.full(shape[:2], -jnp.inf, logits.dtype)
    closed = Generated(tokens, log_probs, jnp.zeros(shape[:2], jnp.int32), none)
    return _Beams(jnp.zeros((), jnp.int32), cache, tokens, log_probs, none.at[:, 0].set(0), closed)


def _expand(state: _Beams, logits: Float[Array, "BK V"], settings: BeamConfig, eos: int | None) -> _Beams:
    """Extends every open continuation by one token; `logits` are those after each of them."""
    rows, beams, _ = state.tokens.shape
    vocab = logits.shape[-1]
    token_log_probs = jax.nn.log_softmax(logits).reshape(rows, beams, vocab)
    extended = (state.totals[:, :, None] + token_log_probs).reshape(rows, -1)
    totals, index = jax.lax.top_k(extended, min(2 * beams, beams * vocab))
    parents, token = index // vocab, (index % vocab).astype(jnp.int32)
    log_prob = jnp.take_along_axis(token_log_probs.reshape(rows, -1), index, axis=1)
    tokens = _pick(state.tokens, parents).at[:, :, state.step].set(token)
    log_probs = _pick(state.log_probs, parents).at[:, :, state.step].set(log_prob)
    step = state.step + 1

    ends = jnp.zeros(token.shape, bool) if eos is None else token == eos
    scores = jnp.where(ends, totals / _divisor(step, settings), -jnp.inf)
    ended = Generated(tokens, log_probs, jnp.where(jnp.isfinite(scores), step, 0), scores)
    totals, best = jax.lax.top_k(jnp.where(ends, -jnp.inf, totals), beams)
    source = (jnp.arange(rows)[:, None] * beams + jnp.take_along_axis(parents, best, axis=1)).reshape(-1)
    return _Beams(
        step=step,
        cache=jax.tree.map(lambda x: x[source], state.cache),
        tokens=_pick(tokens, best),
        log_probs=_pick(log_probs, best),
        totals=totals,
        closed=_best(state.closed, ended),
    )


def _close_open(state: _Beams, settings: BeamConfig) -> Generated:
    """The best results, with what was still open at the limit.

    If the search stopped earlier, these scores are the bounds that did not beat the closed results, and do not now.
    """
    scores = state.totals / _divisor(settings.max_new_tokens, settings)
    lengths = jnp.where(jnp.isfinite(scores), state.step, 0)
    result = _best(state.closed, Generated(state.tokens, state.log_probs, lengths, scores))
    used = jnp.arange(settings.max_new_tokens) < result.lengths[..., None]
    return result._replace(tokens=jnp.where(used, result.tokens, 0), log_probs=jnp.where(used, result.log_probs, 0))


def _best(first: Generated, second: Generated) -> Generated:
    """The results with the highest scores of both, as many as there are in the first."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, second)
    _, index = jax.lax.top_k(both.scores, first.scores.shape[1])
    return jax.tree.map(lambda x: _pick(x, index), both)


def _pick(x: Array, index: Int[Array, "B M"]) -> Array:
    """x[b, index[b]]."""
    return jax.vmap(lambda row, i: row[i])(x, index)


def _divisor(length: Int[Array, ""] | int, settings: BeamConfig) -> Array | float:
    """((5 + length) / 6)^a of Wu et al. 2016."""
    return ((5.0 + length) / 6.0) ** settings.length_penalty
