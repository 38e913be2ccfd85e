"""Sampling and greedy decoding, token by token over a cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj.errors import UserError
from lmobj.evaluate._cached import Generated, WritingModel, check_counts, extend, prefill
from lmobj.evaluate._logit_filters import min_p_filter, repetition_penalty, top_k_filter, top_p_filter
from lmobj.models import Cache

__all__ = ["SamplingConfig", "sample"]


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling from the model, or greedy decoding with temperature 0.

    The filters apply in the order of the fields: repetition penalty, temperature, top-k, top-p, min-p.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["sampling"] = "sampling"
    """Draw one token after the other."""
    max_new_tokens: int = 128
    """Most tokens to generate per sample, at least 1."""
    num_samples: int = 1
    """Samples per prompt, at least 1."""
    seed: int = 0
    """Seed of the draws; each (prompt, sample, token) has its own."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens seen before; above 0, 1: none."""
    temperature: float = 1.0
    """Divides the logits; at least 0, 0: always the most probable token."""
    top_k: int | None = None
    """Draw among the k most probable tokens only, at least 1; null: all."""
    top_p: float | None = None
    """Draw among the fewest most probable tokens with this much probability together, in (0, 1]; null: all."""
    min_p: float | None = None
    """Draw among tokens at least this many times as probable as the most probable one, in (0, 1]; null: all."""

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "num_samples", "top_k")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be a whole number of at most 64 bits, sign included.")
        for name in ("top_p", "min_p"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UserError(f"{name} is {share}; it must be above 0 and at most 1, or null.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be a number of at least 0 (0: greedy).")
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1: none).")


class _State(NamedTuple):
    """The loop's state after `step` new tokens."""

    step: Int[Array, ""]
    cache: Cache
    tokens: Int[Array, "B T"]
    log_probs: Float[Array, "B T"]
    lengths: Int[Array, " B"]
    ended: Bool[Array, " B"]
    seen: Bool[Array, "B V"] | None


def sample(
    model: WritingModel,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    *,
    settings: SamplingConfig,
    eos: int | None = None,
) -> Generated:
    """One continuation per row; jit-able with `settings` and `eos` static.

    Args:
      model: a causal model with a cache, or a decoder beside what it reads (`lmobj.evaluate.write_targets`).
      prompts: token ids, padded on the right.
      lengths: tokens of each prompt, at least 1.
      keys: one threefry key per row; token t is drawn with the key folded over t.
      settings: `num_samples` and `seed` are not read here.
      eos: the token that ends a row; None: every row has `max_new_tokens` tokens.

    Returns:
      Rows of `max_new_tokens` tokens. The loop stops when every row has ended.
    """
    rows, limit = prompts.shape[0], settings.max_new_tokens
    logits, cache = prefill(model, prompts, lengths, limit - 1)
    seen = None
    if settings.repetition_penalty != 1:
        # Padding is sent out of bounds, which drops it.
        ids = jnp.where(jnp.arange(prompts.shape[1]) < lengths[:, None], prompts, logits.shape[-1])
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(rows)[:, None], ids].set(True, mode="drop")

    def choose(state: _State, logits: Float[Array, "B V"]) -> _State:
        token = _draw(_adjust(logits, state.seen, settings), keys, state.step, settings)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        return _State(
            step=state.step + 1,
            cache=state.cache,
            tokens=state.tokens.at[:, state.step].set(jnp.where(state.ended, 0, token)),
            log_probs=state.log_probs.at[:, state.step].set(jnp.where(state.ended, 0, log_prob)),
            lengths=state.lengths + ~state.ended,
            ended=state.ended if eos is None else state.ended | (token == eos),
            seen=None if state.seen is None else state.seen.at[jnp.arange(rows), token].set(True),
        )

    def advance(state: _State) -> _State:
        last = state.step - 1
        positions = jnp.where(state.ended, -1, lengths + last)
        logits, cache = extend(model, state.tokens[:, last], state.cache, positions)
        return choose(state._replace(cache=cache), logits)

    state = _State(
        step=jnp.zeros((), jnp.int32),
        cache=cache,
        tokens=jnp.zeros((rows, limit), jnp.int32),
        log_probs=jnp.zeros((rows, limit), logits.dtype),
        lengths=jnp.zeros((rows,), jnp.int32),
        ended=jnp.zeros((rows,), bool),
        seen=seen,
    )
    state = jax.lax.while_loop(
        lambda state: (state.step < limit) & ~jnp.all(state.ended), advance, choose(state, logits)
    )
    return Generated(state.tokens, state.log_probs, state.lengths, jnp.sum(state.log_probs, axis=1))


def _adjust(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, settings: SamplingConfig
) -> Float[Array, "B V"]:
    """Logits after penalty, temperature and filters."""
    if seen is not None:
        logits = repetition_penalty(logits, seen, settings.repetition_penalty)
    if settings.temperature == 0:
        return logits
    # Subtracting the maximum first keeps the quotient finite at the top for any temperature.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / settings.temperature
    if settings.top_k is not None:
        logits = top_k_filter(logits, settings.top_k)
    if settings.top_p is not None:
        logits = top_p_filter(logits, settings.top_p)
    if settings.min_p is not None:
        logits = min_p_filter(logits, settings.min_p)
    return logits


def _draw(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], step: Int[Array, ""], settings: SamplingConfig
) -> Int[Array, " B"]:
    """One token per row: the most probable at temperature 0, else drawn with the row's key for this step."""
    if settings.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(key: Key[Array, ""], row: Float[Array, " V"]) -> Int[Array, ""]:
        return jax.random.categorical(jax.random.fold_in(key, step), row).astype(jnp.int32)

    return jax.vmap(draw)(keys, logits)
