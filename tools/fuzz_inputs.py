"""Malformed configs and data files: each must be refused with exit code 2 and one paragraph, soon, leaving nothing.

    python tools/fuzz_inputs.py                           # 10,000 refusals
    python tools/fuzz_inputs.py --cases 500 --seed 7 --kind setting yaml
    python tools/fuzz_inputs.py --kind parquet --seed 0 --only 12 --show     # one case again, as reported

Cases run in this program's own processes through `lmobj.cli.main`, a sample of them as `python -m lmobj` too, which
must answer the same. It is a failure, which ends the tool with exit code 1, if a malformed input

    raises anything, ends its process, or takes longer than its kind may take,
    is accepted, or is refused with another exit code than 2,
    is refused in more than one line on stderr, with anything on stdout, or without naming the key that is wrong,
    leaves a file behind, or leaves what keeps the same command from working once the input is good again.

Inputs that stayed valid by chance must be read to the end with exit code 0. They are told apart and count for nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import io
import multiprocessing
import os
import resource
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from types import FrameType
from typing import Literal

import fuzz_configs
import fuzz_data
import fuzz_runs
from fuzz_case import Case, Kind

from lmobj.cli import main as lmobj

KINDS: dict[str, Kind] = {**fuzz_configs.KINDS, **fuzz_data.KINDS, **fuzz_runs.KINDS}

_MEMORY = 8 << 30
"""Address space of a process that runs cases: an input that asks for more ends in an error, not in a full machine."""
_GRACE = 30
"""Seconds beyond a kind's limit after which a process that does not even answer its alarm is killed."""
_PROCESS_EVERY = 200
"""One in so many cases runs as a process of its own as well."""


class HangError(BaseException):
    """A case took too long."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case."""

    verdict: Literal["refused", "valid", "failed"]
    what: str = ""
    reason: str = ""
    """Of a failure; else the message."""
    seconds: float = 0.0


def run_case(name: str, seed: int, number: int, *, show: bool = False) -> Outcome:
    """Makes a case in a folder of its own, runs it and judges it."""
    kind = KINDS[name]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        draw = Random(f"{name}:{seed}:{number}")
        case = kind.make(draw, folder)
        if show:
            print(f"{case.what}\nlmobj {' '.join(case.argv)!r:.300}")
        os.chdir(folder)
        try:
            began = time.monotonic()
            answer = _judged(case, kind, folder, twice=draw.random() < 1 / _PROCESS_EVERY)
            seconds = time.monotonic() - began
        finally:
            os.chdir(before)
    return Outcome(answer.verdict, case.what, answer.reason, seconds)


def _judged(case: Case, kind: Kind, folder: Path, *, twice: bool) -> Outcome:
    """Runs a case; `twice`: as a process of its own as well."""
    files = _files(folder)
    try:
        with case.within():
            code, out, err = _called(case.argv, kind.seconds)
        answer = _judge(case, code, out, err)
        if code == 2:
            after = _files(folder)
            changed = sorted(path for path in {**files, **after} if files.get(path) != after.get(path))
            left = [p for p in changed if not p.startswith(case.may_leave) or p.endswith((".partial", ".tmp"))]
            if left:
                return Outcome("failed", reason=f"a refusal changed {', '.join(left[:5])}")
        if twice and answer.verdict == "refused" and case.within is contextlib.nullcontext:
            answer = _same_in_a_process(case, kind, answer)
        if case.repair is not None and answer.verdict == "refused":
            case.repair()
            code, out, err = _called(case.argv, kind.seconds)
            if code != 0:
                return Outcome("failed", reason=f"with the input made good, exit code {code}: {err:.300}")
        return answer
    except HangError:
        return Outcome("failed", reason=f"hang: over {kind.seconds:.0f} s")
    except BaseException as error:
        return Outcome("failed", reason=_where(error))


def _judge(case: Case, code: int, out: str, err: str) -> Outcome:
    """Whether an answer is as it must be."""

    def failed(reason: str) -> Outcome:
        return Outcome("failed", reason=reason)

    if "Traceback" in out + err:
        return failed(f"a traceback on the terminal: {err[-300:]}")
    if code == 0 and not case.malformed:
        return Outcome("valid")
    if code != 2:
        return failed(f"exit code {code} instead of 2: {err or out:.300}")
    if not case.own_words and ("Usage:" in err or "─ Error ─" in err):
        return Outcome("refused", reason=err)
    if not err.startswith("lmobj: "):
        return failed(f"stderr does not begin with `lmobj: `: {err:.300}")
    if not err.endswith("\n") or len(err.rstrip("\n").split("\n")) != 1 or not err[:-1].isprintable():
        return failed(f"stderr is not one line: {err!r:.400}")
    if out:
        return failed(f"a refusal with something on stdout: {out:.300}")
    if len(err) > 20_000:
        return failed(f"a refusal of {len(err)} characters: {err:.200}")
    for name in case.names:
        if name not in err:
            return failed(f"the refusal does not name {name!r}: {err:.400}")
    return Outcome("refused", reason=err)


def _called(argv: tuple[str, ...], seconds: float) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lmobj`, as the terminal would get them, within a time."""
    streams = io.BytesIO(), io.BytesIO()
    out = io.TextIOWrapper(streams[0], encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(streams[1], encoding="utf-8", errors="backslashreplace", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _alarm(seconds):
        code = lmobj(argv)
    out_text, err_text = (stream.getvalue().decode() for stream in streams)
    return code, out_text, err_text


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise HangError

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def _same_in_a_process(case: Case, kind: Kind, expected: Outcome) -> Outcome:
    """The refusal again, if a process of its own gives the same."""
    if any("\0" in argument for argument in case.argv):
        return expected
    command = [sys.executable, "-m", "lmobj", *case.argv]
    try:
        done = subprocess.run(command, capture_output=True, timeout=kind.seconds + _GRACE)
    except subprocess.TimeoutExpired:
        return Outcome("failed", reason="hang as a process of its own")
    answer = _judge(case, done.returncode, done.stdout.decode(), done.stderr.decode())
    if answer == expected:
        return expected
    return Outcome("failed", reason=f"as a process of its own: {answer.verdict}, {answer.reason:.300}")


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file; of folders, that they are there."""
    status = {path: path.lstat() for path in folder.rglob("*")}
    return {
        str(path.relative_to(folder)): (0, 0) if stat.S_ISDIR(found.st_mode) else (found.st_size, found.st_mtime_ns)
        for path, found in status.items()
    }


def _where(error: BaseException) -> str:
    """An exception with the last place in lmobj that it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/lmobj/" in f.filename] or list(frames)
    places = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(ours[-3:]))
    return f"{type(error).__name__} at {places}: {str(error) or '-':.200}"


# --- processes ---


def _serve(pipe: Connection) -> None:
    """Runs the cases that are asked for, until the pipe closes."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(EOFError):
        while True:
            name, seed, number = pipe.recv()
            faulthandler.dump_traceback_later(_longest(name) - 5)  # for one that does not even answer its alarm
            try:
                pipe.send(run_case(name, seed, number))
            except Exception:  # of this tool: commands are run inside another `try`
                pipe.send(traceback.format_exc())


def _longest(name: str) -> float:
    """Seconds after which a process that has not answered is killed: a case may run three commands."""
    return 3 * KINDS[name].seconds + _GRACE


class Worker:
    """A process that runs cases, started anew when a case ends it."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, name: str, seed: int, number: int) -> Outcome:
        limit = _longest(name)
        try:
            self._pipe.send((name, seed, number))
            if self._pipe.poll(limit):
                outcome = self._pipe.recv()
                if isinstance(outcome, str):
                    sys.exit(f"case {number} of {name} cannot be made:\n{outcome}")
                return outcome
            reason = f"hang: no answer within {limit:.0f} s"
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"the process ended with exit code {self.process.exitcode}"
        self.close()
        self._start()
        return Outcome("failed", reason=reason)

    def close(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


# --- the whole ---


class Trial:
    """Cases of several kinds, and what was found."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.verdicts: dict[str, Counter[str]] = {}
        self.slowest: dict[str, tuple[float, int]] = {}
        self.failures = 0

    def run(self, name: str, cases: int, worker: Worker) -> None:
        """Cases of one kind until so many were refused; at most four times as many."""
        counts = self.verdicts[name] = Counter()
        self.slowest[name] = (0.0, 0)
        for number in range(4 * cases):
            if counts["refused"] + counts["failed"] >= cases:
                break
            outcome = worker.run(name, self.seed, number)
            counts[outcome.verdict] += 1
            self.slowest[name] = max(self.slowest[name], (outcome.seconds, number))
            if outcome.verdict == "failed":
                self.failures += 1
                again = f"--kind {name} --seed {self.seed} --only {number}"
                print(f"FAILED {again}: {outcome.what}\n    {outcome.reason}", flush=True)

    def report(self) -> None:
        print(f"\n{'kind':12} {'refused':>8} {'valid':>8} {'failed':>8} {'slowest':>9}")
        for name, counts in self.verdicts.items():
            seconds, number = self.slowest[name]
            shown = " ".join(f"{counts[verdict]:8}" for verdict in ("refused", "valid", "failed"))
            print(f"{name:12} {shown} {seconds:8.2f}s in case {number}")
        total = sum(self.verdicts.values(), Counter())
        print(f"{'all':12} " + " ".join(f"{total[verdict]:8}" for verdict in ("refused", "valid", "failed")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, help="refusals, over all kinds in fixed proportions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--only", type=int, help="run this case of the kind alone, in this process")
    options = parser.parse_args()
    if options.only is not None:
        outcome = run_case(options.kind[0], options.seed, options.only, show=True)
        print(f"{outcome.verdict} in {outcome.seconds:.2f} s: {outcome.reason}")
        return outcome.verdict == "failed"
    trial = Trial(options.seed)
    shares = sum(KINDS[name].share for name in options.kind)
    worker = Worker()
    try:
        for name in options.kind:
            trial.run(name, max(1, round(options.cases * KINDS[name].share / shares)), worker)
    finally:
        worker.close()
        trial.report()
    return 1 if trial.failures else 0


if __name__ == "__main__":
    sys.exit(main())
