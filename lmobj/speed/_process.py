"""A process for each measurement: its memory is its own, and a crash costs one row."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from typing import Any

__all__ = ["in_process"]


def in_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own; its exception, or `BrokenProcessPool` if it died, is raised here."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_fresh, function, *arguments).result()


def _fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """The call, compiling anew whatever an earlier run has cached, so that the time to compile is that."""
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    return function(*arguments)
