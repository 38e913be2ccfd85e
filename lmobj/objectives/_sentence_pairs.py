"""Pairs of texts: does B belong after A? Beside masked language modelling on the same rows, in one pass.

    L = - sum_k w_k log p(x_{i_k} | A, B) / (sum_k w_k + 1e-5)  -  sum_b v_b log p(y_b | A, B) / sum_b v_b

where A and B are corrupted, v_b = 1 for every row that has text, and p(y_b) comes from the last hidden state of [CLS].
All sums run over the whole batch.

Next-sentence prediction: Devlin et al. 2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language
Understanding", section 3.1, task 2. Sentence-order prediction: Lan et al. 2020, "ALBERT: A Lite BERT for
Self-supervised Learning of Language Representations", section 3.1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lmobj import masks
from lmobj.batch import Batch, Pairing, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, PairHead, RowUse
from lmobj.objectives._masked_lm import MaskedLM, masked_terms
from lmobj.objectives._objective import Context, Example, Models, Objective, Role, Terms
from lmobj.objectives._row_classes import class_sums, row_weights
from lmobj.objectives._tokens import hidden_states

__all__ = ["NextSentencePrediction", "SentenceOrderPrediction"]


@dataclass(frozen=True)
class _SentencePairs(Objective):
    """What both objectives share. Their terms are `nll`, unless `masked_lm` is null, and `TERM`."""

    TERM: ClassVar[str]
    PAIRING: ClassVar[Pairing]
    roles: ClassVar[Mapping[str, Role]] = {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects the objective."""
    masked_lm: MaskedLM | None = dataclasses.field(default_factory=MaskedLM)
    """Masked LM on the same rows, in the same pass; null: the pairs alone."""
    short_rate: float = 0.1
    """Share of the pairs that are made shorter than the row, by a length drawn evenly, so that the model meets short
    texts too."""

    def __post_init__(self) -> None:
        if not 0 <= self.short_rate <= 1:
            raise UserError(f"objective.short_rate is {self.short_rate}; it must be in [0, 1].")
        if self.masked_lm is not None and self.masked_lm.layout != MaskedLM.layout:
            raise UserError(
                f"objective.masked_lm.layout is {self.masked_lm.layout!r}, and the rows are pairs; leave it out."
            )

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Both terms count alike."""
        return {**({} if self.masked_lm is None else self.masked_lm.coefficients), self.TERM: 1.0}

    @property
    def epsilon(self) -> Mapping[str, float]:
        """Masked LM's; the pairs have none."""
        return {} if self.masked_lm is None else self.masked_lm.epsilon

    @property
    def fills_masks(self) -> bool:
        """With masked LM."""
        return self.masked_lm is not None

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """BERT's pooler and two classes."""
        return PairHead(style, 2, rngs)

    def use(self, length: int) -> RowUse:
        """Masked LM's, or no vocabulary head."""
        return RowUse(length, 0) if self.masked_lm is None else self.masked_lm.use(length)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] A [SEP] B [SEP]; refuses a vocabulary without them, and what masked LM refuses."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        fields: tuple[str, ...] = ()
        if self.masked_lm is not None:
            fields = self.masked_lm.row_fields
            try:
                vocab.require(f"objective {self.masked_lm.name}", "mask")
                self.masked_lm.check_room(length, specials=3)
            except UserError as error:
                raise UserError(f"objective.masked_lm: {error}") from error
        return RowSpec("pairs", length, (cls,), (sep,), fields, pairing=self.PAIRING, short_rate=self.short_rate)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Masks tokens of A and B alike, without regard to the label."""
        labels, weights = batch["pair_labels"], row_weights(batch)
        if self.masked_lm is None:
            example = Example(
                inputs=batch["tokens"],
                targets=labels[:, None],
                weights=weights[:, None],
                mask=masks.bidirectional().packed(batch["segment_ids"]),
                positions=batch["positions"],
                token_types=batch["token_types"],
                predict=jnp.zeros_like(labels)[:, None],
            )
        else:
            example = self.masked_lm.corrupt(keys, batch, ctx)
        return dataclasses.replace(example, extra={**example.extra, "pair_labels": labels, "pair_weights": weights})

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """Masked tokens and pairs, each their own."""
        masked = {} if self.masked_lm is None else self.masked_lm.weights(example)
        return {**masked, self.TERM: jnp.sum(example.extra["pair_weights"])}

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """The sums of both terms from one pass over the corrupted rows."""
        model = models["model"]
        hidden = hidden_states(model, example, ctx)
        labels, weights = example.extra["pair_labels"], example.extra["pair_weights"]
        pairs, accuracy = class_sums(models["heads"](hidden), labels, weights)
        masked = Terms({}, {}) if self.masked_lm is None else masked_terms(model, hidden, example)
        sums = {**masked.sums, self.TERM: pairs}
        return Terms(sums, {**masked.metrics, f"{self.TERM}_accuracy": accuracy}, carried)


@dataclass(frozen=True)
class NextSentencePrediction(_SentencePairs):
    """BERT's pre-training: masked LM, and whether B follows A in a text (label 0) or is from another one (label 1).

    More than half of the pairs have label 1, since a sentence that stands alone always takes B from elsewhere. Metrics:
    masked LM's, and `nsp_accuracy`. How pairs are made: `lmobj.data._pairs_plan`. Needs data with sentences: documents
    of two or more, and two or more documents.
    """

    summary: ClassVar[str] = "Masked LM, and tell whether a text follows another (BERT)."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers"
    TERM: ClassVar[str] = "nsp"
    PAIRING: ClassVar[Pairing] = "next_sentence"

    name: Literal["next_sentence_prediction"] = "next_sentence_prediction"
    """Masked LM, and tell whether a text follows another."""


@dataclass(frozen=True)
class SentenceOrderPrediction(_SentencePairs):
    """ALBERT's pre-training: masked LM, and whether A and B are in order (label 0) or have changed places (label 1).

    A sentence that stands alone has no order: it takes B from another document, with label 1, as in the released code.
    Metrics: masked LM's, and `sop_accuracy`. How pairs are made: `lmobj.data._pairs_plan`. Needs documents of two or
    more sentences.
    """

    summary: ClassVar[str] = "Masked LM, and tell whether two texts are in order (ALBERT)."
    paper: ClassVar[str] = "Lan et al. 2020, ALBERT: A Lite BERT for Self-supervised Learning"
    TERM: ClassVar[str] = "sop"
    PAIRING: ClassVar[Pairing] = "sentence_order"

    name: Literal["sentence_order_prediction"] = "sentence_order_prediction"
    """Masked LM, and tell whether two texts are in order."""
