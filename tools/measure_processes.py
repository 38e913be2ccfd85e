"""Measures training in several real processes on this machine, and what happens when one of them ends early.

    PYTHONPATH=. python tools/measure_processes.py            about 15 minutes on 2 cores

Four fake devices in all are shared out to 1, 2 or 4 processes. Every run has 20 steps in float64 with dropout on, and
is compared with that of one process: the rows that each step read, every `train/*` and `eval/*` value, and the final
state, which holds the optimizer's moments too. Then processes are killed, stopped, made to fail, left out, or given
another config, and it is measured how long the others take to end. Ends with exit code 1 if a limit is missed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

STEPS = 20
DEVICES = 4
"""In all processes together."""
LIMIT = 1e-10
ROOT = pathlib.Path(__file__).parent.parent
GLOO = re.compile(
    r"\[Gloo\] Rank "
    r"(?:\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : |\d+|\n)*\n"
)
"""What connects CPU devices prints such lines, piece by piece and from several threads: pieces of two may mix."""


class Ended(NamedTuple):
    """How one process ended."""

    code: int
    out: str
    err: str
    at: float
    """Seconds on the monotonic clock."""


class Trace(NamedTuple):
    """What one row of a step's batch was."""

    row_id: tuple[int, int]
    tokens: int
    """CRC-32 of its tokens."""


def run(
    count: int,
    *arguments: str,
    trace: pathlib.Path,
    own: Mapping[int, Sequence[str]] | None = None,
    faults: Mapping[int, str] | None = None,
    absent: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> list[Ended]:
    """Runs `lmobj` in `count` processes on loopback and waits for all. None outlives this call.

    Args:
      arguments: those of every process.
      trace: folder for the rows that each process reads, one file a process.
      own: further arguments of single processes.
      faults: what happens to single processes, as `child` has it.
      absent: processes that are never started.
      environment: variables over those of this process.
      timeout: seconds, after which subprocess.TimeoutExpired is raised.
    """
    trace.mkdir(parents=True, exist_ok=True)
    address = f"127.0.0.1:{_free_port()}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} --xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
        **(environment or {}),
    }
    until, processes, told = time.monotonic() + timeout, {}, {}
    with contextlib.ExitStack() as stack:
        for rank in (rank for rank in range(count) if rank not in absent):
            place = ["--coordinator", address, "--processes", str(count), "--process", str(rank)] if count > 1 else []
            given = [*arguments, *(own or {}).get(rank, ()), *place]
            told[rank] = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)]
            processes[rank] = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, __file__, "child", str(trace / f"{rank}"), (faults or {}).get(rank, ""), *given],
                    env=environment,
                    stdout=told[rank][0],
                    stderr=told[rank][1],
                )
            )
            stack.callback(processes[rank].kill)
        at: dict[int, float] = {}
        while len(at) < len(processes):
            at |= {
                rank: time.monotonic() for rank, one in processes.items() if rank not in at and one.poll() is not None
            }
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(sys.executable, timeout)
            time.sleep(0.05)
        ended = []
        for rank, process in processes.items():
            texts = []
            for file in told[rank]:
                file.seek(0)
                texts.append(GLOO.sub("", file.read()))
            ended.append(Ended(process.returncode, texts[0], texts[1], at[rank]))
        return ended


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def child(trace: str, fault: str, arguments: list[str]) -> int:
    """One process: lmobj, with the rows of every training step written down.

    Args:
      trace: the file for them.
      fault: what happens as the batch of a step has been read, as STEP:kill, STEP:term, STEP:raise or STEP:refuse.
      arguments: those of lmobj.
    """
    from lmobj.cli import main
    from lmobj.errors import UserError
    from lmobj.train import Assembly

    batches, (when, _, what) = Assembly.batches, fault.partition(":")

    def traced(
        self: Assembly, split: str, *, start: int = 0, steps: int | None = None, **options: Any
    ) -> Iterator[Any]:
        found = batches(self, split, start=start, steps=steps, **options)
        if split != "train" or (start, steps) == (0, 1):  # an evaluation, or the look at one batch before training
            yield from found
            return
        local = range(self.config.train.batch_size) if self.local_rows[""] is None else self.local_rows[""].tolist()
        for step, batch in enumerate(found, start + 1):
            rows = [
                (row, *ids, zlib.crc32(tokens.tobytes()))
                for row, ids, tokens in zip(local, batch["row_ids"].tolist(), batch["tokens"], strict=True)
            ]
            with open(trace, "a") as file:
                file.write(json.dumps([step, rows]) + "\n")
            if str(step) == when:
                misfortune(what)
            yield batch

    def misfortune(what: str) -> None:
        if what == "raise":
            raise RuntimeError("a bug")
        if what == "refuse":
            raise UserError("the disk is full")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[what])

    Assembly.batches = traced  # type: ignore[method-assign]
    return main(arguments)


def rows_read(trace: pathlib.Path, first: int = 1, last: int = STEPS) -> dict[int, dict[int, Trace]]:
    """The rows of the steps first to last that the processes of one run read: {step: {row of the batch: row}}.

    Raises:
      AssertionError: two processes read something else for one row.
    """
    found: dict[int, dict[int, Trace]] = {}
    for file in trace.iterdir():
        for step, rows in map(json.loads, file.read_text().splitlines()):
            if first <= step <= last:
                for row, source, example, tokens in rows:
                    here = Trace((source, example), tokens)
                    assert found.setdefault(step, {}).setdefault(row, here) == here, (step, row)
    return {step: dict(sorted(found[step].items())) for step in sorted(found)}


def saved(folder: pathlib.Path) -> int:
    """The step of a run's newest checkpoint."""
    from lmobj.train.checkpoint import Checkpoints

    with Checkpoints(folder / "checkpoints") as checkpoints:
        return checkpoints.latest_step or 0


def metrics(folder: pathlib.Path) -> dict[tuple[int, str], float]:
    """Every `train/*` and `eval/*` value of a run by (step, name)."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        (line["step"], name): value
        for line in lines
        for name, value in line.items()
        if name.startswith(("train/", "eval/"))
    }


def metrics_gap(one: pathlib.Path, other: pathlib.Path) -> float:
    """The largest relative difference between the metrics of two runs; infinite where one lacks a value."""
    a, b = metrics(one), metrics(other)
    if not a or a.keys() != b.keys():
        return math.inf
    return max(abs(a[key] - b[key]) / max(abs(a[key]), 1e-300) if a[key] != b[key] else 0.0 for key in a)


def state_gap(one: pathlib.Path, other: pathlib.Path, step: int = STEPS) -> float:
    """The largest relative distance by norm between arrays of two runs' checkpoints; infinite where they do not fit.

    Arrays under 1e-12 of the largest one's norm count as equal: a key bias of attention, which has no gradient.
    """
    x, y = (stored(folder, step) for folder in (one, other))
    if x.keys() != y.keys():
        return math.inf
    norms = {name: max(np.linalg.norm(x[name]), np.linalg.norm(y[name])) for name in x}
    noise = 1e-12 * max(norms.values())
    return max(float(np.linalg.norm(x[n] - y[n]) / norms[n]) for n in x if norms[n] > noise)


def stored(folder: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a run's checkpoint by their paths in the state."""
    import jax

    from lmobj.train.checkpoint import Checkpoints

    manifest = json.loads((folder / "checkpoints" / str(step) / "manifest.json").read_text())["manifest"]
    abstract = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in manifest["arrays"].items()}
    with jax.enable_x64(True), Checkpoints(folder / "checkpoints") as checkpoints:
        state = checkpoints.restore(abstract, step=step).state
    return {name: np.asarray(array, np.float64) for name, array in state.items()}


# --- the measurement ----------------------------------------------------------------------------------------------


def experiments() -> Iterator[Any]:
    """A decoder on packed rows and an encoder on the same, each on Python's documentation."""
    from measure_exactness import adjusted
    from measure_exactness import experiments as both

    for config in both():
        yield adjusted(
            dataclasses.replace(config, sample=()),
            dtype="float64",
            log_every=1,
            evaluate_every=10,
            evaluate_batches=2,
            checkpoint_every=4,
        )


class Measurement:
    """Runs of one config in a folder, against the run of one process; tells every figure."""

    def __init__(self, config: Any, folder: pathlib.Path) -> None:
        from lmobj.config import dump

        self.name, self.folder, self.missed = config.objective.name, folder, 0
        self.yaml = folder / "experiment.yaml"
        self.yaml.write_text(dump(config))
        ended = self.train("alone", 1)
        assert ended[0].code == 0, ended[0].err
        self.rows = rows_read(folder / "alone-rows")

    def train(self, name: str, count: int, *settings: str, **options: Any) -> list[Ended]:
        """A new run of the config in its own folder."""
        arguments = ["train", str(self.yaml), f"run={self.folder / name}", *settings, "--quiet"]
        return run(count, *arguments, *_SHORT[: 4 * (count > 1)], trace=self.folder / f"{name}-rows", **options)

    def tell(self, what: str, figure: float, limit: float, unit: str = "") -> None:
        """Prints one figure beside its limit."""
        self.missed += not figure <= limit
        print(f"{self.name:<10} {what:<58} {figure:9.2g}{unit}   limit {limit:g}{unit}", flush=True)

    def compare(self, what: str, name: str, rows: dict[int, dict[int, Trace]]) -> None:
        """Tells how far a finished run is from that of one process."""
        self.tell(f"{what}: steps whose rows differ", sum(rows.get(s) != self.rows[s] for s in self.rows), 0)
        self.tell(f"{what}: metrics", metrics_gap(self.folder / "alone", self.folder / name), LIMIT)
        self.tell(f"{what}: final state", state_gap(self.folder / "alone", self.folder / name), LIMIT)

    def whole_runs(self) -> None:
        """The same run on other process counts and meshes, whose axes lie inside the processes and across them."""
        for count, mesh in (
            (2, (4, 1, 1)),
            (2, (1, 4, 1)),
            (2, (1, 2, 2)),
            (2, (1, 1, 4)),
            (4, (2, 2, 1)),
            (4, (1, 1, 4)),
        ):
            axes = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
            name = f"{count} processes, {' '.join(f'{axis} {size}' for axis, size in axes.items())}"
            ended = self.train(name, count, *(f"train.mesh.{axis}={size}" for axis, size in axes.items()))
            assert [process.code for process in ended] == [0] * count, ended
            self.compare(name, name, rows_read(self.folder / f"{name}-rows"))

    def interrupted(self, fault: str, code: int) -> None:
        """One of two processes meets a fault at step 14; the run goes on with 1, 2 and 4."""
        first, other = self.train(fault, 2, faults={1: f"14:{fault}"})
        told = (first.code, other.code, first.err)
        if fault == "term":
            assert told == (143, 143, ""), told
        elif fault == "kill":  # whoever notices first, the devices or the heartbeat, decides what is said
            assert (first.code != 0, other.code) == (True, code), told
        else:
            assert (first.code != 0, other.code, first.err.count("\n")) == (True, code, 1), told
        self.tell(f"{fault}: from the end of one to the end of the other", abs(first.at - other.at), 30, " s")
        folder = self.folder / fault
        reached = saved(folder)
        before = rows_read(self.folder / f"{fault}-rows", last=reached)
        for count in (1, 2, 4):
            name = f"{fault}, resumed on {count}"
            shutil.copytree(folder, self.folder / name)
            trace = self.folder / f"{name}-rows"
            ended = run(count, "resume", str(self.folder / name), "--quiet", *_SHORT[: 4 * (count > 1)], trace=trace)
            assert [process.code for process in ended] == [0] * count, ended
            after = rows_read(trace)
            self.tell(f"{name}: steps done twice", len(before.keys() & after.keys()), 0)
            self.compare(name, name, before | after)

    def refusals(self) -> None:
        """What ends with one paragraph and exit code 2."""
        cases: dict[str, tuple[int, dict[str, Any]]] = {
            "process 2 of 3 never joins": (3, {"absent": [2]}),
            "process 0 of 2 never joins": (2, {"absent": [0]}),
            "another seed in process 1": (2, {"own": {1: ["train.seed=1"]}}),
            "a misspelt key in process 1": (2, {"own": {1: ["train.sed=1"]}}),
        }
        for what, (count, options) in cases.items():
            ended, seconds = _timed(lambda count=count, options=options: self.train("refused", count, **options))
            assert {process.code for process in ended} == {2}, ended
            assert all(process.err.count("\n") <= 1 for process in ended), ended
            assert not (self.folder / "refused").exists()
            self.tell(f"{what}: seconds until all have ended", seconds, 60, " s")


_SHORT = ("--join-timeout", "10", "--heartbeat", "10")
"""Less patience than by default, so that the measurement ends."""


def _timed(work: Any) -> tuple[Any, float]:
    started = time.monotonic()
    return work(), time.monotonic() - started


def main() -> int:
    """Prints one line per figure."""
    missed = 0
    for config in experiments():
        with tempfile.TemporaryDirectory() as folder:
            measurement = Measurement(config, pathlib.Path(folder))
            measurement.whole_runs()
            for fault, code in (("kill", -signal.SIGKILL), ("term", 143), ("refuse", 2), ("raise", 1)):
                measurement.interrupted(fault, code)
            measurement.refusals()
            missed += measurement.missed
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2], sys.argv[3], sys.argv[4:]) if sys.argv[1:2] == ["child"] else main())
