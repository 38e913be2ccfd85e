"""The benchmark itself: plan every arm, train each with every seed, probe, write down; and go on after a kill.

    <run>/config.yaml           the benchmark, complete; it can be given to `lmobj bench` itself
    <run>/plan.json             per arm: steps, and what one takes
    <run>/arms/<arm>/seed_<n>/  an ordinary run folder
    <run>/results.jsonl         a line per arm and seed
    <run>/results.md, .svg, .png

What is in the folder is used again: arms with a line in results.jsonl are passed over, a run that was begun is resumed
from its last checkpoint, and the plan (with measured times) stays what it was.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from lmobj import _settings, _yaml
from lmobj.bench._compare import check_comparable, check_same_data, differing_data
from lmobj.bench._config import Benchmark, experiments
from lmobj.bench._labelled import ProbeData, labelled_texts
from lmobj.bench._picture import UNITS, draw_results
from lmobj.bench._plan import ArmPlan, plan_arm
from lmobj.bench._probe import majority, probe_model
from lmobj.bench._probe_config import Probe
from lmobj.bench._progress import Progress
from lmobj.bench._results import Line, Results, markdown_table, table
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.train import FitResult, Stopped, assemble, fit
from lmobj.train.assemble import Assembly
from lmobj.train.environment import environment
from lmobj.train.run_folder import differing_keys
from lmobj.train.step import State
from lmobj.train.storage import write_atomically
from lmobj.train.summary import check_samples
from lmobj.train.tracking import read_metrics

__all__ = ["BenchResult", "run"]

_MAY_CHANGE = ("run", "seeds", "metrics", "data.cache", "data.workers")
"""Settings that a benchmark may be continued with other values of: they change nothing that was computed. Runs with
seeds that are no longer asked for stay in results.jsonl and are left out of the tables."""


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What a benchmark leaves: its folder, the lines of results.jsonl, and the table made of them."""

    folder: Path
    lines: list[Line]
    header: list[str]
    rows: list[list[str]]


def run(benchmark: Benchmark, *, quiet: bool = False) -> BenchResult:
    """Runs a benchmark, or what is left of it if its folder holds a part already.

    Args:
      benchmark: the benchmark; `lmobj.bench.load` reads one from YAML.
      quiet: print nothing.

    Raises:
      UserError: settings that cannot be satisfied, found before anything is trained; a folder of another benchmark.
      Stopped: SIGTERM or SIGINT came; the run in progress was saved. The same call goes on from there.
    """
    say: Callable[[str], None] = (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    folder = Path(str(benchmark.run_dir))
    _check_folder(folder, benchmark)
    bases = experiments(benchmark)
    say(f"Preparing {len(bases)} arms of {benchmark.name}.")
    arms = {arm: _assembled(arm, base, quiet) for arm, base in bases.items()}
    check_same_data(arms)
    check_comparable(arms, benchmark.metrics)
    for difference in differing_data(arms):
        say(f"The arms read different data: {difference}.")
    data = {} if benchmark.probe is None else _probe_data(benchmark, arms)
    plans = _plans(folder, benchmark, arms, say)
    del arms  # each run assembles its own, with its steps and seed
    results = Results(folder / "results.jsonl", benchmark.seeds)
    progress = Progress(benchmark, plans, results, say)
    for arm, seed in progress:
        place = folder / "arms" / arm / f"seed_{seed}"
        experiment = plans[arm].experiment(bases[arm], name=f"{benchmark.name}-{arm}", run=str(place), seed=seed)
        try:
            result = fit(experiment, resume=(place / "config.yaml").is_file(), quiet=True)
        except Stopped:
            say("Stopped, and saved what was done; the same command goes on from here.")
            raise
        _check_data(arm, result, plans[arm])
        line = finished_line(benchmark, arm, seed, plans[arm], result, data.get(arm))
        results.add(line | {"run": str(place.relative_to(folder))})
        _write_tables(folder, benchmark, results)
        progress.done(line)
    header, rows = _write_tables(folder, benchmark, results)
    say(f"Results: {folder}/results.jsonl, results.md, results.svg, results.png")
    return BenchResult(folder, results.lines, header, rows)


def _check_folder(folder: Path, benchmark: Benchmark) -> None:
    """Makes the folder and writes the config; a folder that exists must be of this benchmark.

    Raises:
      UserError: naming the key that differs.
    """
    path, current = folder / "config.yaml", json.loads(json.dumps(_settings.plain(benchmark)))
    if path.is_file():
        for key, before, now in differing_keys(_yaml.read(path).values, current):
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
        write_atomically(path, _yaml.to_yaml(current))
    except (OSError, ValueError) as error:
        raise UserError(
            f"run is {str(folder)!r}, which cannot be made ({error}); accepted: a folder in a place that can be "
            "written to."
        ) from error


def _assembled(arm: str, base: Experiment, quiet: bool) -> Assembly:
    """The parts of an arm's run, as its file has them; the budget changes nothing but their number of steps."""
    try:
        parts = assemble(base, quiet=quiet)
        check_samples(parts)
    except UserError as error:
        raise UserError(f"arm {arm}: {error}") from None
    return parts


def _probe_data(benchmark: Benchmark, arms: Mapping[str, Assembly]) -> dict[str, ProbeData]:
    """The probe's texts for each arm: the same for all whose data is the same."""
    assert benchmark.probe is not None
    found: dict[str, ProbeData] = {}
    by_data: dict[str, ProbeData] = {}
    for arm, parts in arms.items():
        fingerprint = parts.dataset.fingerprint
        if fingerprint not in by_data:
            by_data[fingerprint] = labelled_texts(benchmark.probe, parts.dataset)
        found[arm] = by_data[fingerprint]
    if len({json.dumps(data.test) for data in found.values()}) > 1:
        raise UserError(
            f"probe.name is {benchmark.probe.name}, which makes its texts from the data of each arm, and the arms read "
            "different data; accepted: a probe on files, or arms with the same data."
        )
    return found


def _plans(
    folder: Path, benchmark: Benchmark, arms: Mapping[str, Assembly], say: Callable[[str], None]
) -> dict[str, ArmPlan]:
    """The plan of each arm: that of plan.json where there is one, else made now and written there."""
    path = folder / "plan.json"
    if path.is_file():
        plans = {arm: ArmPlan(**values) for arm, values in json.loads(path.read_text(encoding="utf-8")).items()}
        for arm, plan in plans.items():
            if plan.data != arms[arm].dataset.fingerprint:
                raise UserError(
                    f"the data of the arm {arm} has changed: it now has the fingerprint "
                    f"{arms[arm].dataset.fingerprint}, and the benchmark in {folder} was begun with {plan.data}. "
                    "Restore the files, or choose another folder with run=FOLDER."
                )
    else:
        plans = {}
        for arm, parts in arms.items():
            say(f"Compiling {arm} to count what a step takes.")
            plans[arm] = plan_arm(arm, parts, benchmark.budget)
        values = {arm: dataclasses.asdict(plan) for arm, plan in plans.items()}
        write_atomically(path, json.dumps(values, indent=2) + "\n")
    say(f"Budget per run: {benchmark.budget.amount:.4g} {UNITS[benchmark.budget.kind]}.")
    for arm, plan in plans.items():
        timed = "" if plan.seconds_per_step is None else f", {plan.seconds_per_step:.4f} s measured"
        say(
            f"  {arm}: {plan.steps:,} steps of {plan.tokens_per_step:,} tokens, {plan.flops_per_step:.3e} FLOPs each "
            f"({plan.formula_flops_per_step:.3e} by 6ND and attention){timed}; {plan.parameters:,} parameters"
        )
    return plans


def _check_data(arm: str, result: FitResult, plan: ArmPlan) -> None:
    if result.assembly.dataset.fingerprint != plan.data:
        raise UserError(
            f"the data of the arm {arm} changed while the benchmark ran: its fingerprint was {plan.data} and is "
            f"{result.assembly.dataset.fingerprint}. Restore the files, delete {result.run_dir}, and start again."
        )


def finished_line(
    benchmark: Benchmark, arm: str, seed: int, plan: ArmPlan, result: FitResult, data: ProbeData | None
) -> Line:
    """The line of results.jsonl for a finished run.

    `seconds` is the time of its training steps: their number times the median of a warm one, without compiling,
    evaluating and saving. `metrics` are the last of each, under the names of metrics.jsonl.
    """
    parts = result.assembly
    step = _seconds_per_step(result.run_dir)
    facts = environment()
    probe: dict[str, Any] | None = None
    if benchmark.probe is not None and data is not None:
        probe = {
            "name": benchmark.probe.name,
            **_scores(benchmark.probe, data, parts, result.state),
            "train": len(data.train),
            "test": len(data.test),
            "untrained": _scores(benchmark.probe, data, parts, parts.initial_state()),
            "majority": majority(data).as_dict(),
        }
    return {
        "arm": arm,
        "seed": seed,
        "objective": getattr(parts.objective, "name", type(parts.objective).__name__),
        "model": getattr(parts.config.model, "name", type(parts.config.model).__name__),
        "parameters": plan.parameters,
        "steps": plan.steps,
        "tokens": plan.steps * plan.tokens_per_step,
        "flops": plan.steps * plan.flops_per_step,
        "flops_formula": plan.steps * plan.formula_flops_per_step,
        "seconds": None if step is None else plan.steps * step,
        "seconds_per_step_planned": plan.seconds_per_step,
        "budget": {benchmark.budget.kind: benchmark.budget.amount},
        "metrics": dict(result.metrics),
        "probe": probe,
        "data": plan.data,
        "versions": {"lmobj": facts["lmobj"], "python": facts["python"], **facts["packages"], **_sklearn(probe)},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "finished": facts["started"],
    }


def _scores(probe: Probe, data: ProbeData, parts: Assembly, state: State) -> dict[str, Any]:
    """What a probe finds in a state of a run's model."""
    model, tokenizer = parts.model(state), parts.dataset.tokenizer
    scores = probe_model(probe, data, model=model, tokenizer=tokenizer, rows=parts.spec)
    return scores.as_dict()


def _sklearn(probe: object) -> dict[str, str]:
    """The version of the package that fitted the probe, if there is one."""
    if probe is None:
        return {}
    import sklearn

    return {"scikit-learn": sklearn.__version__}


def _seconds_per_step(run_dir: Path) -> float | None:
    """The median time of a training step, from what the run logged; None for one too short to have logged it."""
    name = "perf/steps_per_second"
    speeds = [line[name] for line in read_metrics(run_dir / "metrics.jsonl") if name in line]
    return 1 / statistics.median(speeds) if speeds else None


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
their first step.
"""
