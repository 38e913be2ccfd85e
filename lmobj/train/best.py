"""Which checkpoint is the best, and when no better one is to be expected."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

from lmobj.errors import UserError

__all__ = ["Best", "BestSoFar"]


@dataclass(frozen=True)
class Best:
    """By which held-out figure a checkpoint is the best, and for how long a run waits for a better one.

    With `patience` or `restore`, every evaluation that is the best so far is saved.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    metric: str = "loss"
    """The figure, as evaluation names it without eval/."""
    mode: Literal["min", "max"] = "min"
    """Whether less of it is better, or more."""
    patience: int | None = None
    """Evaluations in a row that are no better, after which training ends early; null: it never does."""
    restore: bool = False
    """Whether samples and report are made with the best checkpoint, not the last."""

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise UserError(f"train.best.mode is {self.mode!r}; accepted: min, max.")
        if not self.metric or self.metric.startswith("eval/"):
            raise UserError(f"train.best.metric is {self.metric!r}; accepted: a name without eval/, such as loss.")
        if self.patience is not None and self.patience < 1:
            raise UserError(f"train.best.patience is {self.patience}; accepted: 1 or more evaluations, or null.")

    @property
    def name(self) -> str:
        """The figure's name among the metrics."""
        return f"eval/{self.metric}"

    @property
    def saves(self) -> bool:
        """Whether an evaluation that is the best so far is saved."""
        return self.patience is not None or self.restore


class BestSoFar:
    """The best of the evaluations of a run, which are told one by one; `earlier` are those before it was resumed."""

    def __init__(self, settings: Best, earlier: Iterable[float] = ()) -> None:
        self.settings = settings
        self.value: float | None = None
        self.waited = 0
        """Evaluations since then, none of them better."""
        for value in earlier:
            self.add(value)

    def add(self, value: float) -> bool:
        """Whether this evaluation is better than all before it. One that is not finite never is."""
        sign = 1.0 if self.settings.mode == "max" else -1.0
        better = math.isfinite(value) and (self.value is None or sign * value > sign * self.value)
        if better:
            self.value, self.waited = value, 0
        else:
            self.waited += 1
        return better

    @property
    def exhausted(self) -> bool:
        """Whether the run has waited long enough."""
        return self.settings.patience is not None and self.waited >= self.settings.patience

    def __str__(self) -> str:
        found = "never finite" if self.value is None else f"no better than {self.value:.6g}"
        return f"{self.settings.name} was {found} for {self.waited} evaluation{'s' * (self.waited != 1)}"
