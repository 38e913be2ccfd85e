"""Test session: 8 fake CPU devices, a compile cache that outlives the session, and warnings as errors."""

from __future__ import annotations

import os
import pathlib

# Nearly all of the tests' time is compiling programs that run once: leave out what only makes them faster.
_FLAGS = (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
)
os.environ["XLA_FLAGS"] = " ".join((*os.environ.get("XLA_FLAGS", "").split(), *_FLAGS))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

import jax  # noqa: E402

jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
