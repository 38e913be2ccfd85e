"""The folder for what lmobj makes once and can make again: prepared data, working copies of runs in object stores."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_name", "cache_root"]


def cache_name(chosen: str | None = None) -> str:
    """The folder `chosen` in a config, else $LMOBJ_CACHE, else ~/.cache/lmobj, as it is written."""
    return chosen or os.environ.get("LMOBJ_CACHE") or "~/.cache/lmobj"


def cache_root(chosen: str | None = None) -> Path:
    """Its path, which need not exist. Raises RuntimeError where `~` is asked for and there is no home."""
    return Path(cache_name(chosen)).expanduser()
