"""The training loop: `fit` reads top to bottom as what happens in a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax

from lmobj.models import ModelBuilder
from lmobj.objectives import Objective
from lmobj.train.assemble import Assembly, Experiment, assemble
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.environment import environment
from lmobj.train.evaluation import Evaluation, readable
from lmobj.train.run_folder import RunFolder, check_same_run
from lmobj.train.sharding import active
from lmobj.train.signals import Stopped, listen
from lmobj.train.step import State, StepMetrics
from lmobj.train.summary import check_samples, summarise
from lmobj.train.tracking import Tracker, last_metrics

__all__ = ["FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What training leaves: the run folder, the final state, the last value of each metric, and the run's parts."""

    run_dir: Path
    state: State
    metrics: dict[str, float]
    assembly: Assembly


def fit(
    config: Experiment,
    *,
    objective: Objective | None = None,
    model: ModelBuilder | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> FitResult:
    """Trains a model and leaves a run folder.

    Args:
      config: the experiment; `lmobj.config.load` reads one from YAML.
      objective: used in place of `config.objective`; any `Objective`, registered or not.
      model: used in place of `config.model`; anything with `build(vocab, rngs) -> nnx.Module`.
      resume: continue the run in `config.run_dir` from its last checkpoint. The result is bit for bit that of an
        uninterrupted run.
      quiet: print nothing.

    Returns:
      The final state and metrics. The run folder holds them too, with a report.

    Raises:
      UserError: a setting that cannot be satisfied, found before anything is written.
      Stopped: SIGTERM or SIGINT came; the state was saved. Its exit code is 128 + signal.
    """
    folder = RunFolder(config.run_dir)
    if not resume:
        folder.check_free()
    if resume:
        folder.check_exists()
    run = assemble(config, objective=objective, model=model, quiet=quiet)
    _rehearse(run)
    if not resume:
        folder.create(run.config_yaml)
    with Checkpoints(folder.checkpoints, keep=config.train.keep, best="eval/loss") as checkpoints:
        state, notes = _first_state(run, folder, checkpoints, resume=resume)
        folder.write_json("environment.json", environment())
        with _tracker(run, folder, start=int(state.step), quiet=quiet) as tracker:
            for note in (*notes, run.describe()):
                tracker.note(note)
            evaluation = Evaluation(run)
            if not evaluation.has_text:
                tracker.note("data.validation is 0: no text is held out, so the run is not evaluated.")
            state = _train(run, state, evaluation, checkpoints, tracker)
            summarise(run, state, evaluation, folder, tracker)
    return FitResult(folder.path, state, last_metrics(folder.metrics), run)


def _rehearse(run: Assembly) -> None:
    """Traces one batch and looks at the prompts, so that what cannot work is told before anything is written.

    Otherwise rows longer than the model reads, say, would show after the run folder was made, and a prompt without a
    mask only once the model was trained.
    """
    (batch,) = run.batches("train", steps=1)
    with active(run.mesh, run.rules):
        jax.eval_shape(run.program.eval_step, run.abstract_state, {}, batch)
    check_samples(run)


def _first_state(
    run: Assembly, folder: RunFolder, checkpoints: Checkpoints, *, resume: bool
) -> tuple[State, tuple[str, ...]]:
    """Where the run begins, with notes for the person.

    A resumed run begins at its newest whole checkpoint, or at step 0 if it was stopped before the first one.
    """
    if not resume:
        return run.initial_state(), ()
    if checkpoints.latest_step is None:
        folder.check_config(run.identity["config"])
        return run.initial_state(), ("No checkpoint yet: starting from step 0.",)
    stored = checkpoints.metadata()
    if stored is not None:  # before the arrays are read: it names the setting that differs, not an array
        check_same_run(stored, run.identity)
    restored = checkpoints.restore(run.abstract_state)
    return restored.state, (*restored.notes, f"Resuming from step {restored.step}.")


def _tracker(run: Assembly, folder: RunFolder, *, start: int, quiet: bool) -> Tracker:
    settings = run.config.train
    return Tracker(
        folder.path,
        start=start,
        total=settings.steps,
        tokens_per_step=settings.batch_size * run.config.data.length,
        flops_per_token=6 * run.parameter_count,
        quiet=quiet,
    )


def _train(run: Assembly, state: State, evaluation: Evaluation, checkpoints: Checkpoints, tracker: Tracker) -> State:
    """Steps from the state's to the last, with metrics, evaluations and checkpoints when they are due."""
    settings = run.config.train
    start = int(state.step)
    logged: tuple[int, StepMetrics] | None = None
    evaluated: dict[str, float] = {}

    def log_pending() -> None:
        """Writes the metrics of an earlier step: by now the device has them, so nothing waits."""
        nonlocal logged
        if logged is not None:
            tracker.log(logged[0], _train_line(run, *logged))
            logged = None

    def save(step: int) -> None:
        log_pending()
        checkpoints.save(step, state, metrics=evaluated, metadata=run.identity)

    with listen() as stop:
        for step, batch in enumerate(run.batches("train", start=start, steps=settings.steps - start), start + 1):
            state, metrics = run.train_step(state, batch)
            evaluated = {}
            log_pending()
            last = step == settings.steps
            if last or step % settings.log_every == 0:
                logged = (step, metrics)
            if evaluation.has_text and (last or _due(step, settings.evaluate_every)):
                log_pending()
                with tracker.pause():
                    values = evaluation(state, None if last else settings.evaluate_batches)
                evaluated = {f"eval/{name}": value for name, value in values.items()}
                tracker.log(step, evaluated)
            stopped = stop.signal_number  # read once: a signal may come between any two lines
            if last or _due(step, settings.checkpoint_every) or stopped is not None:
                save(step)
            if stopped is not None:
                checkpoints.wait()
                tracker.note(f"Saved at step {step}. Continue with: {RunFolder(run.config.run_dir).resume_command}")
                raise Stopped(stopped)
    checkpoints.wait()
    return state


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _train_line(run: Assembly, step: int, metrics: StepMetrics) -> dict[str, float]:
    """`train/...` metrics of one step."""
    values = readable(jax.device_get(metrics), run.coefficients(step - 1))
    values["learning_rate"] = float(run.learning_rate(step - 1))
    return {f"train/{name}": value for name, value in values.items()}
