"""Masked diffusion: predict the tokens that noise of a random strength has masked, each weighted by 1 / strength.

    L = sum_i [x_i masked] / t * -log p(x_i | noised x) / (number of tokens that could have been masked)

over the whole batch, with t drawn for each document. It is a bound: its mean over the noise is at least the negative
log-likelihood per token of the model that unmasks tokens in random order. Nie et al. 2025, "Large Language Diffusion
Models" (LLaDA), eqs. 3 and 5; Sahoo et al. 2024, "Simple and Effective Masked Diffusion Language Models" (MDLM), eq.
11.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj import losses, masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives._objective import Context, Example, Metric, Models, Objective, Terms
from lmobj.objectives._tokens import head_stats, hidden_states, is_one_of

__all__ = ["MaskedDiffusion"]

_TRUNCATION = 0x7C
"""Domain of the draws that shorten rows."""


@dataclass(frozen=True)
class MaskedDiffusion(Objective):
    """Masked diffusion over packed rows, or over the second of two texts, on any model that can see both sides.

    `variant` chooses the paper. `llada`: t = (1 - eps) u + eps with u drawn evenly, tokens masked with chance t.
    `mdlm`: the same t, with u of row i of n from [i / n, (i + 1) / n), tokens masked with chance (1 - eps) t, and
    [MASK] no possible prediction. Tokens that are not masked cost nothing in either, which is the other half
    of MDLM's SUBS.

    Rows are the documents end to end, each followed by its end, which is predicted as well: the end-of-sequence token,
    or [SEP] where the vocabulary has none. A document of a row sees itself only and has a time of its own, as each
    sequence has in the papers. With `loss_on: completion` a row is one example of two texts, A end B end, and only B
    is noised and predicted: its terms are divided by its length, and their sum by the number of examples (LLaDA's
    fine-tuning).

    Metrics: `nll` (nats per token, a bound, and so is `bits_per_byte`), and `accuracy` on the masked tokens. Each row
    is noised once for them; `diffusion_bounds` of lmobj.evaluate takes many copies, and `unmask` writes text.

    The rows of `mdlm` depend on their places in the global batch, and thereby on its size: the one exception to noise
    that depends on a row's address alone. The split into microbatches and devices still changes nothing. MDLM's code
    does this on each device by itself, and gives a whole row one time. With chance (1 - eps) t and weight 1 / t its
    estimate is low by the factor 1 - eps. LLaDA shortens 1% of its batches, here it is `truncate_rate` of the rows.
    """

    summary: ClassVar[str] = "Predict masked tokens under noise of every strength (masked diffusion: LLaDA, MDLM)."
    paper: ClassVar[str] = "Nie et al. 2025, Large Language Diffusion Models"
    fills_masks: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["masked_diffusion"] = "masked_diffusion"
    """Predict masked tokens under noise of every strength."""
    variant: Literal["llada", "mdlm"] = "llada"
    """`llada`: times drawn by themselves; `mdlm`: times spread over the batch, and [MASK] never predicted."""
    epsilon_time: float = 1e-3
    """The least time, above 0 and below 1: no masked token has a weight above 1 / this."""
    truncate_rate: float = 0.0
    """Share of the rows cut to a length drawn evenly from 1 to their own, in [0, 1) (LLaDA: 0.01)."""
    loss_on: Literal["all", "completion"] = "all"
    """`all`: every token may be masked; `completion`: those of the second text of each pair."""

    def __post_init__(self) -> None:
        if self.variant not in ("llada", "mdlm"):
            raise UserError(f"objective.variant is {self.variant!r}; accepted: llada, mdlm.")
        if not 0 < self.epsilon_time < 1:
            raise UserError(f"objective.epsilon_time is {self.epsilon_time}; it must be above 0 and below 1.")
        if not 0 <= self.truncate_rate < 1:
            raise UserError(f"objective.truncate_rate is {self.truncate_rate}; it must be in [0, 1).")
        if self.truncate_rate and self.loss_on == "completion":
            raise UserError(
                f"objective.truncate_rate is {self.truncate_rate} and objective.loss_on is completion, whose rows hold "
                "one example each; accepted: truncate_rate=0, or loss_on=all."
            )

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows of `length` tokens; refuses a vocabulary without [MASK], and completions without an end."""
        vocab.require(f"objective {self.name}", "mask")
        if length < 2:
            raise UserError(f"data.length is {length}; masked_diffusion masks some of a row and needs at least 2.")
        end = _end(vocab)
        suffix = () if end is None else (end,)
        if self.loss_on == "all":
            return RowSpec("packed", length, suffix=suffix, fields=("token_bytes",))
        if end is None:
            raise UserError(
                "objective.loss_on is completion, which ends both texts with an end-of-sequence token or [SEP], and "
                "the vocabulary has neither; set a tokenizer with one."
            )
        return RowSpec("examples", length, suffix=suffix, two_texts=True)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Masks each row by its own key, with `mdlm` also by its place in the global batch."""
        (mask_id,) = ctx.vocab.require(f"objective {self.name}", "mask")
        tokens, segments = batch["tokens"], batch["segment_ids"]
        if self.truncate_rate:
            segments = jax.vmap(functools.partial(_truncated, rate=self.truncate_rate))(keys, segments)
        counted = (segments > 0) & _may_be_masked(tokens, ctx.vocab)
        if self.loss_on == "completion":
            counted &= batch["token_types"] == 1
        count = len(tokens)
        spread = self.variant == "mdlm"

        def noised(key: Array, place: Array, *row: Array) -> noise.DiffusedTokens:
            return noise.diffuse_tokens(
                key,
                *row,
                mask_id=mask_id,
                epsilon=self.epsilon_time,
                chance=1 - self.epsilon_time if spread else 1.0,
                stratum=(place, count * ctx.parts) if spread else None,
            )

        found = jax.vmap(noised)(keys, ctx.places(count), tokens, counted, segments)
        share = counted.astype(jnp.float32)
        if self.loss_on == "completion":
            share = share / jnp.maximum(jnp.sum(share, axis=1, keepdims=True), 1)
        extra = {"share": share}
        if "token_bytes" in batch:
            extra["target_bytes"] = batch["token_bytes"] * counted
        return Example(
            inputs=found.tokens,
            targets=jnp.where(counted, tokens, 0),
            weights=found.weights * share,
            mask=masks.bidirectional().packed(segments),
            positions=batch["positions"],
            extra=extra,
        )

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """The tokens that could have been masked; with `loss_on: completion` the rows that have some."""
        share = example.extra["share"]
        return {"nll": jnp.sum(jnp.any(share > 0, axis=1) if self.loss_on == "completion" else share)}

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of losses at the masked tokens."""
        model = models["model"]
        head = model.head_table()
        exists = None
        if self.variant == "mdlm":
            assert ctx.vocab.mask is not None
            exists = jnp.not_equal(jnp.arange(head.table.shape[0]), ctx.vocab.mask)
        stats = head_stats(model.head_hidden(hidden_states(model, example, ctx)), head, example.targets, exists)
        masked = example.weights > 0
        # A target that does not count may be [MASK] itself, which has no probability: infinity times a weight of zero.
        total = jnp.sum(jnp.where(masked, losses.nll(stats), 0) * example.weights)
        metrics: dict[str, Metric] = {
            "nll": (total, self.weights(example)["nll"]),
            "accuracy": (jnp.sum(stats.correct & masked), jnp.sum(masked)),
        }
        if self.loss_on == "all" and "target_bytes" in example.extra:
            metrics["bits_per_byte"] = (total / math.log(2), jnp.sum(example.extra["target_bytes"]))
        return Terms({"nll": total}, metrics, carried)


def _end(vocab: Vocabulary) -> int | None:
    """What ends a text."""
    return vocab.sep if vocab.eos is None else vocab.eos


def _may_be_masked(tokens: Int[Array, "B L"], vocab: Vocabulary) -> Bool[Array, "B L"]:
    """Tokens of texts and what ends them."""
    return ~is_one_of(tokens, [i for i in vocab.control_ids if i != _end(vocab)])


def _truncated(key: Key[Array, ""], segments: Int[Array, " L"], *, rate: float) -> Int[Array, " L"]:
    """The segments of a row that is cut, with probability `rate`, to a length from 1 to that of its tokens."""
    length = jnp.sum(segments > 0)
    chosen, size = jax.random.uniform(jax.random.fold_in(key, _TRUNCATION), (2,), jnp.float32)
    kept = jnp.where(chosen < rate, 1 + jnp.floor(size * length).astype(length.dtype), length)
    return jnp.where(jnp.arange(segments.shape[0]) < kept, segments, 0)
