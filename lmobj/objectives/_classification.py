"""Classification: which of C classes a text belongs to, or a pair of texts (sentiment, intent, entailment).

    L = - sum_b v_b sum_c w_c q_bc log p_bc / sum_b v_b w_(y_b)        q_bc = (1 - epsilon) [c = y_b] + epsilon / C

with p = softmax of the head's logits, v_b = 1 for every row that has text, w_c the weight of a class and epsilon the
label smoothing: the convention of `torch.nn.functional.cross_entropy`. Devlin et al. 2019, section 4.1; pairs as in
Bowman et al. 2015, "A large annotated corpus for learning natural language inference".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, PairHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms
from lmobj.objectives._row_classes import check_class_count, check_class_weights, check_classes_found, class_sums
from lmobj.objectives._row_task import RowTask

__all__ = ["Classification"]


@dataclass(frozen=True)
class Classification(RowTask):
    """The class of a text or of a pair of texts (`data.source.label`, and `.pair`).

    Classes are numbered in the order of their names. Metrics: `nll` (nats per row, every class alike and unsmoothed)
    and `accuracy`.
    """

    task: ClassVar[Literal["classification"]] = "classification"
    judged_by: ClassVar[Judge] = "accuracy"
    FIELD: ClassVar[str] = "labels"
    summary: ClassVar[str] = "Tell the class of a labelled text or pair of texts."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT, section 4.1"

    name: Literal["classification"] = "classification"
    """Tell the class of a labelled text or pair of texts."""
    classes: int = 2
    """Number of classes, at least 2; those of the data."""
    class_weights: tuple[float, ...] | None = None
    """What a row counts by its class, in the order of the classes' names; null: all alike."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_class_count(self.classes)
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1).")
        check_class_weights(self.class_weights, self.classes)

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data whose classes are not as many as this objective's."""
        check_classes_found(self.classes, classes_of(None))

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """BERT's pooler and the classes."""
        return PairHead(style, self.classes, rngs)

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """The weights of the rows' classes."""
        return {"nll": jnp.sum(example.weights[:, 0] * self._class_weights(example.targets[:, 0]))}

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum over rows."""
        logits, labels, there = self.outputs(models, example, ctx), example.targets[:, 0], example.weights[:, 0]
        nll, accuracy = class_sums(logits, labels, there)
        loss, _ = class_sums(logits, labels, there * self._class_weights(labels))
        if self.label_smoothing:
            every = self._class_weights(jnp.arange(self.classes))
            precise = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
            others = jnp.mean(every * -jax.nn.log_softmax(precise), axis=-1)
            loss = (1 - self.label_smoothing) * loss + self.label_smoothing * jnp.sum(others * there)
        metrics = {"nll": (nll, accuracy[1]), "accuracy": accuracy}
        return Terms({"nll": loss}, metrics, carried, {"logits": logits})

    def _class_weights(self, labels: Int[Array, "*N"]) -> Float[Array, "*N"]:
        weights = (1.0,) * self.classes if self.class_weights is None else self.class_weights
        return jnp.asarray(weights)[labels]
