"""Bytes in words."""

from __future__ import annotations

__all__ = ["in_bytes"]

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


def in_bytes(size: float) -> str:
    """A number of bytes in the unit in which it is a tenth or more, with two digits behind the point."""
    unit, name = next(((unit, name) for unit, name in _UNITS if size >= unit / 10), _UNITS[-1])
    return f"{size / unit:,.2f} {name}"
