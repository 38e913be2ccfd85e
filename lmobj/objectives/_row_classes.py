"""What the objectives that tell classes of whole rows share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmobj import losses
from lmobj.batch import Batch
from lmobj.objectives._objective import Metric

__all__ = ["class_sums", "row_weights"]


def row_weights(batch: Batch) -> Float[Array, " B"]:
    """1 for a row with text, 0 for an empty one."""
    return jnp.any(batch["segment_ids"] > 0, axis=1).astype(jnp.float32)


def class_sums(
    logits: Float[Array, "B C"], labels: Int[Array, " B"], weights: Float[Array, " B"]
) -> tuple[Float[Array, ""], Metric]:
    """Over rows: the weighted sum of -log softmax(logits)[label], and the metric of how often the label is the best."""
    stats = losses.logit_stats(logits, labels)
    return jnp.sum(losses.nll(stats) * weights), (jnp.sum(stats.correct * weights), jnp.sum(weights))
