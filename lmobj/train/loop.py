"""The training loop: `fit` reads top to bottom as what happens in a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from lmobj.errors import UserError
from lmobj.models import ModelBuilder
from lmobj.objectives import Objective
from lmobj.train import distributed, memory
from lmobj.train.assemble import Assembly, Experiment, assemble
from lmobj.train.bad_batches import BadBatches
from lmobj.train.best import Best, BestSoFar
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.environment import environment
from lmobj.train.evaluation import Evaluation, readable
from lmobj.train.flops import model_flops
from lmobj.train.guard import GUARD, Verdict
from lmobj.train.initial import fingerprint, fresh_state, restored_state
from lmobj.train.profile import Profiler
from lmobj.train.run_folder import RunFolder, check_same_run
from lmobj.train.signals import Stopped, listen
from lmobj.train.sinks import Sink, TensorBoard, WandBSink
from lmobj.train.split_report import reported_splits
from lmobj.train.step import State, StepMetrics
from lmobj.train.summary import check_samples, summarise
from lmobj.train.tracking import Tracker, last_metrics, read_metrics

__all__ = ["AfterEvaluation", "FitResult", "fit"]

AfterEvaluation = Callable[[int, dict[str, float]], bool]
"""Is told the step and its `eval/...` metrics after each evaluation; true ends the run there, early but orderly."""


@dataclass(frozen=True)
class FitResult:
    """What training leaves: the run folder, the final state, the last value of each metric, and the run's parts.

    Of a run in a store, the folder is the working copy on this machine.
    """

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
    after_evaluation: AfterEvaluation = lambda step, metrics: False,
) -> FitResult:
    """Trains a model and leaves a run folder.

    Args:
      config: the experiment; `lmobj.config.load` reads one from YAML.
      objective: used in place of `config.objective`; any `Objective`, registered or not.
      model: used in place of `config.model`; anything with `build(vocab, rngs) -> nnx.Module`.
      resume: continue the run in `config.run_dir` from its last checkpoint. The result is bit for bit that of an
        uninterrupted run.
      quiet: print nothing.
      after_evaluation: is called with the step and its `eval/...` metrics after each evaluation. Where it returns true
        the run ends as if by `train.best.patience`, saved and summarised. Every process calls its own, and all must
        answer alike. A resumed run does not call it again for evaluations before its checkpoint.

    Returns:
      The final state and metrics. The run folder holds them too, with a report.

    With several processes (`lmobj.train.distributed`) every one calls it; the first writes and prints.

    Raises:
      UserError: a setting that cannot be satisfied, found before anything is written; or memory that ran out.
      Halted: `train.guard` ended the run at a bad batch; nothing was saved after it.
      Stopped: SIGTERM or SIGINT came; the state was saved. Its exit code is 128 + signal.
    """
    with distributed.agreed("run folder"):
        folder = RunFolder(config.run_dir)
        checkpoints = Checkpoints(
            folder.checkpoints,
            keep=config.train.keep,
            best=config.train.best.name,
            mode=config.train.best.mode,
            before_commit=folder.publish,
        )
        if resume:
            folder.check_exists()
        else:
            folder.check_free()
        if config.train.wandb is not None:
            config.train.wandb.check()
    run = assemble(config, objective=objective, model=model, quiet=quiet)
    evaluation = Evaluation(run)
    with distributed.agreed("rehearsal"):
        _rehearse(run, evaluation)
    with distributed.agreed("files of the run"):
        if distributed.is_first() and resume:
            folder.fetch()
        elif distributed.is_first():
            folder.create(run.config_yaml)
            run.dataset.tokenizer.save(folder.tokenizer)
    with checkpoints, distributed.one_fate(), folder.in_use(), memory.explained(run):
        state, notes = _first_state(run, folder, checkpoints, resume=resume)
        if distributed.is_first():
            folder.write_json("environment.json", environment())
        with _tracker(run, folder, start=int(state.step), quiet=quiet) as tracker:
            held_out = run.notes(evaluation.split) if evaluation.has_text else ()
            for note in (*notes, run.describe(), *run.notes("train"), *held_out):
                tracker.note(note)
            if config.train.ema is not None:
                tracker.note(config.train.ema.note)
            if not evaluation.has_text:
                tracker.note("data.validation is 0: no text is held out, so the run is not evaluated.")
            state = _train(run, state, evaluation, folder, checkpoints, tracker, after_evaluation)
            if config.train.best.restore:
                state = _best_state(run, state, evaluation, checkpoints, tracker)
            summarise(run, state, evaluation, folder, tracker)
        metrics = distributed.share("metrics", last_metrics(folder.metrics) if distributed.is_first() else {})
    return FitResult(folder.path, state, metrics, run)


def _rehearse(run: Assembly, evaluation: Evaluation) -> None:
    """Traces one batch and looks at memory and prompts, so that what cannot work is told before anything is written.

    Otherwise rows longer than the model reads, say, would show after the run folder was made, held-out text without a
    pair of sentences at the first evaluation, and a prompt without a mask only once the model was trained.
    """
    memory.check_state(run)
    next(run.batches("train", steps=1))
    for split in {*([evaluation.split] if evaluation.has_text else []), *reported_splits(run)}:
        next(run.batches(split, steps=1))
    evaluation.check_metric(run.config.train.best.metric)
    check_samples(run)


def _first_state(
    run: Assembly, folder: RunFolder, checkpoints: Checkpoints, *, resume: bool
) -> tuple[State, tuple[str, ...]]:
    """Where the run begins, with notes for the person.

    A resumed run begins at its newest whole checkpoint, or at step 0 if it was stopped before the first one.
    """
    _check_shared(folder, checkpoints)
    if not resume:
        return fresh_state(run)
    if checkpoints.latest_step is None:
        with distributed.agreed("config of the run"):
            folder.check_config(run.identity["config"])
        state, notes = fresh_state(run)
        return state, (*notes, "No checkpoint yet: starting from step 0.")
    with distributed.agreed("run of the checkpoint"):
        stored = checkpoints.metadata()
        if stored is not None:  # before the arrays are read: it names the setting that differs, not an array
            check_same_run(stored, run.identity)
    restored = restored_state(run, checkpoints)
    return restored.state, (*restored.notes, f"Resuming from step {restored.step}.")


def _check_shared(folder: RunFolder, checkpoints: Checkpoints) -> None:
    """Refuses a run folder that is not the same for every process."""
    with distributed.agreed("shared run folder"):
        if folder.in_store:
            folder.check_exists()
        elif not distributed.appears(folder.config):
            raise UserError(
                f"run is {str(folder)!r}, where process 0 has made the run folder and this one finds none; "
                "accepted: a folder on a file system that all processes share."
            )

    def differ(first: int | None, here: int | None) -> str | None:
        if first == here:
            return None
        return f"the newest checkpoint in {folder} is that of step {here} here and of step {first} in process 0"

    distributed.same("newest checkpoint", checkpoints.latest_step, differ)


def _tracker(run: Assembly, folder: RunFolder, *, start: int, quiet: bool) -> Tracker:
    settings = run.config.train
    return Tracker(
        folder.path,
        start=start,
        total=settings.steps,
        tokens_per_step=run.tokens_per_step,
        flops_per_step=model_flops(run) / run.mesh.size,
        quiet=quiet,
        sinks=list(_sinks(run, folder, start, quiet=quiet)) if distributed.is_first() else (),
    )


def _sinks(run: Assembly, folder: RunFolder, start: int, *, quiet: bool) -> Iterator[Sink]:
    """Where metrics go beside metrics.jsonl."""
    if run.config.train.wandb is not None:
        settings = run.identity["config"]
        yield WandBSink(run.config.train.wandb, folder.path, name=settings["name"], config=settings, quiet=quiet)
    yield TensorBoard(folder.path / "tensorboard", start=start)


def _train(
    run: Assembly,
    state: State,
    evaluation: Evaluation,
    folder: RunFolder,
    checkpoints: Checkpoints,
    tracker: Tracker,
    after_evaluation: AfterEvaluation,
) -> State:
    """Steps from the state's to the last, with metrics, evaluations and checkpoints when they are due."""
    settings = run.config.train
    start = int(state.step)
    unread: tuple[int, StepMetrics] | None = None
    evaluated: dict[str, float] = {}
    frozen = fingerprint(state.frozen)
    identity = run.identity if frozen is None else {**run.identity, "frozen": frozen}
    best = BestSoFar(settings.best, _evaluations(folder, settings.best))
    if best.exhausted:
        return state

    def last_checkpoint() -> int | None:
        checkpoints.wait()
        return checkpoints.latest_step

    bad_batches = BadBatches(run, folder, last_checkpoint, tracker.note)

    def read_metrics() -> None:
        """Writes the metrics of an earlier step and acts on its verdict: the device has them, so nothing waits."""
        nonlocal unread
        if unread is None:
            return
        (at, metrics), unread = unread, None
        if at == settings.steps or at % settings.log_every == 0:
            tracker.log(at, _train_line(metrics))
        if Verdict.is_bad(metrics):
            bad_batches.act_on(at, Verdict.read(metrics))

    def save(step: int) -> None:
        read_metrics()
        with tracker.timed("saving"):
            checkpoints.save(step, state.stored, metrics=evaluated, metadata=identity)

    profiler = Profiler(settings.profile, folder.profile, start, tracker.note)
    with listen(distributed.peers()) as stop, profiler.closing():
        for step, batch in enumerate(_batches(run, tracker, start), start + 1):
            state, metrics = profiler.run(step, run.train_step, state, batch)
            evaluated, enough = {}, False
            read_metrics()
            unread = (step, metrics)
            last = step == settings.steps
            if evaluation.has_text and (last or _due(step, settings.evaluate_every)):
                read_metrics()
                with tracker.timed("evaluation"):
                    values = evaluation(state, settings.evaluate_batches)
                    whole = evaluation(state) if last and settings.evaluate_batches is not None else values
                evaluated = {f"eval/{name}": value for name, value in values.items()}  # on the same rows at every step
                tracker.log(step, {f"eval/{name}": value for name, value in whole.items()})
                better = best.add(evaluated.get(settings.best.name, math.nan))
                enough = after_evaluation(step, evaluated)
            stopped = stop.after(step)  # asked once: a signal may come between any two lines
            ends = last or best.exhausted or enough
            wanted = settings.best.saves and bool(evaluated) and better
            if ends or wanted or _due(step, settings.checkpoint_every) or stopped is not None:
                save(step)
            if stopped is not None:
                checkpoints.wait()
                tracker.note(f"Saved at step {step}. Continue with: {folder.resume_command}")
                raise Stopped(stopped)
            if ends and not last:
                why = best if best.exhausted else "that was enough, by its evaluation"
                tracker.note(f"Stopped at step {step}: {why}.")
                break
    checkpoints.wait()
    return state


def _evaluations(folder: RunFolder, best: Best) -> list[float]:
    """The figures by which the checkpoints of a run were judged until now, in order. Every process calls it."""

    def read() -> list[float]:
        return [line[best.name] for line in read_metrics(folder.metrics) if best.name in line]

    values: list[float] = distributed.share("evaluations", read() if distributed.is_first() else [])
    return values


def _best_state(
    run: Assembly, state: State, evaluation: Evaluation, checkpoints: Checkpoints, tracker: Tracker
) -> State:
    """The state of the best checkpoint, with its figures over the whole held-out split as `best/...`."""
    step = checkpoints.best_step
    if step is None or step == int(state.step):
        return state
    best: State = checkpoints.restore(run.abstract_state.stored, step=step).state._replace(frozen=state.frozen)
    values = evaluation(best)
    tracker.log(int(state.step), {f"best/{name}": value for name, value in values.items()})
    tracker.note(f"The best checkpoint is that of step {step}.")
    return best


def _batches(run: Assembly, tracker: Tracker, start: int) -> Iterator[dict[str, jax.Array]]:
    """The training batches of the steps after `start`, each sent to the devices a step early, while they compute.

    The wait for them is timed.
    """
    batches = iter(run.batches("train", start=start, steps=run.config.train.steps - start))

    def following() -> dict[str, jax.Array] | None:
        with tracker.timed("input_wait"):
            batch = next(batches, None)
            return None if batch is None else run.on_devices(batch)

    batch = following()
    while batch is not None:
        ahead = following()
        yield batch
        batch = ahead


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _train_line(metrics: StepMetrics) -> dict[str, float]:
    """`train/...` metrics of one step."""
    pairs = jax.device_get({name: pair for name, pair in metrics.items() if not name.startswith(GUARD)})
    return {f"train/{name}": value for name, value in readable(pairs).items()}
