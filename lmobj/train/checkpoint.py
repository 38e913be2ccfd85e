"""Checkpoints of a training state: saved in the background, complete or absent, and checked when they are read.

The only file that touches Orbax. A checkpoint is a folder named by its step:

    <directory>/<step>/manifest.json   metrics, metadata, shape and dtype of every array, size and CRC-32 of every file
    <directory>/<step>/arrays/         the arrays, written by Orbax under their paths in the state

It is written as `<step>.saving`, then gets its manifest, and is renamed last, so that a process killed at any moment
leaves either a complete checkpoint or none. The manifest is needed because Orbax does not notice everything: one
flipped bit in a data file loads as a wrong number without an error.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from lmobj.errors import UserError

__all__ = ["Checkpoints", "Restored"]

logger = logging.getLogger(__name__)

_MANIFEST, _STATE = "manifest.json", "arrays"
_FOLDER = re.compile(r"(\d+)(\.(saving|old|trash))?")
"""A whole checkpoint; one being written; one being replaced (whole, used while there is no other); one to remove."""


class Restored(NamedTuple):
    """A state read back, and what was stored beside it."""

    step: int
    state: Any
    metrics: dict[str, float]
    metadata: dict[str, Any]
    notes: tuple[str, ...]
    """One line for each newer checkpoint that was damaged and passed over."""


class _DamagedError(Exception):
    """A checkpoint is not what its manifest says."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are; made at the first save.
      keep: newest checkpoints kept, at least 1.
      best: metric whose best checkpoint is kept beside them; None: no such.
      mode: whether the best is the least (`min`) or the greatest (`max`).

    Saving runs in the background, one checkpoint at a time; an error there is raised by the next call of `save`, `wait`
    or `close`. With several processes every one calls `save` and `restore`, and the directory is shared.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}; accepted: at least 1 checkpoint.")
        if mode not in ("min", "max"):
            raise UserError(f"mode is {mode!r}; accepted: min, max.")
        self.directory = pathlib.Path(os.path.abspath(directory))
        self.keep, self.best, self.mode = keep, best, mode
        self._damaged: set[int] = set()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    # --- what there is ---

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, without those found damaged."""
        if not self.directory.is_dir():
            return []
        names = (_FOLDER.fullmatch(path.name) for path in self.directory.iterdir() if path.is_dir())
        return sorted({int(name[1]) for name in names if name and name[3] in (None, "old")} - self._damaged)

    def _folder(self, step: int) -> pathlib.Path:
        """Where the whole checkpoint of a step is."""
        path = self.directory / str(step)
        old = path.with_name(f"{step}.old")
        return old if old.exists() and not path.exists() else path

    @property
    def latest_step(self) -> int | None:
        """The newest step with a checkpoint; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint has the best finite value of the metric `best`, the earlier of equals."""
        if self.best is None:
            return None
        sign = 1.0 if self.mode == "min" else -1.0
        values = {}
        for step in self.steps:
            try:
                value = self._manifest(step)["metrics"].get(self.best)
            except _DamagedError:
                continue
            if value is not None and math.isfinite(value):
                values[step] = sign * value
        return min(values, key=lambda step: (values[step], step), default=None)

    def metadata(self, step: int | None = None) -> dict[str, Any] | None:
        """The metadata stored with `step`, by default with the newest readable checkpoint; None if there is none."""
        for candidate in reversed(self.steps) if step is None else [step]:
            try:
                stored: dict[str, Any] = self._manifest(candidate)["metadata"]
            except _DamagedError:
                continue
            return stored
        return None

    # --- saving ---

    def save(
        self,
        step: int,
        state: Any,
        *,
        metrics: Mapping[str, float] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves `state` as the checkpoint of `step`, in place of one that is there.

        Returns as soon as the arrays are copied to the host; `state` may then be donated. Waits first for a save
        that is still running.

        Args:
          step: number of the step.
          state: any pytree of `jax.Array`s.
          metrics: values at this step, for `best_step`.
          metadata: anything that JSON can hold, for whoever restores.

        Raises:
          UserError: the directory cannot be written, now or in the save before.
        """
        self.wait()
        arrays = _flatten(state)
        manifest = {
            "step": int(step),
            "metrics": {name: float(value) for name, value in (metrics or {}).items()},
            "metadata": dict(metadata or {}),
            "arrays": {path: _signature(array) for path, array in arrays.items()},
        }
        manifest = json.loads(json.dumps(manifest))  # what JSON cannot hold is refused here, not in the background
        saving = self.directory / f"{step}.saving"
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clear_unfinished()
                saving.mkdir()
            _barrier(f"checkpoint {step}")
            response = ocp.save_async(saving / _STATE, {k: a for k, a in arrays.items() if a.size})
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = self._thread.submit(self._finish, step, saving, response, manifest)

    def _finish(self, step: int, saving: pathlib.Path, response: Any, manifest: dict[str, Any]) -> None:
        """In the background: waits for the arrays, writes the manifest, commits by renaming, and clears old ones."""
        try:
            response.result()
            if jax.process_index() != 0:
                return
            files = sorted(path for path in saving.rglob("*") if path.is_file())
            manifest["files"] = {path.relative_to(saving).as_posix(): _fingerprint(path) for path in files}
            _write_manifest(saving / _MANIFEST, manifest)
            final, old = self.directory / str(step), self.directory / f"{step}.old"
            if final.exists():
                final.rename(old)
            saving.rename(final)
            _sync(self.directory)
            self._damaged.discard(step)
            self._prune()
        except Exception as error:
            shutil.rmtree(saving, ignore_errors=True)
            raise self._failed(step, error) from error

    def _prune(self) -> None:
        """Removes what is neither new nor best; renamed first, so that nothing half-removed has a checkpoint's name."""
        steps = self.steps
        kept = {*steps[-self.keep :], self.best_step}
        for step in [*(s for s in steps if s not in kept), *self._damaged]:
            path = self._folder(step)
            if path.exists():
                path.rename(self.directory / f"{step}.trash")
        self._clear_unfinished()

    def _clear_unfinished(self) -> None:
        """Removes what a killed save or a removal left behind. Only a process that saves does this."""
        for path in self.directory.iterdir():
            name = _FOLDER.fullmatch(path.name)
            if name and name[3] == "old" and not path.with_name(name[1]).exists():
                path.rename(path.with_name(name[1]))
            elif name and name[3]:
                shutil.rmtree(path)

    def _failed(self, step: int, error: Exception) -> UserError:
        intact = ", ".join(map(str, self.steps)) or "none"
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return UserError(
            f"The checkpoint of step {step} could not be written to {self.directory}: {lines[0][:500]} Free some space "
            f"or make the folder writable, then resume. Steps with a complete checkpoint: {intact}."
        )

    def wait(self) -> None:
        """Waits until no save is running. Raises UserError if the last one failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, then frees the background thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.close()
        except UserError as failed:  # what ended the block matters more
            logger.error("%s", failed)

    # --- reading ---

    def restore(self, abstract_state: Any, *, step: int | None = None) -> Restored:
        """Reads a checkpoint straight into the shardings of `abstract_state`, on whatever mesh they are.

        A newest checkpoint that is damaged is passed over for the one before, with a note in the log and the result.

        Args:
          abstract_state: the state's pytree, with arrays or `jax.ShapeDtypeStruct`s as leaves. A leaf without a
            sharding goes to the first local device.
          step: this checkpoint and no other; by default the newest that is whole.

        Raises:
          UserError: there is no checkpoint, none is whole, or its arrays are not those of `abstract_state`.
        """
        self.wait()
        candidates = list(reversed(self.steps)) if step is None else [step]
        if not candidates:
            raise UserError(f"There is no checkpoint in {self.directory}.")
        notes: list[str] = []
        for candidate in candidates:
            fault = _agree(self._fault(candidate) if jax.process_index() == 0 else None)
            if fault is None:
                return self._read(candidate, abstract_state, notes)
            self._damaged.add(candidate)
            notes.append(f"The checkpoint of step {candidate} in {self.directory} is damaged: {fault}.")
            logger.warning("%s", notes[-1])
        raise UserError(f"{' '.join(notes)} There is no other checkpoint to use.")

    def _read(self, step: int, abstract_state: Any, notes: list[str]) -> Restored:
        manifest = self._manifest(step)
        wanted = _flatten_abstract(abstract_state)
        _check_same_arrays(step, manifest["arrays"], {path: _signature(leaf) for path, leaf in wanted.items()})
        stored = {path: leaf for path, leaf in wanted.items() if leaf.size}
        with self._same_precision():
            loaded = ocp.load(self._folder(step) / _STATE, stored) if stored else {}
        for path, leaf in stored.items():
            if loaded[path].dtype != leaf.dtype:
                raise RuntimeError(f"{path} was read as {loaded[path].dtype}, not {leaf.dtype}.")
        leaves = [
            loaded[path] if leaf.size else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
            for path, leaf in wanted.items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
        if notes:
            logger.warning("Using the checkpoint of step %d instead.", step)
        return Restored(step, state, manifest["metrics"], manifest["metadata"], tuple(notes))

    @contextlib.contextmanager
    def _same_precision(self) -> Iterator[None]:
        """Gives every thread this thread's x64 setting: Orbax reads in a thread of its own, where the block
        `with jax.enable_x64(True)` around this call would not hold and float64 would become float32."""

        def wide() -> bool:
            return jnp.result_type(float) == jnp.float64

        here, elsewhere = wide(), self._thread.submit(wide).result()
        jax.config.update("jax_enable_x64", here)
        try:
            yield
        finally:
            jax.config.update("jax_enable_x64", elsewhere)

    def _manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a step. Raises _DamagedError where there is none that is whole."""
        try:
            content = json.loads((self._folder(step) / _MANIFEST).read_text())
            manifest: dict[str, Any] = content["manifest"]
            if content["crc32"] != zlib.crc32(_canonical(manifest)):
                raise _DamagedError(f"{_MANIFEST} does not fit its checksum")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{_MANIFEST} cannot be read ({error})") from error
        return manifest

    def _fault(self, step: int) -> str | None:
        """What is wrong with a checkpoint, compared with its manifest; None if it is whole."""
        folder = self._folder(step)
        try:
            for name, (size, checksum) in self._manifest(step)["files"].items():
                path = folder / name
                if not path.is_file():
                    return f"{name} is missing"
                if path.stat().st_size != size:
                    return f"{name} has {path.stat().st_size} bytes and should have {size}"
                if _fingerprint(path)[1] != checksum:
                    return f"{name} does not fit its checksum"
        except (_DamagedError, OSError) as error:
            return str(error)
        return None


# --- arrays and files ---------------------------------------------------------------------------------------------


def _flatten(state: Any) -> dict[str, Any]:
    """The arrays of a pytree by path. Containers, empty ones included, come back from the abstract state."""
    arrays: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise TypeError(f"{name}: a checkpoint holds plain jax.Arrays, not {getattr(leaf, 'dtype', type(leaf))}.")
        if name in arrays:
            raise ValueError(f"Two leaves of the state have the path {name!r}.")
        arrays[name] = leaf
    return arrays


def _flatten_abstract(abstract_state: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding by path."""
    default = SingleDeviceSharding(jax.local_devices()[0])
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding or default)
        for path, leaf in _flatten(abstract_state).items()
    }


def _signature(leaf: Any) -> list[Any]:
    return [list(leaf.shape), str(leaf.dtype)]


def _check_same_arrays(step: int, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError, naming the first array that differs."""
    for path in [*wanted, *stored]:
        here, there = wanted.get(path), stored.get(path)
        if here != there:
            raise UserError(
                f"The checkpoint of step {step} is of another model or optimizer: the array {path} is "
                f"{_describe(there)} in the checkpoint and {_describe(here)} in this run. Use the run's own config."
            )


def _describe(signature: list[Any] | None) -> str:
    return "absent" if signature is None else f"{signature[1]}{signature[0]}"


def _fingerprint(path: pathlib.Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = checksum = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _write_manifest(path: pathlib.Path, manifest: dict[str, Any]) -> None:
    with path.open("w") as file:
        json.dump({"crc32": zlib.crc32(_canonical(manifest)), "manifest": manifest}, file)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: pathlib.Path) -> None:
    """Makes a folder's entries durable, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _agree(fault: str | None) -> str | None:
    """The first process's verdict, in every process."""
    if jax.process_count() == 1:
        return fault
    text = (
        jnp.zeros(512, jnp.uint8).at[:].set(jnp.frombuffer((fault or "").encode()[:512].ljust(512, b"\0"), jnp.uint8))
    )
    return bytes(multihost_utils.broadcast_one_to_all(text)).rstrip(b"\0").decode(errors="replace") or None
