"""A benchmark's folder: whose it is, and what was decided when it was begun.

    <run>/config.yaml           the benchmark, complete; it can be given to `lmobj bench` itself
    <run>/plan.json             per arm: steps, what one takes, and fingerprints of what it reads
    <run>/arms/<arm>/seed_<n>/  an ordinary run folder
    <run>/results.jsonl         a line per arm and seed
    <run>/results.md, .svg, .png

Nothing is written before all that can be checked has been, so that a benchmark that is refused can be corrected in its
own folder.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lmobj import _settings, _yaml
from lmobj.bench._config import Benchmark
from lmobj.bench._plan import ArmPlan
from lmobj.errors import UserError
from lmobj.train.run_folder import differing_keys
from lmobj.train.storage import write_atomically

__all__ = ["check_folder", "stored_plans", "write_benchmark"]

_MAY_CHANGE = ("run", "seeds", "metrics", "data.cache", "data.workers")
"""Settings that a benchmark may be continued with other values of: they change nothing that was computed. Runs with
seeds that are no longer asked for stay in results.jsonl and are left out of the tables."""


def check_folder(folder: Path, benchmark: Benchmark) -> None:
    """Makes the folder; one that exists must be empty, or of this benchmark.

    Raises:
      UserError: naming the key that differs, or a place where no folder can be.
    """
    path = folder / "config.yaml"
    if path.is_file():
        for key, before, now in differing_keys(_yaml.read(path).values, _plain(benchmark)):
            if not any(key == free or key.startswith(free + ".") for free in _MAY_CHANGE):
                raise UserError(
                    f"{key} is {now!r}, and the benchmark in {folder} was begun with {before!r}; it goes on with the "
                    f"settings it began with. Restore the value, or choose another folder with run=FOLDER. Free to "
                    f"change: {', '.join(_MAY_CHANGE)}."
                )
    elif folder.exists() and (not folder.is_dir() or any(not p.name.startswith(".") for p in folder.iterdir())):
        raise UserError(
            f"run is {str(folder)!r}, which exists and holds no benchmark; choose another folder with run=FOLDER."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise _no_folder(folder, error) from error


def stored_plans(folder: Path, data: Mapping[str, str], probe: str | None) -> dict[str, ArmPlan] | None:
    """The plans that the benchmark in this folder was begun with, if it was.

    Args:
      folder: of the benchmark.
      data: the fingerprint of each arm's data as it is now.
      probe: the digest of the probe's texts and labels as they are now.

    Raises:
      UserError: data or probe are no longer what they were then.
    """
    path = folder / "plan.json"
    if not path.is_file():
        return None
    plans = {arm: ArmPlan(**values) for arm, values in json.loads(path.read_text(encoding="utf-8")).items()}
    for arm, plan in plans.items():
        for what, before, now in (
            (f"the data of the arm {arm} has", plan.data, data[arm]),
            ("the texts or labels of the probe have", plan.probe, probe),
        ):
            if before != now:
                raise UserError(
                    f"{what} changed: the fingerprint is now {now}, and the benchmark in {folder} was begun with "
                    f"{before}. Restore the files, or choose another folder with run=FOLDER."
                )
    return plans


def write_benchmark(folder: Path, benchmark: Benchmark, plans: Mapping[str, ArmPlan]) -> None:
    """Writes config.yaml and plan.json. Raises UserError where nothing can be written."""
    values = {arm: dataclasses.asdict(plan) for arm, plan in plans.items()}
    try:
        write_atomically(folder / "config.yaml", _yaml.to_yaml(_plain(benchmark)))
        write_atomically(folder / "plan.json", json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise _no_folder(folder, error) from error


def _no_folder(folder: Path, error: Exception) -> UserError:
    return UserError(
        f"run is {str(folder)!r}, which cannot be made ({error}); accepted: a folder in a place that can be written to."
    )


def _plain(benchmark: Benchmark) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(_settings.plain(benchmark)))
    return plain
