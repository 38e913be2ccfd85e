"""The benchmark itself: plan and check every arm, train each with every seed, probe, write down; go on after a kill.

What is in the folder (`_folder`) is used again: arms with a line in results.jsonl are passed over, a run that was begun
is resumed from its last checkpoint, and the plan (with measured times) stays what it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from lmobj.bench._config import Benchmark
from lmobj.bench._line import diverged_line, finished_line
from lmobj.bench._picture import UNITS, draw_results
from lmobj.bench._plan import ArmPlan
from lmobj.bench._prepare import Prepared, Say, prepare
from lmobj.bench._probe import NotFinite
from lmobj.bench._progress import Progress
from lmobj.bench._results import Line, Results, markdown_table, table
from lmobj.errors import UserError
from lmobj.train import FitResult, Halted, Stopped, fit
from lmobj.train.storage import write_atomically

__all__ = ["BenchResult", "run"]


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark leaves: its folder, the lines of results.jsonl, and the table made of them."""

    folder: Path
    lines: list[Line]
    header: list[str]
    rows: list[list[str]]


def run(benchmark: Benchmark, *, quiet: bool = False) -> BenchResult:
    """Runs a benchmark, or what is left of it if its folder holds a part already.

    A run that diverges is written down as such and left out of the means; the others go on.

    Args:
      benchmark: the benchmark; `lmobj.bench.load` reads one from YAML.
      quiet: print nothing.

    Raises:
      UserError: settings that cannot be satisfied, found before anything is trained; a folder of another benchmark.
      Stopped: SIGTERM or SIGINT came; the run in progress was saved. The same call goes on from there.
    """
    if jax.process_count() > 1:
        raise UserError(
            f"this is one of {jax.process_count()} processes, and a benchmark trains, probes and writes in one; "
            "accepted: 1 process, over as many devices of its machine as train.mesh asks for."
        )
    say: Say = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    folder = Path(str(benchmark.run_dir))
    prepared = prepare(benchmark, folder, say, quiet=quiet)
    results = Results(folder / "results.jsonl", benchmark.seeds)
    progress = Progress(benchmark, prepared.plans, results, say)
    for arm, seed in progress:
        line = _measured(prepared, arm, seed, say)
        results.add(line)
        _write_tables(folder, benchmark, results)
        progress.done(line)
    header, rows = _write_tables(folder, benchmark, results)
    say(f"Results: {folder}/results.jsonl, results.md, results.svg, results.png")
    return BenchResult(folder, results.lines, header, rows)


def _measured(prepared: Prepared, arm: str, seed: int, say: Say) -> Line:
    """Trains and probes an arm with a seed, or what is left of it."""
    experiment = prepared.experiment(arm, seed)
    begun = (Path(str(experiment.run_dir)) / "config.yaml").is_file()
    try:
        result = fit(experiment, resume=begun, quiet=True)
        _check_data(arm, result, prepared.plans[arm])
        return finished_line(prepared, arm, seed, result)
    except Stopped:
        say("Stopped, and saved what was done; the same command goes on from here.")
        raise
    except (Halted, NotFinite) as error:
        say(f"  {error}")
        return diverged_line(prepared, arm, seed)


def _check_data(arm: str, result: FitResult, plan: ArmPlan) -> None:
    if result.assembly.dataset.fingerprint != plan.data:
        raise UserError(
            f"the data of the arm {arm} changed while the benchmark ran: its fingerprint was {plan.data} and is "
            f"{result.assembly.dataset.fingerprint}. Restore the files, delete {result.run_dir}, and start again."
        )


def _write_tables(folder: Path, benchmark: Benchmark, results: Results) -> tuple[list[str], list[list[str]]]:
    """results.md and the pictures, of what is finished so far."""
    arms, metrics, budget = list(benchmark.arms), benchmark.metrics, benchmark.budget
    header, rows = table(results, arms, metrics, budget)
    text = (
        f"# {benchmark.name}\n\n{budget.amount:.4g} {UNITS[budget.kind]} per run; mean ± standard deviation over n "
        f"seeds.\n\n{markdown_table(header, rows)}\n{_NOTES}\n![Results](results.svg)\n"
    )
    write_atomically(folder / "results.md", text)
    draw_results(results, folder, arms, metrics, budget, [folder / "results.svg", folder / "results.png"])
    return header, rows


_NOTES = """FLOPs counted: matrix products of the compiled training step, as often as they run. FLOPs 6ND: (6 parameters
+ 12 layers width length) per token. Seconds: warm training steps alone. Untrained: the same probe on the models before
their first step. (2 of 3): the mean of two, because a third has no such number. Diverged: ended by train.guard, or with
hidden states that are not finite, and in no mean.
"""
