"""The optional packages of the data."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from lmobj.errors import UserError

__all__ = ["clean_extra", "versions"]


def clean_extra(package: str, asked: str) -> Any:
    """A package of the extra `clean`, imported now; `asked` says which setting needs it. UserError if it is missing."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{asked}, which needs the package {package}: pip install 'lmobj[clean]'.") from error


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """The installed version of each package; None for one that is missing."""
    return {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
