"""Masked language modelling: predict tokens that were hidden, from both sides.

    L = - sum_k w_k log p(x_{i_k} | corrupted x) / (sum_k w_k + 1e-5)

over the selected positions i_k only. Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding", section 3.1, task 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from lmobj import losses, masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives._objective import Context, Example, Models, Objective, Terms, token_metrics

__all__ = ["MaskedLM"]


@dataclass(frozen=True)
class MaskedLM(Objective):
    """Masked LM with BERT's corruption: of the selected tokens 80% become [MASK], 10% random, 10% stay.

    The vocabulary head runs on the predicted positions alone. Metrics: `nll` (nats per masked token) and
    `accuracy`.

    Deviations from the reference code: masks are drawn anew at every step instead of ten static copies; the count of
    a packed row is taken over the row, not over each document in it.
    """

    summary: ClassVar[str] = "Predict masked tokens from both sides (BERT, RoBERTa)."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers"
    epsilon: ClassVar[dict[str, float]] = {"nll": 1e-5}
    judged_by: ClassVar[Literal["top5_accuracy"]] = "top5_accuracy"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["masked_lm"] = "masked_lm"
    """Predict masked tokens from both sides."""
    selection: Literal["exact", "bernoulli", "whole_word"] = "exact"
    """`exact`: round(rate * length) tokens per row (BERT); `bernoulli`: each token with probability rate
    (Hugging Face's collator); `whole_word`: whole words up to the same count (BERT's whole-word masking)."""
    mask_rate: float = 0.15
    """Share of a row's tokens that is selected, in (0, 1)."""
    max_predictions: int | None = None
    """Most tokens selected in a row, at least 1; by default round(mask_rate * length), or with `bernoulli` all."""
    mask_share: float = 0.8
    """Share of the selected tokens that become [MASK]."""
    random_share: float = 0.1
    """Share of the selected tokens that become a random token; the rest stays as it is."""
    layout: Literal["packed", "single"] = "packed"
    """`packed`: documents end to end, each seeing itself only; `single`: one piece of a document per row."""

    def __post_init__(self) -> None:
        if not 0 < self.mask_rate < 1:
            raise UserError(f"objective.mask_rate is {self.mask_rate}; it must be above 0 and below 1.")
        if self.mask_share < 0 or self.random_share < 0 or self.mask_share + self.random_share > 1:
            raise UserError(
                f"objective.mask_share is {self.mask_share} and objective.random_share is {self.random_share}; "
                "both must be at least 0 and their sum at most 1."
            )
        if self.max_predictions is not None and self.max_predictions < 1:
            raise UserError(f"objective.max_predictions is {self.max_predictions}; it must be at least 1, or null.")

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] document [SEP], packed or single; refuses a vocabulary without [MASK] and rows with nothing to mask."""
        if vocab.mask is None:
            raise UserError(
                "objective masked_lm needs a [MASK] token and the vocabulary has none; set a tokenizer with one."
            )
        prefix = () if vocab.cls is None else (vocab.cls,)
        suffix = () if vocab.sep is None else (vocab.sep,)
        visible = length - len(prefix) - len(suffix)
        if visible < 2 or self._predictions(length) >= visible:
            raise UserError(
                f"objective.mask_rate {self.mask_rate} selects {self._predictions(length)} of the {max(visible, 0)} "
                f"ordinary tokens in a row of data.length {length} and leaves none to read; "
                "lower objective.mask_rate or raise data.length."
            )
        fields = ("word_starts",) if self.selection == "whole_word" else ()
        return RowSpec(self.layout, length, prefix=prefix, suffix=suffix, fields=fields)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Masks each row by its own key; special tokens and padding are never selected."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        candidates = (segments > 0) & ~_isin(tokens, ctx.vocab.special_ids)
        rows = {"tokens": tokens, "candidates": candidates}
        if self.selection != "bernoulli":
            rows["length"] = jnp.sum(segments > 0, axis=1)
        if self.selection == "whole_word":
            rows["word_starts"] = batch["word_starts"]
        mask = self._corruption(ctx.vocab, tokens.shape[1])
        masked = jax.vmap(lambda key, row: mask(key, **row))(keys, rows)
        return Example(
            inputs=masked.tokens,
            targets=masked.targets,
            weights=masked.weights,
            mask=masks.bidirectional().packed(segments),
            positions=batch["positions"],
            token_types=batch.get("token_types"),
            predict=masked.positions,
        )

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of losses at the predicted positions."""
        model = models["model"]
        hidden = model.hidden(
            example.inputs,
            mask=example.mask,
            positions=example.positions,
            token_types=example.token_types,
            dropout=ctx.dropout,
        )
        head = model.head_table()
        stats = losses.linear_logit_stats(
            model.head_hidden(example.at_predictions(hidden)),
            head.table,
            example.targets,
            bias=head.bias,
            vocab_size=head.vocab_size,
            soft_cap=head.soft_cap,
        )
        nll = losses.nll(stats)
        metrics = token_metrics(nll, example.weights, stats.correct)
        return Terms({"nll": jnp.sum(nll * example.weights)}, metrics, carried)

    def _predictions(self, length: int) -> int:
        """K: the most positions of a row of `length` tokens that are predicted."""
        return self.max_predictions or noise.prediction_count(length, self.mask_rate)

    def _corruption(self, vocab: Vocabulary, length: int) -> Callable[..., noise.MaskedTokens]:
        """The corruption of one row, with everything static bound."""
        settings: dict[str, Any] = {
            "mask_id": vocab.mask,
            "vocab_size": vocab.size,
            "mask_rate": self.mask_rate,
            "mask_share": self.mask_share,
            "random_share": self.random_share,
        }
        match self.selection:
            case "exact":
                return functools.partial(noise.mask_tokens, num_predictions=self._predictions(length), **settings)
            case "whole_word":
                return functools.partial(noise.mask_whole_words, num_predictions=self._predictions(length), **settings)
            case "bernoulli":
                return functools.partial(noise.mask_tokens_bernoulli, num_predictions=self.max_predictions, **settings)


def _isin(tokens: Int[Array, "B L"], ids: tuple[int, ...]) -> Bool[Array, "B L"]:
    return functools.reduce(jnp.logical_or, (tokens == i for i in ids))
