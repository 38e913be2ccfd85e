"""An objective whose loss goes wrong at given steps, for tests of what follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from own_objective import PredictPrevious

from lmobj.objectives import Terms

__all__ = ["Poisoned"]


@dataclass(frozen=True)
class Poisoned(PredictPrevious):
    """Predicts each token from the one after it. Steps are counted from 1, as people are told them."""

    nan: tuple[int, ...] = ()
    """Steps with a loss that is not a number."""
    spike: tuple[int, ...] = ()
    """Steps with a loss ten times as large."""

    def terms(self, models: Any, example: Any, carried: Any, ctx: Any) -> Terms:
        terms = super().terms(models, example, carried, ctx)
        total = terms.sums["nll"]
        for steps, factor in ((self.nan, jnp.nan), (self.spike, 10.0)):
            here = jnp.any(jnp.asarray(steps, jnp.int32) == ctx.step + 1) & ctx.train
            total = total * jnp.where(here, factor, 1.0)
        return terms._replace(sums={"nll": total})
