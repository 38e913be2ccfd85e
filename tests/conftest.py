"""Test session: 8 fake CPU devices, a compile cache that outlives the session, and warnings as errors."""

from __future__ import annotations

import gc
import importlib.metadata
import itertools
import os
import pathlib
from collections.abc import Iterator

# Nearly all of the tests' time is compiling programs that run once: leave out what only makes them faster. Most of the
# rest goes into fusions, which take a second compiler (MLIR) on their way to machine code unless it is told not to; the
# partitioner, and so all that devices exchange, has done its work by then. A jaxlib that does not know a flag ends with
# "Unknown flag in XLA_FLAGS", so these are for the line that they were tried with.
_TRIED = importlib.metadata.version("jaxlib").startswith("0.10.")
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    *(
        (
            "--xla_cpu_use_fusion_emitters=false",
            "--xla_cpu_parallel_codegen_split_count=1",
            "--xla_cpu_opt_preset=CPU_OPT_PRESET_FAST_COMPILE",
        )
        if _TRIED
        else ()
    ),
)
os.environ["XLA_FLAGS"] = " ".join((*os.environ.get("XLA_FLAGS", "").split(), *_FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads of PyTorch and NumPy that wait for each other at a spin take the processor from the other worker.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

import jax  # noqa: E402
import pytest  # noqa: E402
from jax._src import lru_cache  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the workers and the runs to come share them all

_put = lru_cache.LRUCache.put


def _put_whole(cache: lru_cache.LRUCache, key: str, value: bytes) -> None:
    """Writes an entry under another name first: the workers read what each other writes, and must not read a part."""
    part = f"{key}-{os.getpid()}"
    _put(cache, part, value)
    (cache.path / f"{part}{lru_cache._CACHE_SUFFIX}").replace(cache.path / f"{key}{lru_cache._CACHE_SUFFIX}")


lru_cache.LRUCache.put = _put_whole


def pytest_collection_finish() -> None:
    """Looks for garbage more seldom than Python does, and not among what was collected, which is much and stays."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


_TESTS_BETWEEN = 20
_MOST_MAPS = 40_000
"""Memory mappings of a process before its compiled programs are let go. XLA's CPU backend maps each of them piece by
piece, and at the kernel's limit (65,530 by default) loading one more ends in a segmentation fault."""


_tests = itertools.count(1)


@pytest.fixture(autouse=True)
def _room_for_programs() -> Iterator[None]:
    yield
    maps = pathlib.Path("/proc/self/maps")
    if next(_tests) % _TESTS_BETWEEN == 0 and maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()
