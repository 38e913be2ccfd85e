"""The space of a search: for each setting that is tried, by its dotted key, a list of choices or a range of numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, ClassVar

from lmobj import _yaml
from lmobj.errors import UserError

__all__ = ["Number", "Parameter", "Settings", "nested", "short_names"]

Number = int | float

Settings = Mapping[str, Any]
"""Dotted key -> value, of every setting in the space."""

_MOST_VALUES = 10_000
"""Of a range with a step."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What values of one setting are tried: `choices`, or all numbers between `low` and `high`, both included."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    choices: tuple[Any, ...] | None = None
    """The values, of any kind that the setting accepts, whole sections included."""
    low: Number | None = None
    """The least number. Where low, high and step (if any) are whole numbers, only whole numbers are tried."""
    high: Number | None = None
    """The greatest number."""
    log: bool = False
    """Whether the range is searched on a logarithmic scale, as is usual for learning rates."""
    step: Number | None = None
    """Distance between the numbers that are tried, beginning with low; absent: all of them."""

    def __post_init__(self) -> None:
        if self.choices is not None:
            self._check_choices()
        else:
            self._check_range()

    def _check_choices(self) -> None:
        for name, value in {"low": self.low, "high": self.high, "step": self.step, "log": self.log or None}.items():
            if value is not None:
                raise UserError(f"choices and {name} are both given; accepted: choices, or low and high.")
        if not self.choices:
            raise UserError("choices is []; accepted: a list of one or more values.")
        if len(set(self.labels)) < len(self.choices):
            raise UserError(f"choices is {_yaml.show(list(self.choices))}; accepted: values that all differ.")

    def _check_range(self) -> None:
        if self.low is None or self.high is None:
            missing = "high" if self.high is None else "low"
            raise UserError(f"{missing} is missing; accepted: choices, a list of values; or low and high, numbers.")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise UserError(f"low is {self.low} and high is {self.high}; accepted: finite numbers, low less than high.")
        if self.log and self.low <= 0:
            raise UserError(f"low is {self.low} and log is true; accepted: low above 0, or log: false.")
        if self.step is None:
            return
        if self.log:
            raise UserError(f"log is true and step is {self.step}; accepted: one of the two, or choices.")
        if not (math.isfinite(self.step) and self.step > 0):
            raise UserError(f"step is {self.step}; accepted: a finite number above 0.")
        if (self.high - self.low) / self.step >= _MOST_VALUES:
            raise UserError(f"step is {self.step}, which makes over {_MOST_VALUES} values; accepted: a larger one.")

    @property
    def labels(self) -> tuple[str, ...]:
        """The choices as text, by which a study knows them."""
        return tuple(_yaml.show(choice, limit=10**6) for choice in self.choices or ())

    @property
    def whole(self) -> bool:
        """Whether only whole numbers of a range are tried."""
        return all(isinstance(value, int) for value in (self.low, self.high, self.step) if value is not None)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """All values in order, if they can be counted: choices, or a range with a step."""
        if self.choices is not None:
            return self.choices
        if self.step is None or self.low is None or self.high is None:
            return None
        low, step = Decimal(str(self.low)), Decimal(str(self.step))  # 0.1 + 2 * 0.1 is 0.3 here
        count = int((Decimal(str(self.high)) - low) / step) + 1
        return tuple((int if self.whole else float)(low + i * step) for i in range(count))

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values that say whether all are accepted: each choice, or both ends of a range."""
        return self.choices if self.choices is not None else (self.low, (self.values or (self.high,))[-1])


def nested(settings: Settings) -> dict[str, Any]:
    """The settings as sections, ready to be merged over an experiment's; a section before the settings in it."""
    document = _yaml.Document({})
    for key in sorted(settings, key=lambda key: key.count(".")):
        value = settings[key]
        for part in reversed(key.split(".")):
            value = {part: value}
        document = _yaml.merge(document, _yaml.Document(value))
    return document.values


def short_names(keys: list[str]) -> dict[str, str]:
    """Each dotted key cut to as few of its last parts as tell it from the others."""

    def ending(key: str, parts: int) -> str:
        return ".".join(key.split(".")[-parts:])

    names = {}
    for key in keys:
        lengths = range(1, key.count(".") + 2)
        alone = (n for n in lengths if sum(ending(key, n) == ending(other, n) for other in keys) == 1)
        names[key] = ending(key, next(alone, len(lengths)))
    return names
