"""Entailment: what a premise says of a hypothesis, learnt from labelled pairs.

    L = - sum_b v_b log p(y_b | A, B) / sum_b v_b

with v_b = 1 for every row that has text, and p = softmax(W tanh(pooler(h_[CLS]))). Bowman et al. 2015, "A large
annotated corpus for learning natural language inference"; the model is that of Devlin et al. 2019, section 4.1 and
figure 4a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from lmobj import masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, PairHead, RowUse
from lmobj.objectives._objective import Context, Example, Models, Objective, Role, Terms
from lmobj.objectives._row_classes import class_sums, row_weights
from lmobj.objectives._tokens import hidden_states

__all__ = ["Entailment"]

_POOLED_SITE = 200
"""Tells the dropout of the pooled state from those inside the model."""


@dataclass(frozen=True)
class Entailment(Objective):
    """The class of a pair of texts, such as entailment, neutral and contradiction.

    Rows are [CLS] A [SEP] B [SEP] of records with two texts and a label (`data.source.pair`, `.label`). Classes are
    numbered in the order of their names. Metrics: `nll` (nats per pair) and `accuracy`.
    """

    summary: ClassVar[str] = "Tell the class of a labelled pair of texts (natural language inference)."
    paper: ClassVar[str] = "Bowman et al. 2015, A large annotated corpus for learning natural language inference"
    roles: ClassVar[Mapping[str, Role]] = {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["entailment"] = "entailment"
    """Tell the class of a labelled pair of texts."""
    classes: int = 3
    """Number of classes, at least 2; those of the data."""
    dropout: float = 0.1
    """Share of the pooled state of [CLS] that is dropped in training, in [0, 1)."""

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(f"objective.classes is {self.classes}; it must be at least 2.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"objective.dropout is {self.dropout}; it must be in [0, 1).")

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data whose classes are not as many as this objective's."""
        names = classes_of(None)
        if len(names) != self.classes:
            raise UserError(
                f"objective.classes is {self.classes}, but the data has {len(names)} classes ({', '.join(names)}); "
                f"accepted: objective.classes={len(names)}, or other data."
            )

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """BERT's pooler and the classes."""
        return PairHead(style, self.classes, rngs)

    def use(self, length: int) -> RowUse:
        """No vocabulary head."""
        return RowUse(length, 0)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] A [SEP] B [SEP] and `labels`; refuses a vocabulary without these tokens."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        return RowSpec("examples", length, (cls,), (sep,), ("labels",), two_texts=True)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are; [CLS] predicts the label."""
        labels = batch["labels"]
        return Example(
            inputs=batch["tokens"],
            targets=labels[:, None],
            weights=row_weights(batch)[:, None],
            mask=masks.bidirectional().packed(batch["segment_ids"]),
            positions=batch["positions"],
            token_types=batch["token_types"],
            predict=jnp.zeros_like(labels)[:, None],
        )

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the sum over pairs."""
        model, head = models["model"], models["heads"]
        hidden = hidden_states(model, example, ctx)
        pooled = head.pooled(hidden)
        if ctx.dropout is not None:
            pooled = noise.dropout(pooled, self.dropout, ctx.dropout, layer=0, site=_POOLED_SITE)
        total, accuracy = class_sums(head.classifier(pooled), example.targets[:, 0], example.weights[:, 0])
        return Terms({"nll": total}, {"nll": (total, accuracy[1]), "accuracy": accuracy}, carried)
