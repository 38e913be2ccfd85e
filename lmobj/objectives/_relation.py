"""Relation classification: what a text says of two entities in it.

    L = - sum_b v_b log p_b,y_b / sum_b v_b        p_b = softmax(W [h_i; h_j] + c)

with h_i and h_j the states of the first tokens of the markers that open head and tail, and v_b = 1 for every row that
has text. Baldini Soares et al. 2019, "Matching the Blanks: Distributional Similarity for Relation Learning", section
3.2.2, "entity start", with entity markers (section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, JoinedHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms
from lmobj.objectives._row_classes import check_class_count, check_classes_found, class_sums, row_weights
from lmobj.objectives._token_task import TokenTask

__all__ = ["RelationClassification"]


@dataclass(frozen=True)
class RelationClassification(TokenTask):
    """The relation between two marked entities of a text (`data.source: {name: relations}`).

    Classes are numbered in the order of their names. Metrics: `nll` (nats per row) and `accuracy`; evaluation adds
    micro and macro F1, without the class that is no relation where `data.source.no_relation` names one.
    """

    task: ClassVar[Literal["relation"]] = "relation"
    judged_by: ClassVar[Judge] = "micro_f1"
    summary: ClassVar[str] = "Tell the relation between two entities of a text."
    paper: ClassVar[str] = "Baldini Soares et al. 2019, Matching the Blanks, section 3.2.2"

    name: Literal["relation"] = "relation"
    """Tell the relation between two entities of a text."""
    classes: int = 2
    """Number of relations, at least 2; those of the data, the one that is none included."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_count(self.classes)
        if self.causal:
            raise UserError(
                "objective.attention is 'causal', where the marker that opens an entity does not see it; accepted: "
                "bidirectional."
            )
        if self.token_dropout:
            raise UserError(
                f"objective.token_dropout is {self.token_dropout}, which would hide markers of entities; accepted: 0."
            )

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data whose relations are not as many as this objective's classes."""
        check_classes_found(self.classes, classes_of(None))

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] text [SEP] with marked entities; refuses a vocabulary without these tokens."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        return RowSpec("relations", length, (cls,), (sep,), ("labels", "spans"))

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """W and c."""
        return JoinedHead(style, 2, self.classes, rngs)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are; both opening markers of each predict its label."""
        there = row_weights(batch)[:, None]
        example = self.example(batch, batch["labels"][:, None], there)
        return dataclasses.replace(example, predict=jnp.where(there > 0, batch["spans"], 0))

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the sum over rows."""
        logits = models["heads"](example.at_predictions(self.states(models, example, ctx)))
        nll, accuracy = class_sums(logits, example.targets[:, 0], example.weights[:, 0])
        return Terms({"nll": nll}, {"nll": (nll, accuracy[1]), "accuracy": accuracy}, carried, {"logits": logits})
