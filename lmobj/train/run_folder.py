"""The run folder: where a run keeps everything, and what makes two runs the same run.

config.yaml        the resolved config
tokenizer.model    the tokenizer that the model reads and writes
metrics.jsonl      one JSON object a line: `step`, then names such as `train/loss`
checkpoints/       Orbax checkpoints of the state
tensorboard/       the same metrics as event files
environment.json   versions and devices
baselines.json     what n-gram models reach on the same held-out text
samples.json       texts sampled from the model
report.html        all of it on one page

A task adds eval/ with what is told of each split (`split_report`), where `lmobj eval --task` puts what it found too;
`generation` adds generation.json with texts of several decodings and their figures, `train.guard` bad_batches/ with the
batches that it refused, `train.profile` profile/, and `train.wandb` wandb/ and wandb_id.

It is a path or a URL. For a URL in a store (`gs://...`), checkpoints go there by themselves, and the other files, which
are appended to, are kept in a working copy on this machine. They are sent just before a checkpoint becomes complete and
at the end, so that whoever finds a checkpoint finds the metrics of its steps too; `resume`, on whatever machine, begins
with what is in the store.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from lmobj._yaml import read
from lmobj.errors import UserError
from lmobj.train.distributed import is_first
from lmobj.train.storage import FULL, Place, StoredFolder, local_path, working_copy, write_atomically

__all__ = ["RunFolder", "check_same_run", "differing_keys"]

MAY_CHANGE = (
    "run", "train.mesh", "train.zero", "train.log_every", "train.keep", "train.guard", "train.profile", "train.wandb",
    "data.cache", "data.workers", "generation", "writing",
)  # fmt: skip
"""Keys that `resume` lets differ: they change where and how fast a run goes, never what it computes; or, train.guard,
what becomes of batches that would end it, and, generation and writing, what is told of the model at the end."""

_CHECKPOINTS = "checkpoints"


class RunFolder:
    """A run folder's paths, its creation, and its way to and from a store.

    Args:
      place: path or URL.
    """

    def __init__(self, place: Place) -> None:
        path = local_path(place)
        self._store = None if path is not None else StoredFolder(os.fspath(place))
        self.path = path if path is not None else working_copy(os.fspath(place))
        """Where the files are on this machine."""
        self._sent: dict[str, tuple[int, int]] = {}

    def __str__(self) -> str:
        """The path or URL, as messages show it."""
        return str(self.path if self._store is None else self._store)

    @property
    def in_store(self) -> bool:
        """Whether the files here are a working copy of those in a store."""
        return self._store is not None

    @property
    def config(self) -> pathlib.Path:
        """The resolved config, as YAML."""
        return self.path / "config.yaml"

    @property
    def tokenizer(self) -> pathlib.Path:
        """The SentencePiece model of the run's tokenizer."""
        return self.path / "tokenizer.model"

    @property
    def metrics(self) -> pathlib.Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> pathlib.Path:
        """Where traces of `train.profile` go."""
        return self.path / "profile"

    @property
    def checkpoints(self) -> str:
        """Path or URL of the folder of checkpoints."""
        return f"{self}/{_CHECKPOINTS}"

    @property
    def resume_command(self) -> str:
        """What a person types in a shell to continue this run."""
        return f"lmobj resume {shlex.quote(str(self))}"

    def create(self, config_yaml: str) -> None:
        """Makes the folder and writes the config. Refuses a folder that exists with anything in it."""
        self.check_free()
        try:
            if self._store is not None and self.path.exists():
                shutil.rmtree(self.path)  # the working copy of a run that has been deleted from the store
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config_yaml)
        except (OSError, ValueError) as error:  # ValueError: no name that a folder can have
            raise UserError(
                f"run is {str(self)!r}, which cannot be made ({error}); accepted: a folder in a place that can be "
                "written to."
            ) from error
        self.publish()

    def check_free(self) -> None:
        """Raises UserError if the folder already holds something."""
        if self._store is not None:
            taken = bool(self._store.names())
        elif os.path.isdir(self.path):  # a process killed while it wrote the config leaves a hidden file
            taken = any(not path.name.startswith(f".{self.config.name}.") for path in self.path.iterdir())
        else:
            taken = os.path.lexists(self.path)
        if taken:
            raise UserError(
                f"run is {str(self)!r}, which already exists; continue it with `{self.resume_command}`, choose another "
                "with run=FOLDER, or delete it."
            )

    def check_exists(self) -> None:
        """Raises UserError if this is not a run folder. Afterwards `config` can be read."""
        if self._store is not None and self._store.has(self.config.name):
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, self._store.read(self.config.name))
        elif self._store is not None or not os.path.isfile(self.config):
            raise UserError(
                f"{str(self)!r} is not a run folder: it holds no config.yaml; accepted: a folder made by `lmobj train`."
            )

    def fetch(self) -> None:
        """Makes the working copy that of the store; a folder that is no store's stays as it is."""
        if self._store is None:
            return
        if self.path.exists():
            shutil.rmtree(self.path)
        for name in self._store.sizes():
            if not name.startswith(f"{_CHECKPOINTS}/"):
                self._store.fetch(name, self.path / name)

    def fetched(self, name: str) -> pathlib.Path | None:
        """One of the folder's files, which is brought here from a store; None if there is no such."""
        path = self.path / name
        if self._store is not None:
            if not self._store.has(name):
                return None
            path.parent.mkdir(parents=True, exist_ok=True)
            self._store.fetch(name, path)
        return path if path.is_file() else None

    def fetched_tokenizer(self) -> pathlib.Path:
        """The tokenizer's file, which is brought here from a store. Raises UserError if the run has none."""
        name = self.tokenizer.name
        if self.fetched(name) is None:
            raise UserError(f"{str(self)!r} has no {name}; accepted: a run that keeps one, or its data.tokenizer.path.")
        return self.tokenizer

    def publish(self, pattern: str = "*") -> None:
        """Sends what has changed in the working copy, and matches, to the store. Only the first process does."""
        if self._store is None or not is_first():
            return
        for path in sorted(self.path.rglob(pattern)):
            name = path.relative_to(self.path).as_posix()
            if path.is_file() and not path.name.startswith("."):
                status = path.stat()
                mark = (status.st_size, status.st_mtime_ns)  # taken first: what is appended meanwhile goes next time
                if self._sent.get(name) != mark:
                    self._store.send(path, name)
                    self._sent[name] = mark

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While a run writes its files: however it ends, they are sent; a full disk becomes a UserError."""
        try:
            try:
                yield
            except (Exception, SystemExit):
                with contextlib.suppress(UserError):  # what ended the run matters more
                    self.publish()
                raise
            self.publish()
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"There is no room left for the files of the run ({error.strerror}: {error.filename or self.path}). "
                f"Free some space, then continue with `{self.resume_command}`."
            ) from error

    def check_config(self, current: Mapping[str, Any]) -> None:
        """Raises UserError if the resolved config differs from the folder's in more than what may change.

        For a run without a checkpoint, which would otherwise start anew under a config.yaml that is not its own.
        """
        _check_same_config(read(self.config).values, current, "the run was made with")

    def write_json(self, name: str, value: Any) -> None:
        """Writes one of the folder's JSON files whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def remove(self, name: str) -> None:
        """Removes a file that `add` wrote, if it is there."""
        (self.path / name).unlink(missing_ok=True)
        if self._store is not None:
            self._store.delete(name)

    def add(self, name: str, text: str) -> pathlib.Path:
        """Writes one more file of a finished run, in the place of one of this name, and sends it where the run is kept.

        Raises:
          UserError: the folder cannot be written to.
        """
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            raise UserError(f"{str(path)!r} cannot be written ({error.strerror or error}).") from error
        if self._store is not None:
            self._store.send(path, name)
        return path


def check_same_run(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to open a run when the config or the data are not those the checkpoint was made with.

    Args:
      stored: `Assembly.identity` that the checkpoint was made with.
      current: that of the config and data at hand.

    Raises:
      UserError: naming the first differing key and both values.
    """
    _check_same_config(stored["config"], current["config"], "the checkpoint was made with")
    if stored["data"] != current["data"]:
        raise UserError(
            f"The data has changed: data.source and data.tokenizer now have the fingerprint {current['data']}, "
            f"and the checkpoint was made with {stored['data']}. Restore the files, or start a new run."
        )


def _check_same_config(stored: Mapping[str, Any], current: Mapping[str, Any], owner: str) -> None:
    for key, before, now in differing_keys(stored, current):
        if before == _MISSING and not now:
            continue  # a setting that came after the run, and is off
        if not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE):
            raise UserError(
                f"{key} is {now!r}, and {owner} {before!r}; a run continues with the config it began with. Restore "
                f"the value, or start a new run. Free to change: {', '.join(MAY_CHANGE)}."
            )


_MISSING = "(not set)"


def differing_keys(
    before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ between two nested mappings, with both values."""
    for key in sorted({*before, *after}):
        old, new = before.get(key, _MISSING), after.get(key, _MISSING)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differing_keys(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key}", old, new
