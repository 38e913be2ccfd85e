"""The optional packages of metrics."""

from __future__ import annotations

import importlib
from typing import Any

from lmobj.errors import UserError

__all__ = ["tasks_extra"]


def tasks_extra(module: str, asked: str) -> Any:
    """A module of the extra `tasks`, imported now; `asked` says what needs it. UserError if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise UserError(f"{asked} needs the package {package}, missing here: pip install 'lmobj[tasks]'.") from error
