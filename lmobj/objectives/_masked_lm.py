"""Masked language modelling: predict tokens that were hidden, from both sides.

    L = - sum_k w_k log p(x_{i_k} | corrupted x) / (sum_k w_k + 1e-5)

over the selected positions i_k only. Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for
Language Understanding", section 3.1, task 1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from lmobj import masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import LanguageModel, RowUse
from lmobj.objectives._objective import Context, Example, Models, Objective, Terms
from lmobj.objectives._tokens import hidden_states, is_one_of, token_terms

__all__ = ["MaskedLM", "check_room", "check_shares", "maskable", "masked_rows", "masked_terms"]


@dataclass(frozen=True)
class MaskedLM(Objective):
    """Masked LM with BERT's corruption: of the selected tokens 80% become [MASK], 10% random, 10% stay.

    The vocabulary head runs on the predicted positions alone. Metrics: `nll` (nats per masked token) and
    `accuracy`. What a word is: `data.segment.words`.

    Deviations from the reference code: masks are drawn anew at every step instead of ten static copies; the count of
    a packed row is taken over the row with the special tokens of all its documents, so that many short documents lose
    more of their words than one long one; special tokens are never selected, though RoBERTa's code selects those at
    the ends.
    """

    summary: ClassVar[str] = "Predict masked tokens from both sides (BERT, RoBERTa, ALBERT)."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers"
    epsilon: ClassVar[dict[str, float]] = {"nll": 1e-5}
    judged_by: ClassVar[Literal["top5_accuracy"]] = "top5_accuracy"
    fills_masks: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["masked_lm"] = "masked_lm"
    """Predict masked tokens from both sides."""
    selection: Literal["exact", "bernoulli", "roberta", "whole_word", "ngram"] = "exact"
    """`exact`: round(rate * length) tokens per row (BERT); `bernoulli`: each token with probability rate
    (Hugging Face's collator); `roberta`: rate * length tokens per row, rounded up or down at random, and no special
    tokens among the random ones (fairseq); `whole_word`: whole words up to BERT's count (its whole-word masking);
    `ngram`: runs of words up to the same count (ALBERT)."""
    mask_rate: float = 0.15
    """Share of a row's tokens that is selected, in (0, 1)."""
    max_predictions: int | None = None
    """Most tokens selected in a row, at least 1; by default as many as `selection` may ask for."""
    max_ngram: int | None = None
    """With `ngram`, the most words in a run, at least 1; by default 3. A run of n is drawn in proportion to 1 / n."""
    mask_share: float = 0.8
    """Share of the selected tokens that become [MASK]."""
    random_share: float = 0.1
    """Share of the selected tokens that become a random token; the rest stays as it is."""
    layout: Literal["packed", "single"] = "packed"
    """`packed`: documents end to end, each seeing itself only; `single`: one piece of a document per row."""

    def __post_init__(self) -> None:
        check_shares(self.mask_rate, self.mask_share, self.random_share)
        if self.max_predictions is not None and self.max_predictions < 1:
            raise UserError(f"objective.max_predictions is {self.max_predictions}; it must be at least 1, or null.")
        if self.max_ngram is not None and (self.selection != "ngram" or self.max_ngram < 1):
            raise UserError(
                f"objective.max_ngram is {self.max_ngram} and objective.selection is {self.selection}; accepted: "
                "max_ngram of at least 1 with selection=ngram, and null otherwise."
            )

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] document [SEP], packed or single; refuses a vocabulary without [MASK] and rows with nothing to mask."""
        spec = masked_rows(self.name, vocab, self.layout, length)
        self.check_room(length, len(spec.prefix) + len(spec.suffix))
        return dataclasses.replace(spec, fields=self.row_fields)

    def use(self, length: int) -> RowUse:
        """The head runs on the slots for predictions alone."""
        every = self.selection == "bernoulli" and self.max_predictions is None
        return RowUse(length, length if every else self._predictions(length))

    @property
    def row_fields(self) -> tuple[str, ...]:
        """What it reads of rows beside their tokens."""
        return ("word_starts",) if self._reads_words else ()

    def check_room(self, length: int, specials: int) -> None:
        """Refuses rows of `length` tokens, `specials` of them special, that have nothing to mask or to read."""
        check_room(self.mask_rate, self._predictions(length), length, specials)
        if self.max_ngram is not None and self.max_ngram > length - specials:
            raise UserError(
                f"objective.max_ngram is {self.max_ngram}, and a row of data.length {length} has {length - specials} "
                f"ordinary tokens; accepted: 1 to {length - specials}."
            )

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Masks each row by its own key; special tokens and padding are never selected."""
        tokens, segments = batch["tokens"], batch["segment_ids"]
        rows = {"tokens": tokens, "candidates": maskable(batch, ctx.vocab)}
        if self.selection != "bernoulli":
            rows["length"] = jnp.sum(segments > 0, axis=1)
        if self._reads_words:
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
        return masked_terms(model, hidden_states(model, example, ctx), example)._replace(carried=carried)

    @property
    def _reads_words(self) -> bool:
        return self.selection in ("whole_word", "ngram")

    def _predictions(self, length: int) -> int:
        """K: the most positions of a row of `length` tokens that are predicted."""
        if self.selection == "roberta":
            return self.max_predictions or math.ceil(length * self.mask_rate)
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
        if self.selection == "bernoulli":
            return functools.partial(noise.mask_tokens_bernoulli, num_predictions=self.max_predictions, **settings)
        settings["num_predictions"] = self._predictions(length)
        match self.selection:
            case "exact":
                return functools.partial(noise.mask_tokens, **settings)
            case "roberta":
                return functools.partial(noise.mask_tokens_roberta, special_ids=vocab.special_ids, **settings)
            case "whole_word":
                return functools.partial(noise.mask_whole_words, **settings)
            case "ngram":
                return functools.partial(noise.mask_ngrams, max_ngram=self.max_ngram or 3, **settings)


def check_shares(mask_rate: float, mask_share: float, random_share: float) -> None:
    """Refuses rates and shares that are out of range."""
    if not 0 < mask_rate < 1:
        raise UserError(f"objective.mask_rate is {mask_rate}; it must be above 0 and below 1.")
    if mask_share < 0 or random_share < 0 or mask_share + random_share > 1:
        raise UserError(
            f"objective.mask_share is {mask_share} and objective.random_share is {random_share}; both must be at "
            "least 0 and their sum at most 1."
        )


def masked_rows(name: str, vocab: Vocabulary, layout: Literal["packed", "single"], length: int) -> RowSpec:
    """[CLS] document [SEP]; refuses a vocabulary without [MASK]."""
    vocab.require(f"objective {name}", "mask")
    prefix = () if vocab.cls is None else (vocab.cls,)
    suffix = () if vocab.sep is None else (vocab.sep,)
    return RowSpec(layout, length, prefix=prefix, suffix=suffix)


def check_room(mask_rate: float, predictions: int, length: int, specials: int) -> None:
    """Refuses rows of `length` tokens, `specials` of them special, with nothing to mask or to read."""
    visible = length - specials
    if visible < 2 or predictions >= visible:
        raise UserError(
            f"objective.mask_rate {mask_rate} selects {predictions} of the {max(visible, 0)} ordinary tokens "
            f"in a row of data.length {length} and leaves none to read; lower objective.mask_rate or raise data.length."
        )


def maskable(batch: Batch, vocab: Vocabulary) -> Bool[Array, "B L"]:
    """The tokens that may be masked: all that stand for text, unknown words included."""
    return (batch["segment_ids"] > 0) & ~is_one_of(batch["tokens"], vocab.control_ids)


def masked_terms(model: LanguageModel, hidden: Float[Array, "B L D"], example: Example) -> Terms:
    """`nll` of the tokens at `example.predict`, and its metrics, from the hidden states of the corrupted rows."""
    return token_terms(model, example.at_predictions(hidden), example)
