"""The environment of a run: versions, devices and memory, for `environment.json` and `lmobj doctor`."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

import lmobj
from lmobj._cache import cache_root

__all__ = ["CPU_DEVICES_FLAG", "Check", "doctor", "environment"]

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece")
CPU_DEVICES_FLAG = "--xla_force_host_platform_device_count"
"""XLA's flag for the number of pretended CPU devices."""
_SUPPORTED_JAX = ((0, 10, 2), (0, 12))
"""The first jax that lmobj runs on, and the first that it does not know."""


def environment() -> dict[str, Any]:
    """What a run's results may depend on beside its config, as JSON values."""
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "lmobj": lmobj.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": _devices(),
        "processes": jax.process_count(),
        "cpu cores": os.cpu_count(),
        "memory": _memory(),
        "flags": {name: os.environ[name] for name in ("XLA_FLAGS", "JAX_PLATFORMS") if os.environ.get(name)},
    }


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of `lmobj doctor`: what was looked at, what was found, and whether it stops training.

    ok: True; False where training cannot work; None where it works but something is worth knowing.
    """

    subject: str
    finding: str
    ok: bool | None = True


def doctor(cache: Path | None = None) -> Iterator[Check]:
    """Looks at everything that training needs; each check comes as soon as it is made.

    Args:
      cache: the folder that prepared data goes to; by default where it goes without `data.cache`.
    """
    if cache is None:
        cache = cache_root()
    yield Check("lmobj", lmobj.__version__)
    yield Check("python", platform.python_version())
    for name in _PACKAGES:
        yield _check_package(name)
    yield from _check_devices()
    yield Check("memory", _memory() or "unknown", ok=True if _memory() else None)
    yield _check_folder("data cache", cache)
    yield _check_folder("run folders", Path("runs"))


def _check_package(name: str) -> Check:
    version = _version(name)
    if version is None:
        return Check(name, f"not installed; run `pip install {name}`", ok=False)
    if name == "jax":
        known = _SUPPORTED_JAX[0] <= _numbers(version) < _SUPPORTED_JAX[1]
        if not known:
            return Check(name, f"{version}, and lmobj is tested on 0.10.2 to 0.11", ok=None)
    if name == "jaxlib" and _numbers(version)[:2] != _numbers(_version("jax") or "")[:2]:
        return Check(name, f"{version} does not go with jax {_version('jax')}; install both together", ok=False)
    return Check(name, version)


def _check_devices() -> Iterator[Check]:
    try:
        found = _devices()
    except RuntimeError as error:
        yield Check("devices", f"jax finds none: {' '.join(str(error).split())}", ok=False)
        return
    yield Check("devices", found)
    for device in jax.local_devices()[:1]:
        limit = (device.memory_stats() or {}).get("bytes_limit")
        if limit:
            yield Check("device memory", f"{limit / 2**30:.1f} GiB each")
    result = float(jax.jit(lambda x: (x @ x).sum())(jax.numpy.ones((8, 8))))
    yield Check(
        "compile and run",
        "8x8 matrix product is right" if result == 512.0 else f"got {result}, not 512",
        result == 512.0,
    )
    if jax.default_backend() == "cpu":
        if Path("/proc/driver/nvidia").exists() or Path("/dev/nvidia0").exists():
            yield Check("gpu", "this machine has one and jax does not use it; run `pip install 'lmobj[gpu]'`", ok=None)
        if jax.device_count() == 1:
            yield Check(
                "several devices", f"to try a mesh on this machine: XLA_FLAGS={CPU_DEVICES_FLAG}=8 lmobj train ..."
            )


def _check_folder(subject: str, folder: Path) -> Check:
    """Whether files can be written in a folder, or in the first of its parents that exists."""
    existing = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Check(subject, f"{folder} cannot be written: {error.strerror}", ok=False)
    space = os.statvfs(existing)
    return Check(subject, f"{folder} can be written, {space.f_bavail * space.f_frsize / 2**30:,.0f} GiB free")


def _devices() -> str:
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"


def _memory() -> str | None:
    """The machine's memory in GiB where the system tells it."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    except (ValueError, OSError, AttributeError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
