"""Multi-label classification: which of C classes a text belongs to, be it several or none (topics, emotions).

    L = sum_b v_b sum_c (w_c y_bc softplus(-x_bc) + (1 - y_bc) softplus(x_bc)) / (C sum_b v_b)

with x the head's logits, y_bc = 1 for the classes of a text, v_b = 1 for every row that has text, and w_c what the text
of a class counts against one of another: the mean of `torch.nn.BCEWithLogitsLoss` with `pos_weight`. Nam et al. 2014,
"Large-scale Multi-label Text Classification: Revisiting Neural Networks", who train on this loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj import losses
from lmobj.batch import RowSpec, Vocabulary
from lmobj.models import HeadStyle, PairHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms
from lmobj.objectives._row_classes import check_class_count, check_class_weights, check_classes_found
from lmobj.objectives._row_task import RowTask

__all__ = ["MultiLabel"]


@dataclass(frozen=True)
class MultiLabel(RowTask):
    """The classes of a text or of a pair of texts, any number of them (`data.source.label` with `label_kind: classes`,
    and `.pair`).

    Classes are numbered in the order of their names. A class is told from a probability of 1/2 on. Metrics: `bce` (nats
    per class of a row, all alike) and `exact_match`, of rows with all their classes right; evaluation adds micro and
    macro F1 and mean average precision.
    """

    task: ClassVar[Literal["multi_label"]] = "multi_label"
    judged_by: ClassVar[Judge] = "micro_f1"
    FIELD: ClassVar[str] = "label_sets"
    coefficients: ClassVar[dict[str, float]] = {"bce": 1.0}
    summary: ClassVar[str] = "Tell all classes of a text or pair of texts, of which it may have several or none."
    paper: ClassVar[str] = "Nam et al. 2014, Large-scale Multi-label Text Classification: Revisiting Neural Networks"

    name: Literal["multi_label"] = "multi_label"
    """Tell all classes of a text or pair of texts, of which it may have several or none."""
    classes: int = 2
    """Number of classes, at least 2; those of the data."""
    class_weights: tuple[float, ...] | None = None
    """What a text of a class counts there against one of another, in the order of the classes' names; null: as much."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_count(self.classes)
        check_class_weights(self.class_weights, self.classes)

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data whose classes are not as many as this objective's."""
        check_classes_found(self.classes, classes_of(None))

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """As of other tasks on rows, labelled with sets of this many classes."""
        return dataclasses.replace(super().rows(vocab, length), classes=self.classes)

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """BERT's pooler and the classes."""
        return PairHead(style, self.classes, rngs)

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """Classes of rows with text."""
        return {"bce": self.classes * jnp.sum(example.weights)}

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`bce`: the weighted sum over the classes of all rows."""
        logits, there, labels = self.outputs(models, example, ctx), example.weights, example.targets
        nll = losses.binary_nll(logits, labels)
        if self.class_weights is None:
            weighted = nll
        else:
            weighted = nll * jnp.where(labels > 0, jnp.asarray(self.class_weights), 1.0)
        exact = jnp.all((logits >= 0) == (labels > 0), axis=1)
        metrics = {
            "bce": (jnp.sum(nll * there), self.classes * jnp.sum(there)),
            "exact_match": (jnp.sum(exact * there[:, 0]), jnp.sum(there)),
        }
        return Terms({"bce": jnp.sum(weighted * there)}, metrics, carried, {"logits": logits})
