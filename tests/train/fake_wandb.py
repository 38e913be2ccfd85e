"""The package `wandb` as far as it is used, which keeps the calls."""

from __future__ import annotations

import types
from typing import Any

__all__ = ["FakeWandB"]


class FakeWandB(types.ModuleType):
    """Put it into `sys.modules`."""

    class errors:  # noqa: N801 - a module of the package
        class Error(Exception):
            pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list[tuple[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.refusal: str | None = None

    def Settings(self, **settings: Any) -> dict[str, Any]:  # noqa: N802 - its name there
        return settings

    def init(self, **arguments: Any) -> FakeWandB:
        if self.refusal is not None:
            raise self.errors.Error(self.refusal)
        self.calls.append(("init", arguments))
        return self

    def define_metric(self, name: str, **settings: Any) -> None:
        self.calls.append(("define", (name, settings)))

    def log(self, values: dict[str, float]) -> None:
        self.calls.append(("log", values))

    def finish(self, *, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))
