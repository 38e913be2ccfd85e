"""kill -9 at random moments of many short runs, saving included: what is lost, and does every run resume.

    python tools/measure_kills.py                    # 100 kills, about half an hour on two CPU cores
    python tools/measure_kills.py --kills 6
    python tools/measure_kills.py --folder gs://bucket/kills

Runs save after every step, so that most of the time a save is under way. Half of the kills come at any moment of a
process's life, from its first import to its report, and half while it trains. After each, the run is resumed, and
killed again; after four kills it is let finish. It is an error, which ends the tool with exit code 1, if

    a run does not resume, or not from exactly the last save that was complete when it was killed,
    a checkpoint that looked complete does not fit its manifest,
    a finished run's metrics or the arrays of its last checkpoint differ in one bit from those of a run never killed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmobj.train.checkpoint import Checkpoints
from lmobj.train.storage import Folder, open_folder

STEPS, EVERY, KILLS_PER_RUN = 40, 1, 4
WORDS = ("the", "a", "fox", "dog", "house", "tree", "sees", "finds", "likes", "red", "old", "quick", "and", "never")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="path or URL for the runs; by default a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        trial = Trial(Path(scratch), options.folder or f"{scratch}/runs", random.Random(options.seed))
        try:
            trial.kill(options.kills)
        except FailedError as error:
            sys.exit(f"FAILED: {error}")
        finally:
            trial.report()


class FailedError(Exception):
    """A run lost more than it may, or did not resume."""


class Trial:
    """The runs, and what was found of them."""

    def __init__(self, scratch: Path, folder: str, draw: random.Random) -> None:
        self.scratch, self.folder, self.draw = scratch, folder, draw
        self.moments: Counter[str] = Counter()
        self.lost: list[int] = []
        self.finished = self.resumed = 0
        self.config = scratch / "kills.yaml"
        text = scratch / "words.txt"
        text.write_text("\n\n".join(" ".join(draw.choices(WORDS, k=60)) for _ in range(300)) + "\n")
        self.config.write_text(
            json.dumps(
                {
                    "data": {
                        "source": {"name": "text", "files": [str(text)], "documents": "blocks"},
                        "tokenizer": {"vocab_size": 300},
                        "length": 32,
                        "validation": 0.1,
                        "cache": str(scratch / "cache"),
                    },
                    "model": {"name": "decoder", "layers": 2, "width": 128, "heads": 4, "max_length": 32},
                    "objective": {"name": "causal_lm"},
                    "train": {
                        "steps": STEPS,
                        "batch_size": 4,
                        "log_every": 1,
                        "evaluate_every": 10,
                        "evaluate_batches": 1,
                        "checkpoint_every": EVERY,
                    },
                }
            )
        )

    # --- processes ---

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        settings = {
            "JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "LMOBJ_CACHE": str(self.scratch / "cache"),
        }
        return subprocess.Popen(
            [sys.executable, "-m", "lmobj", *arguments],
            env={**os.environ, **settings},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def train(self, run: str) -> subprocess.Popen[str]:
        return self.start("train", str(self.config), f"run={run}")

    def kill(self, kills: int) -> None:
        reference = f"{self.folder}/reference"
        self.finish(self.train(f"{self.folder}/compiled"))  # the next one finds everything compiled
        began = time.monotonic()
        self.finish(self.train(reference))
        self.lifetime = time.monotonic() - began
        expected = results(reference)
        for number in itertools.count():
            left = kills - sum(self.moments.values())
            if left <= 0:
                break
            run = f"{self.folder}/{number:03}"
            last: int | None = None
            process = self.train(run)
            for _ in range(min(KILLS_PER_RUN, left)):
                killed = self.strike(process, run)
                before, last = last, last_complete(run)
                self.check(run)
                process = self.start("resume", run) if open_folder(run).has("config.yaml") else self.train(run)
                if killed is None:
                    break
                print(f"run {number:03}: {killed}; complete saves were up to {before}, are up to {last}", flush=True)
            self.finish(process, last)
            if results(run) != expected:
                raise FailedError(f"{run} differs from the run that was never killed")
            self.finished += 1

    def strike(self, process: subprocess.Popen[str], run: str) -> str | None:
        """Kills a process at a random moment and tells which; None if it had ended by itself before that."""
        last = last_complete(run)
        if self.draw.random() < 0.5:
            delay = self.draw.uniform(0, self.lifetime)
        else:
            while process.poll() is None and last_complete(run) == last:
                time.sleep(0.005)
            delay = self.draw.uniform(0, 0.25 * self.lifetime)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(signal.SIGKILL)
        out, error = process.communicate()
        self.check_start(out, error, last)
        if process.returncode not in (0, -signal.SIGKILL):
            raise FailedError(f"{run} ended with {process.returncode}: {error}")
        if process.returncode == 0:
            return None
        killed = moment(open_folder(run))
        self.moments[killed] += 1
        self.lost.append(last_step(open_folder(run)) - (last_complete(run) or 0))
        return killed

    def finish(self, process: subprocess.Popen[str], last: int | None = None) -> None:
        out, error = process.communicate()
        if process.returncode != 0:
            raise FailedError(f"a run does not resume: exit code {process.returncode}: {error}")
        self.check_start(out, error, last)

    def check_start(self, out: str, error: str, last: int | None) -> None:
        """Looks at where a process began, if it came so far."""
        found = re.search(r"Resuming from step (\d+)\.", out)
        if found and int(found[1]) != last:
            raise FailedError(f"resumed from step {found[1]}; the last complete save was {last}. {out}{error}")
        if "damaged" in out + error or "Traceback" in error:
            raise FailedError(out + error)
        self.resumed += bool(found)

    # --- what is found ---

    def check(self, run: str) -> None:
        """Every complete checkpoint is read whole: it fits its manifest, and holds its own step."""
        with Checkpoints(f"{run}/checkpoints") as checkpoints:
            for step in checkpoints.steps:
                state = checkpoints.restore(abstract(run, step), step=step).state
                if int(state["step"]) != step:
                    raise FailedError(f"{run}: the checkpoint of step {step} holds step {state['step']}")

    def report(self) -> None:
        print(f"\n{'killed while':<44}kills")
        for name, count in sorted(self.moments.items(), key=lambda pair: -pair[1]):
            print(f"{name:<44}{count:>5}")
        print(f"{'together':<44}{sum(self.moments.values()):>5}")
        print(f"{'resumed from the last complete save':<44}{self.resumed:>5}")
        print(f"{'runs finished, equal bit for bit':<44}{self.finished:>5}")
        if self.lost:
            print(f"{'most steps since the last complete save':<44}{max(self.lost):>5}")


def moment(run: Folder) -> str:
    """What a killed process was doing, by what it has left."""
    if not run.has("config.yaml"):
        return "starting (no run folder yet)"
    if run.has("report.html"):
        return "ending (report written)"
    folders = [run.child("checkpoints").child(name) for name in run.child("checkpoints").names()]
    if any(not folder.has("manifest.json") for folder in folders):
        return "saving or removing a checkpoint"
    return "between two saves, or starting again" if folders else "before the first save"


def last_complete(run: str) -> int | None:
    with Checkpoints(f"{run}/checkpoints") as checkpoints:
        return checkpoints.latest_step


def lines(run: Folder) -> list[dict[str, Any]]:
    """The metrics without `perf/...`; a last line that was cut off is left out."""
    if not run.has("metrics.jsonl"):
        return []
    parsed = [json.loads(line) for line in run.read("metrics.jsonl").split(b"\n")[:-1]]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in parsed]


def last_step(run: Folder) -> int:
    return max((line["step"] for line in lines(run)), default=0)


def abstract(run: str, step: int) -> dict[str, Any]:
    """The arrays of a checkpoint by path, from its manifest."""
    folder = open_folder(f"{run}/checkpoints")
    name = max(n for n in folder.names() if n.partition(".")[0] == str(step) and folder.child(n).has("manifest.json"))
    arrays = json.loads(folder.child(name).read("manifest.json"))["manifest"]["arrays"]
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in arrays.items()}


def results(run: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Metrics, and the bits of the last checkpoint."""
    with Checkpoints(f"{run}/checkpoints") as checkpoints:
        state = checkpoints.restore(abstract(run, STEPS), step=STEPS).state
    return lines(open_folder(run)), {path: np.asarray(array).tobytes() for path, array in state.items()}


if __name__ == "__main__":
    main()
