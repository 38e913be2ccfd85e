"""Checkpoints of a training state: saved in the background, complete or absent, and checked when they are read.

The only file that touches Orbax. A checkpoint is a folder named by its step, on a disk or in an object store:

    <directory>/<step>/arrays/         the arrays, written by Orbax under their paths in the state
    <directory>/<step>/manifest.json   metrics, metadata, shape and dtype of every array, size and checksum of
                                       every file

The manifest is written last and in one piece, and removed first. So a folder with a manifest is a complete checkpoint
and one without is to be removed, at whatever moment a process was killed, and no folder is ever renamed, which object
stores cannot do. A step that is saved again goes to `<step>.1`, `<step>.2`, ...: the last complete one counts. The
manifest is also needed because Orbax does not notice everything: one flipped bit in a data file loads as a wrong
number without an error.

To disks and to `gs://` Orbax writes by itself, each process its own shards. For other stores, which it does not know,
a checkpoint is written to this machine's disk first and then sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint.experimental.v1 as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding

from lmobj.errors import UserError
from lmobj.train.distributed import agreed, is_first, share
from lmobj.train.storage import Folder, LocalFolder, Place, StoredFolder, open_folder, working_copy

__all__ = ["Checkpoints", "Restored", "leaves_by_path"]

logger = logging.getLogger(__name__)
# Orbax logs what fails in each of its threads with a traceback, and raises it too; once, and in one line, is enough.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))

_MANIFEST, _STATE = "manifest.json", "arrays"
_FOLDER = re.compile(r"\d+(\.\d+)?")
"""The step, and which of its saves it is if an earlier one was there."""


class Restored(NamedTuple):
    """A state read back, and what was stored beside it."""

    step: int
    state: Any
    metrics: dict[str, float]
    metadata: dict[str, Any]
    notes: tuple[str, ...]
    """One line for each newer checkpoint that was damaged or not finished, and passed over."""


class _DamagedError(Exception):
    """A checkpoint is not what its manifest says."""


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: where they are, a path or a URL; made at the first save.
      keep: newest checkpoints kept, at least 1.
      best: metric whose best checkpoint is kept beside them; None: no such.
      mode: whether the best is the least (`min`) or the greatest (`max`).
      before_commit: called in the background before a checkpoint becomes complete, to store what belongs to it.

    Saving runs in the background, one checkpoint at a time; an error there is raised by the next call of `save`, `wait`
    or `close`. With several processes every one calls `save` and `restore`, and the directory is shared.
    """

    def __init__(
        self,
        directory: Place,
        *,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
        before_commit: Callable[[], None] = lambda: None,
    ) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}; accepted: at least 1 checkpoint.")
        if mode not in ("min", "max"):
            raise UserError(f"mode is {mode!r}; accepted: min, max.")
        self.directory = open_folder(directory)
        self.keep, self.best, self.mode = keep, best, mode
        self._staging = _staging(self.directory)
        self._before_commit = before_commit
        self._damaged: set[str] = set()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    # --- what there is ---

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint, ascending, without those found damaged."""
        return list(self._complete())

    def _names(self) -> list[str]:
        """The names of all folders that saves have made, the latest last."""
        return sorted(filter(_FOLDER.fullmatch, self.directory.names()), key=lambda name: (_step(name), _attempt(name)))

    def _complete(self) -> dict[int, str]:
        """Step -> name of the folder of its last complete save."""
        names = (name for name in self._names() if name not in self._damaged)
        return {_step(name): name for name in names if self.directory.child(name).has(_MANIFEST)}

    @property
    def latest_step(self) -> int | None:
        """The newest step with a checkpoint; None if there is none."""
        return max(self.steps, default=None)

    @property
    def best_step(self) -> int | None:
        """The step whose checkpoint has the best finite value of the metric `best`, the earlier of equals."""
        return None if self.best is None else self._best_of(self._complete())

    def _best_of(self, complete: Mapping[int, str]) -> int | None:
        sign = 1.0 if self.mode == "min" else -1.0
        values = {}
        for step, name in complete.items():
            try:
                value = self._manifest(name)["metrics"].get(self.best)
            except _DamagedError:
                continue
            if value is not None and math.isfinite(value):
                values[step] = sign * value
        return min(values, key=lambda step: (values[step], step), default=None)

    def metadata(self, step: int | None = None) -> dict[str, Any] | None:
        """The metadata stored with `step`, by default with the newest readable checkpoint; None if there is none."""
        for candidate, name in reversed(self._complete().items()):
            if step in (None, candidate):
                with contextlib.suppress(_DamagedError):
                    stored: dict[str, Any] = self._manifest(name)["metadata"]
                    return stored
        return None

    def arrays(self, step: int) -> dict[str, list[Any]]:
        """[shape, dtype] of every array in the checkpoint of `step`, by its path in the state."""
        try:
            found: dict[str, list[Any]] = self._manifest(self._complete().get(step, str(step)))["arrays"]
        except _DamagedError as error:
            raise UserError(f"The checkpoint of step {step} in {self.directory} is damaged: {error}.") from error
        return found

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
        with agreed(f"checkpoint {step}"):
            name = self._begin(step) if is_first() else ""
        name = share(f"folder of checkpoint {step}", name)
        try:
            target = _orbax_path(self._staging or self.directory.child(name))
            response = ocp.save_async(target, {k: a for k, a in arrays.items() if a.size})
        except Exception as error:
            raise self._failed(f"The checkpoint of step {step} could not be written to", error) from error
        self._pending = self._thread.submit(self._finish, step, name, response, manifest)

    def _begin(self, step: int) -> str:
        """Removes what killed saves have left, and names the folder of a new save."""
        try:
            complete = [name for name in self._names() if self.directory.child(name).has(_MANIFEST)]
            self._remove_all_but(complete)
            if self._staging is not None:
                self._staging.remove()
            earlier = [_attempt(name) for name in complete if _step(name) == step]
            name = f"{step}.{max(earlier) + 1}" if earlier else str(step)
            (self._staging or self.directory.child(name)).make()
        except Exception as error:
            raise self._failed(f"The checkpoint of step {step} could not be written to", error) from error
        return name

    def _finish(self, step: int, name: str, response: Any, manifest: dict[str, Any]) -> None:
        """In the background: waits for the arrays, commits by writing the manifest, and removes old checkpoints."""
        folder = self.directory.child(name)
        try:
            response.result()
            if not is_first():
                return
            written = self._staging or folder
            manifest["files"] = {file: [size, written.checksum(file)] for file, size in written.sizes().items()}
            if self._staging is not None and isinstance(folder, StoredFolder):
                for file in manifest["files"]:
                    folder.send(self._staging.path / file, file)
                self._staging.remove()
            self._before_commit()
            folder.write(_MANIFEST, _sealed(manifest))
        except Exception as error:
            with contextlib.suppress(Exception):  # the error that led here is told, and the next save removes the rest
                self._remove(name)
            raise self._failed(f"The checkpoint of step {step} could not be written to", error) from error
        try:
            complete = self._complete()
            kept = {*list(complete)[-self.keep :], self._best_of(complete) if self.best else None}
            self._remove_all_but([complete[step] for step in kept if step is not None])
        except Exception as error:
            raise self._failed("Old checkpoints could not be removed from", error) from error

    def _remove_all_but(self, kept: list[str]) -> None:
        for name in self._names():
            if name not in kept:
                self._remove(name)

    def _remove(self, name: str) -> None:
        """Removes a folder, its manifest first, so that nothing half-removed looks complete."""
        folder = self.directory.child(name)
        folder.delete(_MANIFEST)
        folder.remove()

    def _failed(self, what: str, error: Exception) -> UserError:
        try:
            complete = ", ".join(map(str, self.steps)) or "none"
        except (UserError, OSError):
            complete = "unknown, since they cannot be listed"
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        return UserError(
            f"{what} {self.directory}: {lines[0][:500]} Free some space or make the folder writable, then resume. "
            f"Steps with a complete checkpoint: {complete}."
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

    def restore(self, abstract_state: Any, *, step: int | None = None, whole: bool = True) -> Restored:
        """Reads a checkpoint straight into the shardings of `abstract_state`, on whatever mesh they are.

        A newest checkpoint that is damaged is passed over for the one before, with a note in the log and the result.

        Args:
          abstract_state: the state's pytree, with arrays or `jax.ShapeDtypeStruct`s as leaves. A leaf without a
            sharding goes to the first local device.
          step: this checkpoint and no other; by default the newest that is whole.
          whole: whether the checkpoint must hold nothing that `abstract_state` does not.

        Raises:
          UserError: there is no checkpoint, none is whole, or its arrays are not those of `abstract_state`.
        """
        self.wait()
        notes: list[str] = []
        with agreed("checkpoints to restore"):
            complete = self._complete()
            names = [*reversed(complete.values())] if step is None else [complete.get(step, str(step))]
            if step is None:
                notes += self._unfinished(after=max(complete, default=-1))
            if not names:
                raise UserError(f"{' '.join([*notes, ''])}There is no checkpoint in {self.directory}.")
        names = share("checkpoints to restore", names)
        for name in names:
            with self._at_hand(name) as folder:
                with agreed(f"check of checkpoint {name}"):
                    fault = self._fault(name, folder) if is_first() else None
                fault = share(f"fault of checkpoint {name}", fault)
                if fault is None:
                    if name != names[0]:
                        logger.warning("%s Using the checkpoint of step %d instead.", " ".join(notes), _step(name))
                    return self._read(name, folder, abstract_state, notes, whole=whole)
            self._damaged.add(name)
            notes.append(f"The checkpoint of step {_step(name)} in {self.directory} is damaged: {fault}.")
        raise UserError(f"{' '.join(notes)} There is no other checkpoint to use.")

    def _unfinished(self, after: int) -> list[str]:
        """A note for every newer save that was not finished: killed, most likely."""
        steps = {_step(name) for name in self._names() if name not in self._damaged}
        return [
            f"The save of step {step} in {self.directory} was not finished: {_MANIFEST} is missing."
            for step in sorted(steps)
            if step > after
        ]

    @contextlib.contextmanager
    def _at_hand(self, name: str) -> Iterator[Folder]:
        """The folder of a checkpoint where Orbax can read it: itself, or a copy on this machine for the while."""
        folder = self.directory.child(name)
        if self._staging is None or not isinstance(folder, StoredFolder):
            yield folder
            return
        self._staging.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._staging.path.parent) as copy:
            with contextlib.suppress(_DamagedError, FileNotFoundError):  # the check that follows finds the same
                for file in self._manifest(name)["files"]:
                    folder.fetch(file, pathlib.Path(copy) / file)
            yield LocalFolder(pathlib.Path(copy))

    def _read(self, name: str, folder: Folder, abstract_state: Any, notes: list[str], *, whole: bool) -> Restored:
        manifest, step = self._manifest(name), _step(name)
        wanted = _flatten_abstract(abstract_state)
        there = {path: signature for path, signature in manifest["arrays"].items() if whole or path in wanted}
        _check_same_arrays(step, there, {path: _signature(leaf) for path, leaf in wanted.items()})
        stored = {path: leaf for path, leaf in wanted.items() if leaf.size}
        reading = ocp.Context()
        reading.pytree.loading.partial_load = not whole
        with self._same_precision(), reading:
            loaded = ocp.load(_orbax_path(folder), stored) if stored else {}
        for path, leaf in stored.items():
            if loaded[path].dtype != leaf.dtype:
                raise RuntimeError(f"{path} was read as {loaded[path].dtype}, not {leaf.dtype}.")
        leaves = [
            loaded[path] if leaf.size else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
            for path, leaf in wanted.items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)
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

    def _manifest(self, name: str) -> dict[str, Any]:
        """The manifest in a folder. Raises _DamagedError where there is none that is whole."""
        try:
            content = json.loads(self.directory.child(name).read(_MANIFEST))
            manifest: dict[str, Any] = content["manifest"]
            if content["crc32"] != zlib.crc32(_canonical(manifest)):
                raise _DamagedError(f"{_MANIFEST} does not fit its checksum")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _DamagedError(f"{_MANIFEST} cannot be read ({error})") from error
        return manifest

    def _fault(self, name: str, folder: Folder) -> str | None:
        """What is wrong with a checkpoint, compared with its manifest; None if it is whole."""
        try:
            sizes = folder.sizes()
            for file, (size, checksum) in self._manifest(name)["files"].items():
                if file not in sizes:
                    return f"{file} is missing"
                if sizes[file] != size:
                    return f"{file} has {sizes[file]} bytes and should have {size}"
                if _differ(folder.checksum(file), checksum):
                    return f"{file} does not fit its checksum"
        except (_DamagedError, OSError) as error:
            return str(error)
        return None


def _step(name: str) -> int:
    """The step in the name of a folder."""
    return int(name.partition(".")[0])


def _attempt(name: str) -> int:
    """Which of the step's saves a folder holds, from 0."""
    return int(name.partition(".")[2] or 0)


def _staging(directory: Folder) -> LocalFolder | None:
    """Where checkpoints are written before they are sent; None where Orbax writes them by itself."""
    if not isinstance(directory, StoredFolder) or directory.url.startswith("gs://"):
        return None
    if jax.process_count() > 1:
        raise UserError(
            f"run is in {directory}, a kind of store that only a single process can save to; accepted with several: "
            "gs://, or a folder that all of them share."
        )
    return LocalFolder(working_copy(directory.url) / "saving")


def _orbax_path(folder: Folder) -> epath.Path:
    """Where Orbax has the arrays of a checkpoint."""
    return epath.Path(str(folder)) / _STATE


# --- arrays and files ---------------------------------------------------------------------------------------------


def leaves_by_path(state: Any) -> list[tuple[str, Any]]:
    """(path, leaf) of every leaf of a pytree, by the paths under which checkpoints have them."""
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    ]


def _flatten(state: Any) -> dict[str, Any]:
    """The arrays of a pytree by path. Containers, empty ones included, come back from the abstract state."""
    arrays: dict[str, Any] = {}
    for name, leaf in leaves_by_path(state):
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


def _differ(found: int | str | None, recorded: int | str | None) -> bool:
    """Whether two checksums of one kind differ. A copy in another kind of store has only its size to compare."""
    if isinstance(found, str) and isinstance(recorded, str):
        return found.split()[0] == recorded.split()[0] and found != recorded
    return isinstance(found, int) and isinstance(recorded, int) and found != recorded


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True).encode()


def _sealed(manifest: dict[str, Any]) -> bytes:
    """The bytes of a manifest, with their checksum."""
    return json.dumps({"crc32": zlib.crc32(_canonical(manifest)), "manifest": manifest}).encode()
