"""The folder for what lmobj makes once and can make again: prepared data, compiled programs, working copies of runs in
object stores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

__all__ = ["cache_name", "cache_root", "keep_programs"]


def cache_name(chosen: str | None = None) -> str:
    """The folder `chosen` in a config, else $LMOBJ_CACHE, else ~/.cache/lmobj, as it is written."""
    return chosen or os.environ.get("LMOBJ_CACHE") or "~/.cache/lmobj"


def cache_root(chosen: str | None = None) -> Path:
    """Its path, which need not exist. Raises RuntimeError where `~` is asked for and there is no home."""
    return Path(cache_name(chosen)).expanduser()


def keep_programs() -> Path | None:
    """Has jax keep compiled programs in `cache_root()`/programs, so that the next process need not compile them again.

    A folder that the user gave jax (JAX_COMPILATION_CACHE_DIR) stays, and JAX_ENABLE_COMPILATION_CACHE=false turns it
    off. Programs of other settings, devices or versions of jax have names of their own; seeds share them.

    Returns:
      The folder, or None where jax keeps its own, keeps none, or there is no home to keep it in.
    """
    import jax

    settings: Any = jax.config
    if settings.jax_compilation_cache_dir is not None or not settings.jax_enable_compilation_cache:
        return None
    try:
        folder = cache_root() / "programs"
    except RuntimeError:
        return None
    settings.update("jax_compilation_cache_dir", str(folder))
    return folder
