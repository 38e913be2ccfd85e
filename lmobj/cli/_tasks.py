"""`eval --task`, a task's figures beside the commonest answer, and `eval --generation`, those of texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lmobj.config import Experiment, load_task
from lmobj.errors import UserError
from lmobj.evaluate import GenerationConfig
from lmobj.train.generation import check_generation, figure_rows, generation_study
from lmobj.train.run_folder import RunFolder
from lmobj.train.task_evaluation import TaskResult, evaluate_task
from lmobj.train.trained import on_one_device, open_run

__all__ = ["check_options", "print_generation", "print_task"]

PrintTable = Callable[[Sequence[str], Iterable[Sequence[str]]], None]


def check_options(task: Path | None, generation: bool, split: str) -> None:
    """Refuses options of `eval` that do not go together."""
    if task is not None and generation:
        raise UserError(f"--task is {str(task)!r}, and --generation is given too; accepted: one of the two.")
    if split != "validation":
        option = "--generation" if generation else "--task"
        raise UserError(f"--split is {split}, and {option} does not evaluate a split; accepted: one of the two.")


def print_generation(experiment: Experiment, *, best: bool, as_json: bool, print_table: PrintTable) -> None:
    """Writes texts as the config's `generation` says, or as it does by default, and prints their figures.

    The texts go into eval/generation.json of the run folder.
    """
    trained = open_run(on_one_device(experiment), best=best, quiet=as_json)
    config = experiment.generation or GenerationConfig()
    check_generation(trained.assembly, config)
    study = generation_study(trained.assembly, trained.model, config, step=int(trained.state.step))
    text = json.dumps(study, indent=2, ensure_ascii=False) + "\n"
    RunFolder(experiment.run_dir).add("eval/generation.json", text)
    if as_json:
        print(json.dumps(study))
    else:
        print_table(*figure_rows(study))


def print_task(experiment: Experiment, path: Path, *, best: bool, as_json: bool, print_table: PrintTable) -> None:
    """Evaluates a task, writes what was found into the run folder, and prints the figures."""
    task = load_task(path)
    result = evaluate_task(open_run(on_one_device(experiment), best=best, quiet=as_json), task, quiet=as_json)
    result.write(RunFolder(experiment.run_dir))
    if as_json:
        print(json.dumps(result.figures))
        return
    print_table((task.name, "this model", "commonest answer"), list(_figures(result)))
    if result.report is not None:
        print()
        rows = [
            (one.name, *(f"{x:.4f}" for x in (one.precision, one.recall, one.f1)), str(one.support))
            for one in result.report.classes
        ]
        print_table(("class", "precision", "recall", "F1", "examples"), rows)


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
