"""What the objectives that tell classes share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmobj import losses
from lmobj.batch import Batch
from lmobj.errors import UserError
from lmobj.objectives._objective import Metric

__all__ = ["check_class_count", "check_class_weights", "check_classes_found", "class_sums", "row_weights"]


def row_weights(batch: Batch) -> Float[Array, " B"]:
    """1 for a row with text, 0 for an empty one."""
    return jnp.any(batch["segment_ids"] > 0, axis=1).astype(jnp.float32)


def class_sums(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Metric]:
    """Over rows: the weighted sum of -log softmax(logits)[label], and the metric of how often the label is the best."""
    stats = losses.logit_stats(logits, labels)
    return jnp.sum(losses.nll(stats) * weights), (jnp.sum(stats.correct * weights), jnp.sum(weights))


def check_class_count(classes: int) -> None:
    """Refuses `objective.classes` below 2."""
    if classes < 2:
        raise UserError(f"objective.classes is {classes}; it must be at least 2.")


def check_class_weights(weights: Sequence[float] | None, classes: int) -> None:
    """Refuses `objective.class_weights` that are not one for each class, finite, 0 or more, and not all 0."""
    if weights is not None and (
        len(weights) != classes or not all(0 <= w < math.inf for w in weights) or not any(weights)
    ):
        raise UserError(
            f"objective.class_weights is {list(weights)}; accepted: {classes} finite numbers of 0 or more, one for "
            "each class, not all 0."
        )


def check_classes_found(classes: int, names: Sequence[str]) -> None:
    """Refuses data whose classes are not as many as `objective.classes`."""
    if len(names) != classes:
        accepted = "other data" if len(names) < 2 else f"objective.classes={len(names)}, or other data"
        raise UserError(
            f"objective.classes is {classes}, but the data has {len(names)} classes ({', '.join(names)}); accepted: "
            f"{accepted}."
        )
