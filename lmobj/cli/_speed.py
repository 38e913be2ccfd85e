"""What `lmobj speed` reads and prints."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lmobj.errors import UserError

__all__ = ["print_speed"]


def print_speed(
    arguments: Sequence[str],
    peers: bool,
    steps: int | None,
    seconds: float,
    as_json: bool,
    print_table: Callable[..., None],
) -> int:
    """Measures and prints; returns 1 if lmobj failed in a row, else 0."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if peers:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs some of the memory too
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lmobj import speed
    from lmobj.config import load
    from lmobj.train.flops import FORMULA

    configs = [argument for argument in arguments if "=" not in argument or Path(argument).is_file()]
    if not configs:
        raise UserError("there is no config to measure; accepted: one or more YAML files, then key=value settings.")
    overrides = [argument for argument in arguments if argument not in configs]
    experiments = {config: load(config, overrides) for config in configs}
    contenders = speed.CONTENDERS if peers else speed.CONTENDERS[:1]
    if peers:
        for experiment in experiments.values():
            speed.check_peer(experiment)
    found: dict[str, dict[str, Any]] = speed.measure_each(
        experiments, contenders, seconds=seconds / speed.TURNS, steps=steps
    )
    if as_json:
        print(json.dumps({"formula": FORMULA, "experiments": found}))
    else:
        rows = [row for name, one in found.items() for row in speed.speed_rows(name, one)]
        filled = [i for i in range(len(speed.HEADER)) if any(row[i] for row in rows)]
        print_table([speed.HEADER[i] for i in filled], [[row[i] for i in filled] for row in rows])
        print()
        for line in speed.notes(found.values()):
            print(line)
    return int(any("error" in one or one["contenders"][0]["error"] for one in found.values()))
