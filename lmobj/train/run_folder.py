"""The run folder: where a run keeps everything, and what makes two runs the same run.

config.yaml        the resolved config
metrics.jsonl      one JSON object a line: `step`, then names such as `train/loss`
checkpoints/       Orbax checkpoints of the state
tensorboard/       the same metrics as event files
environment.json   versions and devices
baselines.json     what n-gram models reach on the same held-out text
samples.json       texts sampled from the model
report.html        all of it on one page
"""

from __future__ import annotations

import json
import os
import pathlib
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lmobj._yaml import read
from lmobj.errors import UserError

__all__ = ["RunFolder", "check_same_run", "differing_keys", "write_atomically"]

MAY_CHANGE = ("run", "train.mesh", "train.log_every", "train.keep", "data.cache", "data.workers")
"""Keys that `resume` lets differ: they change where and how fast a run goes, never what it computes."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder, and its creation."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The resolved config, as YAML."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> pathlib.Path:
        """The metrics, one JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def resume_command(self) -> str:
        """What a person types in a shell to continue this run."""
        return f"lmobj resume {shlex.quote(str(self.path))}"

    def create(self, config_yaml: str) -> None:
        """Makes the folder and writes the config. Refuses a folder that exists with anything in it."""
        self.check_free()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.config, config_yaml)
        except OSError as error:
            raise UserError(
                f"run is {str(self.path)!r}, which cannot be made ({error.strerror}); accepted: a folder in a place "
                "that can be written to."
            ) from error

    def check_free(self) -> None:
        """Raises UserError if the folder already holds something."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(
                f"run is {str(self.path)!r}, which already exists; continue it with `{self.resume_command}`, "
                "choose another with run=FOLDER, or delete it."
            )

    def check_exists(self) -> None:
        """Raises UserError if this is not a run folder."""
        if not self.config.is_file():
            raise UserError(
                f"{str(self.path)!r} is not a run folder: it holds no config.yaml; accepted: a folder made by "
                "`lmobj train`."
            )

    def check_config(self, current: Mapping[str, Any]) -> None:
        """Raises UserError if the resolved config differs from the folder's in more than what may change.

        For a run without a checkpoint, which would otherwise start anew under a config.yaml that is not its own.
        """
        _check_same_config(read(self.config).values, current, "the run was made with")

    def write_json(self, name: str, value: Any) -> None:
        """Writes one of the folder's JSON files whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old text or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


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
