"""Text by unmasking: [MASK]s after a prompt become tokens in rounds, by a model that was trained by masked diffusion.

    in each round, for every [MASK] of the block:
        x_i ~ softmax(logits_i / temperature), its confidence p_i = softmax(logits_i)[x_i]
        the `count` of them that come first, by confidence or at random, keep their token; the others stay [MASK]

Nie et al. 2025, "Large Language Diffusion Models" (LLaDA), section 2.4 and algorithms 4 and 5; Sahoo et al. 2024,
"Simple and Effective Masked Diffusion Language Models" (MDLM), section 4, whose ancestral sampling unmasks at random
and never changes what is unmasked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj import masks
from lmobj.errors import UserError
from lmobj.evaluate._cached import Generated, check_counts, output_logits
from lmobj.models import LanguageModel

__all__ = ["UnmaskingConfig", "unmask"]


@dataclass(frozen=True)
class UnmaskingConfig:
    """Unmasking in rounds, for models that were trained by masked diffusion."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["unmasking"] = "unmasking"
    """Unmask some tokens in each round."""
    max_new_tokens: int = 128
    """[MASK]s after the prompt, at least 1: the room that the text is given, an end of sequence included."""
    num_samples: int = 1
    """Samples per prompt, at least 1."""
    seed: int = 0
    """Seed of the draws; each (prompt, sample, round) has its own."""
    temperature: float = 1.0
    """Divides the logits; at least 0, 0: always the most probable token."""
    steps: int | None = None
    """Rounds, from 1 to `max_new_tokens`, and a multiple of the number of blocks; null: a round for each token."""
    block_length: int | None = None
    """Tokens of a block, a divisor of `max_new_tokens`: blocks are written from left to right, each of them in an equal
    share of the rounds; null: all tokens at once."""
    order: Literal["confidence", "random"] = "confidence"
    """Which tokens are kept first: `confidence`, the most probable; `random`, any."""

    def __post_init__(self) -> None:
        check_counts(self, "max_new_tokens", "num_samples", "steps", "block_length")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}; it must be a whole number of at most 64 bits, sign included.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be a number of at least 0.")
        if self.order not in ("confidence", "random"):
            raise UserError(f"order is {self.order!r}; accepted: confidence, random.")
        tokens, block = self.max_new_tokens, self.block_length
        if block is not None and tokens % block:
            raise UserError(f"block_length is {block}; it must divide the {tokens} new tokens.")
        if self.steps is not None and not (self.steps <= tokens and self.steps % self.blocks == 0):
            blocks = f"; and with blocks of {block} tokens, a multiple of {self.blocks}" if self.blocks > 1 else ""
            raise UserError(f"steps is {self.steps}; accepted: 1 to {tokens}, the number of new tokens{blocks}.")

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return self.max_new_tokens // (self.block_length or self.max_new_tokens)

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens that each round of a block unmasks: as many in all, the earlier ones one more where they differ."""
        rounds = (self.steps or self.max_new_tokens) // self.blocks
        least, more = divmod(self.max_new_tokens // self.blocks, rounds)
        return (least + 1,) * more + (least,) * (rounds - more)


class _State(NamedTuple):
    """The rows between two rounds."""

    tokens: Int[Array, "B L"]
    """The prompts with their new tokens, [MASK]s among them."""
    log_probs: Float[Array, "B N"]
    """Of the new tokens, 0 of a [MASK]."""
    hidden: Bool[Array, "B N"]
    """Which new tokens are still to be unmasked."""


def unmask(
    model: LanguageModel,
    prompts: Int[Array, "B P"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    *,
    settings: UnmaskingConfig,
    mask_id: int,
    eos: int | None = None,
) -> Generated:
    """One text of `max_new_tokens` tokens per row; jit-able with `settings`, `mask_id` and `eos` static.

    Each row is one document, the new tokens right after its prompt. A token that is unmasked stays as it is, and no
    token becomes [MASK]. With `order` random, temperature 1 and a round for each token the text is drawn with the
    probability that `diffusion_bounds` bounds.

    Args:
      model: a model that sees both sides.
      prompts: token ids, padded on the right.
      lengths: tokens of each prompt, at least 0.
      keys: one threefry key per row; the draws of round r have the key folded over r.
      settings: `num_samples` and `seed` are not read here.
      mask_id: what stands for a token to be written.
      eos: the token that ends a text: what was written after it is 0, and does not count; None: all counts.

    Returns:
      Tokens, and their log-probabilities in the round that unmasked them.

    Deviations: in LLaDA's code a drawn [MASK] would stay one; here none is drawn. In MDLM's a round unmasks each token
    with a chance of its own, so that their number varies; here it is fixed, as in LLaDA's.
    """
    new, (rows, width) = settings.max_new_tokens, prompts.shape
    index = jnp.arange(width + new)
    padded = jnp.pad(prompts, ((0, 0), (0, new)))
    ends = lengths[:, None]
    tokens = jnp.where(index < ends, padded, jnp.where(index < ends + new, mask_id, 0)).astype(jnp.int32)
    mask = masks.bidirectional().packed((index < ends + new).astype(jnp.int32))
    counts = jnp.asarray(settings.counts, jnp.int32)
    block = new // settings.blocks
    split = jax.vmap(jax.random.split)(keys)
    order = jax.vmap(lambda key: jax.random.uniform(key, (new,), jnp.float32))(split[:, 0])

    def round_of(number: Int[Array, ""], state: _State) -> _State:
        places = number // len(settings.counts) * block + jnp.arange(block)
        where = ends + places
        seen = model.hidden(state.tokens, mask=mask)
        logits = output_logits(model, jnp.take_along_axis(seen, where[..., None], axis=1))
        logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits)
        drawn = _draw(logits, split[:, 1], number, settings.temperature)
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
        hidden = state.hidden[:, places]
        first = log_probs if settings.order == "confidence" else order[:, places]
        kept = hidden & _first(first, hidden, counts[number % len(settings.counts)])
        row = jnp.arange(rows)[:, None]
        before = jnp.take_along_axis(state.tokens, where, axis=1)
        return _State(
            tokens=state.tokens.at[row, where].set(jnp.where(kept, drawn, before)),
            log_probs=state.log_probs.at[:, places].add(jnp.where(kept, log_probs, 0)),
            hidden=state.hidden.at[:, places].set(hidden & ~kept),
        )

    state = _State(tokens, jnp.zeros((rows, new), jnp.float32), jnp.ones((rows, new), bool))
    state = jax.lax.fori_loop(0, len(settings.counts) * settings.blocks, round_of, state)
    return _up_to_end(jnp.take_along_axis(state.tokens, ends + jnp.arange(new), axis=1), state.log_probs, eos)


def _draw(
    logits: Float[Array, "B N V"], keys: Key[Array, " B"], number: Int[Array, ""], temperature: float
) -> Int[Array, "B N"]:
    """A token for each place: the most probable at temperature 0, else drawn with the row's key for this round."""
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Subtracting the maximum first keeps the quotient finite at the top for any temperature.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature

    def draw(key: Key[Array, ""], row: Float[Array, "N V"]) -> Int[Array, " N"]:
        # Gumbel noise of few bits would cut off the tail, and so lower the temperature: Zheng et al. 2024, "Masked
        # Diffusion Models are Secretly Time-Agnostic Masked Models and Exploit Inaccurate Categorical Sampling".
        return jax.random.categorical(jax.random.fold_in(key, number), row, mode="high").astype(jnp.int32)

    return jax.vmap(draw)(keys, logits)


def _first(values: Float[Array, "B N"], hidden: Bool[Array, "B N"], count: Int[Array, ""]) -> Bool[Array, "B N"]:
    """Of each row the `count` hidden places with the largest values; of equal ones the first."""
    ranking = jnp.lexsort((-values, ~hidden), axis=-1)  # hidden ones before all others
    return jnp.argsort(ranking, axis=-1) < count


def _up_to_end(tokens: Int[Array, "B N"], log_probs: Float[Array, "B N"], eos: int | None) -> Generated:
    """What was written up to the first `eos`."""
    counts = jnp.ones_like(tokens, bool)
    if eos is not None:
        ended = jnp.cumsum(tokens == eos, axis=1)
        counts = (ended == 0) | ((ended == 1) & (tokens == eos))
    log_probs = jnp.where(counts, log_probs, 0)
    return Generated(jnp.where(counts, tokens, 0), log_probs, jnp.sum(counts, axis=1), jnp.sum(log_probs, axis=1))
