"""A search's folder: whose it is.

    <run>/config.yaml      the search, complete; it can be given to `lmobj search` itself
    <run>/study.db         Optuna's study in SQLite
    <run>/trials/<n>/      an ordinary run folder
    <run>/results.jsonl    a line per finished trial
    <run>/best.yaml        the config of the best trial, for `lmobj train`
    <run>/report.html

Nothing is written before all that can be checked has been, so that a search that is refused can be corrected in its own
folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmobj import _settings, _yaml
from lmobj.errors import UserError
from lmobj.search._config import SearchExperiment
from lmobj.train.run_folder import MAY_CHANGE, differing_keys
from lmobj.train.storage import write_atomically

__all__ = ["SearchFolder"]

_MAY_CHANGE = (*MAY_CHANGE, "search.trials", "search.seconds")
"""Settings that a search may be continued with other values of: those of any run, and when it ends."""


class SearchFolder:
    """The paths in a search's folder, and the check that it is of this search."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.study, self.trials = path / "config.yaml", path / "study.db", path / "trials"
        self.results, self.best, self.report = path / "results.jsonl", path / "best.yaml", path / "report.html"

    def trial(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.trials / f"{number:04}"

    def check(self, search: SearchExperiment) -> None:
        """Refuses a folder that holds anything but this search. Writes nothing.

        Raises:
          UserError: naming the key that differs.
        """
        if self.config.is_file():
            for key, before, now in differing_keys(_yaml.read(self.config).values, _plain(search)):
                if not any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE):
                    raise UserError(
                        f"{key} is {now!r}, and the search in {self.path} was begun with {before!r}; it goes on with "
                        "the settings it began with. Restore the value, or choose another folder with run=FOLDER. Free "
                        f"to change: {', '.join(_MAY_CHANGE)}."
                    )
            if self.trials.is_dir() and not self.study.is_file():
                raise UserError(f"{self.study} is missing, and {self.trials} holds its trials; put it back, or choose "
                                "another folder with run=FOLDER.")  # fmt: skip
        elif self.path.exists() and (
            not self.path.is_dir() or any(not p.name.startswith(".") for p in self.path.iterdir())
        ):
            raise UserError(
                f"run is {str(self.path)!r}, which exists and holds no search; choose another folder with run=FOLDER."
            )

    @contextlib.contextmanager
    def in_use(self, search: SearchExperiment) -> Iterator[None]:
        """Makes the folder and writes the config; for the time of the block no other process may do so.

        Raises:
          UserError: another process searches in it, or there can be no such folder.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except (OSError, ValueError) as error:
            raise UserError(
                f"run is {str(self.path)!r}, which cannot be made ({error}); accepted: a folder in a place that can be "
                "written to."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"run is {str(self.path)!r}, in which another process is searching; wait for its end, or choose "
                    "another folder with run=FOLDER."
                ) from None
            write_atomically(self.config, _yaml.to_yaml(_plain(search)))
            yield


def _plain(search: SearchExperiment) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(_settings.plain(search)))
    return plain
