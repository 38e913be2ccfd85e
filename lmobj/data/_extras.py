"""The optional packages of the data."""

from __future__ import annotations

import importlib
from typing import Any

from lmobj.errors import UserError

__all__ = ["clean_extra"]


def clean_extra(package: str, asked: str) -> Any:
    """A package of the extra `clean`, imported now; `asked` says which setting needs it. UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{asked}, which needs the package {package}: pip install 'lmobj[clean]'.") from error
