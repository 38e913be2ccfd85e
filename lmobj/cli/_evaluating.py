"""What `eval` prints: the figures of a split, or its bound (`--bound`), of a task told in prompts (`--task`), of texts
(`--generation`), or of vectors of sentences (`--similarity`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmobj.cli._printing import print_table, tell_weights
from lmobj.config import Experiment, load_task
from lmobj.errors import UserError
from lmobj.evaluate import GenerationConfig
from lmobj.train.diffusion import held_out_bound
from lmobj.train.distributed import is_first
from lmobj.train.generation import check_generation, figure_rows, generation_study
from lmobj.train.run_folder import RunFolder
from lmobj.train.similarity import COLUMNS, evaluate_similarity
from lmobj.train.task_evaluation import TaskResult, evaluate_task
from lmobj.train.trained import on_one_device, open_run

__all__ = ["check_options", "print_bound", "print_generation", "print_similarity", "print_split", "print_task"]


def check_options(
    task: Path | None,
    generation: bool,
    split: str,
    similarity: Path | None = None,
    of_similarity: str | None = None,
    bound: int | None = None,
) -> None:
    """Refuses options of `eval` that do not go together."""
    instead = {"--similarity": similarity, "--task": task, "--bound": bound, "--generation": generation or None}
    given = {name: value for name, value in instead.items() if value is not None}
    if len(given) > 1:
        (first, value), (second, _), *_ = given.items()
        shown = repr(str(value)) if isinstance(value, Path) else value
        raise UserError(f"{first} is {shown}, and {second} is given too; accepted: one of the two.")
    if similarity is None and of_similarity is not None:
        raise UserError("--columns or --pooling is given without --similarity; accepted: the two of --similarity.")
    if split != "validation" and given.keys() - {"--bound"}:
        raise UserError(
            f"--split is {split}, and {next(iter(given))} does not evaluate a split; accepted: one of the two."
        )


def print_split(experiment: Experiment, split: str, *, best: bool, as_json: bool) -> None:
    """Evaluates a run on a split and prints the figures; of a task the table of scores too, with files in RUN/eval."""
    trained = open_run(experiment, best=best)
    metrics, told = trained.examine(split, quiet=as_json)
    if not is_first():
        return
    for note in trained.assembly.notes(split):
        print(note, file=sys.stderr)
    files = told.write(RunFolder(experiment.run_dir)) if told else []
    if as_json:
        print(json.dumps(metrics))
        return
    tell_weights(experiment)
    others = told.baselines if told else {}
    rows = [
        (name, f"{value:.6g}", *(f"{each[name]:.6g}" if name in each else "" for each in others.values()))
        for name, value in sorted(metrics.items())
    ]
    print_table(("metric", split, *others), rows)
    if told:
        print()
        print_table(told.header, told.lines())
        print(f"\nFiles: {', '.join(map(str, files))}")


def print_bound(experiment: Experiment, split: str, samples: int, *, best: bool, as_json: bool) -> None:
    """Bounds the likelihood of a split by this many noised copies of each document, and prints the figures."""
    trained = open_run(on_one_device(experiment), best=best, quiet=as_json)
    figures = held_out_bound(trained, split, samples=samples, quiet=as_json)
    if as_json:
        print(json.dumps(figures))
        return
    tell_weights(experiment)
    print_table(("metric", split), [(name, f"{value:.6g}") for name, value in sorted(figures.items())])


def print_generation(experiment: Experiment, *, best: bool, as_json: bool) -> None:
    """Writes texts as the config's `generation` says, or as it does by default, and prints their figures.

    The texts go into generation.json of the run folder, as at the end of training.
    """
    trained = open_run(on_one_device(experiment), best=best, quiet=as_json)
    config = experiment.generation or GenerationConfig()
    check_generation(trained.assembly, config)
    study = generation_study(trained.assembly, trained.model, config, step=int(trained.state.step))
    text = json.dumps(study, indent=2, ensure_ascii=False) + "\n"
    RunFolder(experiment.run_dir).add("generation.json", text)
    if as_json:
        print(json.dumps(study))
    else:
        tell_weights(experiment)
        print_table(*figure_rows(study))


def print_task(experiment: Experiment, path: Path, *, best: bool, as_json: bool) -> None:
    """Evaluates a task, writes what was found into the run folder, and prints the figures."""
    task = load_task(path)
    result = evaluate_task(open_run(on_one_device(experiment), best=best, quiet=as_json), task, quiet=as_json)
    result.write(RunFolder(experiment.run_dir))
    if as_json:
        print(json.dumps(result.figures))
        return
    tell_weights(experiment)
    print_table((task.name, "this model", "commonest answer"), list(_figures(result)))
    if result.report is not None:
        print()
        rows = [
            (one.name, *(f"{x:.4f}" for x in (one.precision, one.recall, one.f1)), str(one.support))
            for one in result.report.classes
        ]
        print_table(("class", "precision", "recall", "F1", "examples"), rows)


def print_similarity(
    experiment: Experiment, path: Path, columns: str | None, pooling: str | None, *, best: bool, as_json: bool
) -> None:
    """Compares vectors of sentences with the scores of a file, writes the figures into RUN/eval, and prints them."""
    names = COLUMNS if columns is None else [name.strip() for name in columns.split(",")]
    trained = open_run(on_one_device(experiment), best=best, quiet=as_json)
    given: Any = pooling
    result = evaluate_similarity(trained, str(path), columns=names, pooling=given, quiet=as_json)
    written = result.write(RunFolder(experiment.run_dir))
    if as_json:
        print(json.dumps(result.figures))
        return
    tell_weights(experiment)
    figures = result.figures
    words = figures["words"]
    rows = [(name, f"{figures[name]:.4f}", f"{words[name]:.4f}") for name in ("spearman", "pearson")]
    shown = [(name, figures[name]) for name in ("alignment", "uniformity") if figures[name] is not None]
    rows += [(name, f"{value:.4f}", "") for name, value in shown]
    print_table(
        (result.name, f"vectors ({figures['pooling']})", "shared words"),
        [*rows, ("pairs", f"{figures['pairs']:,}", "")],
    )
    print(f"\nFile: {written}")


def _figures(result: TaskResult) -> Iterable[tuple[str, str, str]]:
    figures = result.figures
    yield "accuracy", f"{figures['accuracy']:.4f}", f"{figures['majority']:.4f}"
    if result.report is None:
        yield "by chance", f"{figures['chance']:.4f}", ""
    else:
        yield "macro F1", f"{figures['macro_f1']:.4f}", f"{figures['majority_macro_f1']:.4f}"
        yield "Matthews", f"{figures['matthews']:.4f}", f"{0:.4f}"
    yield "examples", f"{figures['examples']:,}", ""
    if figures["shots"]:
        yield "shots", f"{figures['shots_shown']:.4g} of {figures['shots']}", ""
    if figures["cut"]:
        yield "cut to fit", f"{figures['cut']:,}", ""
