"""Regression: a number for a text or a pair of texts (similarity, rating).

    L = sum_b v_b (f_b - y_b)^2 / sum_b v_b

with v_b = 1 for every row that has text. Devlin et al. 2019, section 4.1, on STS-B; squared error as in its code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from lmobj.batch import Vocabulary
from lmobj.models import HeadStyle, PairHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms
from lmobj.objectives._row_task import RowTask

__all__ = ["Regression"]


@dataclass(frozen=True)
class Regression(RowTask):
    """The number that labels a text or a pair of texts (`data.source.label` with `label_kind: number`, and `.pair`).

    Metrics: `mse`, in the square of the labels' unit.
    """

    task: ClassVar[Literal["regression"]] = "regression"
    judged_by: ClassVar[Judge] = "mse"
    FIELD: ClassVar[str] = "scores"
    coefficients: ClassVar[dict[str, float]] = {"mse": 1.0}
    summary: ClassVar[str] = "Predict the number that labels a text or a pair of texts."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT, section 4.1"

    name: Literal["regression"] = "regression"
    """Predict the number that labels a text or a pair of texts."""

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """BERT's pooler and a number."""
        return PairHead(style, 1, rngs)

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`mse`: the sum of squared errors over rows."""
        guesses = self.outputs(models, example, ctx)[:, 0]
        guesses = guesses.astype(jnp.promote_types(guesses.dtype, jnp.float32))
        there = example.weights[:, 0]
        total = jnp.sum(jnp.square(guesses - example.targets[:, 0]) * there)
        return Terms({"mse": total}, {"mse": (total, jnp.sum(there))}, carried, {"scores": guesses})
