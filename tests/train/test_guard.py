"""Losses and gradients that are not finite, and loss spikes: the verdict, what it spares, and what a run does then."""

from __future__ import annotations

import pathlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from own_objective import BigramConfig
from poisoned import Poisoned
from tiny_runs import experiment, metric_lines, stored_bits

import lmobj.train
from lmobj import losses, masks
from lmobj.batch import Vocabulary
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.objectives import Example, Objective, ObjectiveState, Terms
from lmobj.train import FitResult, Halted, fit
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.ema import EMA
from lmobj.train.guard import GUARD, Guard, GuardState, Verdict, judge
from lmobj.train.optimizers import AdamW
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig
from lmobj.train.step import Program, State

# --- the verdict --------------------------------------------------------------------------------------------------


def after(guard: Guard, losses: Any) -> GuardState:
    state, step = GuardState.init(), jax.jit(judge, static_argnums=0)
    for loss in losses:
        _, state, _ = step(guard, state, jnp.asarray(loss), jnp.ones(()))
    return state


def verdict(guard: Guard, state: GuardState, loss: float, grad_norm: float = 1.0) -> Verdict:
    good, _, told = judge(guard, state, jnp.asarray(loss), jnp.asarray(grad_norm))
    assert bool(good) == (told.kind is None)
    return told


def test_mean_and_variance_are_those_of_weighted_losses() -> None:
    draws = np.random.default_rng(0).normal(5, 2, 30)
    with jax.enable_x64(True):
        for count in (1, 7, 10, 11, 30):
            # The slow way: what each loss weighs in the end. Every new one takes its share from all before it.
            weights = np.zeros(count)
            for n in range(count):
                share = max(0.1, 1 / (n + 1))
                weights[:n] *= 1 - share
                weights[n] = share
            if count <= 10:
                np.testing.assert_allclose(weights, 1 / count)
            state = after(Guard(decay=0.9), draws[:count])
            mean = np.sum(weights * draws[:count])
            np.testing.assert_allclose(state.mean, mean, rtol=1e-12)
            np.testing.assert_allclose(state.variance, np.sum(weights * (draws[:count] - mean) ** 2), atol=1e-12)
            assert int(state.seen) == count


def test_a_spike_lies_so_many_deviations_above_the_mean() -> None:
    guard = Guard(spike="skip", threshold=2.0, warmup=4)
    state = after(guard, [1.0, 2.0, 3.0, 2.0])
    # Mean 2, variance (1 + 0 + 1 + 0) / 4, so the limit is 2 + 2 sqrt(1/2) = 3.41421.
    assert verdict(guard, state, 3.4142).kind is None
    told = verdict(guard, state, 3.4143)
    assert told.kind == "spike"
    assert str(told) == (
        "the loss is 3.4143, 2.0 standard deviations above the mean of those before it (2, deviation 0.71)"
    )
    assert verdict(guard, state, -100.0).kind is None  # below is no spike
    assert verdict(replace(guard, spike="off"), state, 1e9).kind is None
    assert verdict(replace(guard, warmup=5), state, 1e9).kind is None
    # A spike leaves the statistics as they were, and counts.
    _, spared, _ = judge(guard, state, jnp.asarray(9.0), jnp.ones(()))
    assert spared == (1, *state[1:])


def test_losses_that_hardly_differ_are_no_spikes() -> None:
    guard = Guard(spike="skip", threshold=6.0, warmup=2)
    state = after(guard, [5.0] * 9)
    assert verdict(guard, state, 5.02).kind is None  # the deviation counts as 0.1% of the mean: the limit is 5.03
    assert verdict(guard, state, 5.04).kind == "spike"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    state = after(Guard(), [1.0, 2.0])
    assert str(verdict(Guard(), state, bad)) == f"the loss is {bad}"
    told = verdict(Guard(), state, 1.5, bad)
    assert (told.kind, str(told)) == ("nonfinite", f"the gradient has the norm {bad} (the loss is 1.5)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"threshold": 0.0}, r"train\.guard\.threshold is 0\.0; accepted: above 0"),
        ({"threshold": float("nan")}, r"train\.guard\.threshold is nan"),
        ({"decay": 1.0}, r"train\.guard\.decay is 1\.0; accepted: 0 or more, and less than 1"),
        ({"warmup": 1}, r"train\.guard\.warmup is 1; accepted: 2 or more"),
        ({"dumps": -1}, r"train\.guard\.dumps is -1; accepted: 0 or more"),
    ],
)
def test_settings_out_of_range_are_refused(changes: Mapping[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Guard(**changes)


# --- what a bad update spares -------------------------------------------------------------------------------------

VOCAB = Vocabulary(size=12, pad=0)
ROWS, LENGTH, WIDTH = 8, 6, 4


@dataclass(frozen=True)
class Everything(Objective):
    """An objective with all that a state can hold: its own parameters, carried rows, and two updates a batch.

    The batch's `poison` [B] makes the loss of a row NaN (1), its gradient infinite and its loss not (2), or its loss
    huge (3).
    """

    updates: ClassVar[int] = 2

    def init(self, models: Any, key: Any, batch_size: int) -> ObjectiveState:
        return ObjectiveState({"scale": jnp.ones(())}, {"memory": jnp.zeros((batch_size, WIDTH))})

    def corrupt(self, keys: Any, batch: Any, ctx: Any) -> Example:
        weights = jnp.ones((batch["tokens"].shape[0], LENGTH))
        extra = {"poison": batch["poison"]}
        return Example(batch["tokens"], jnp.roll(batch["tokens"], -1, 1), weights, masks.causal(), extra=extra)

    def terms(self, models: Any, example: Example, carried: Any, ctx: Any) -> Terms:
        model, poison = models["model"], example.extra["poison"]
        hidden = model.embed[...][example.inputs] + carried["memory"][:, None]
        nll = losses.token_nll(ctx.params["scale"] * hidden @ model.embed[...].T, example.targets)
        root = jnp.sqrt(jnp.where(poison == 2, 0.0, 1.0) * jnp.sum(hidden**2, (1, 2)))  # its slope is infinite at 0
        row = jnp.sum(nll, 1) * jnp.where(poison == 1, jnp.nan, jnp.where(poison == 3, 100.0, 1.0)) + 1e-3 * root
        return Terms({"nll": jnp.sum(row)}, {}, {"memory": jnp.where(poison[:, None] == 1, jnp.nan, hidden[:, -1])})


class Table(nnx.Module):
    def __init__(self) -> None:
        self.embed = nnx.Param(jax.random.normal(jax.random.key(0), (VOCAB.size, WIDTH)))


@pytest.fixture(scope="module", params=[1, 4], ids=["whole", "accumulated"])
def program(request: pytest.FixtureRequest) -> tuple[Program, State, Any]:
    graph, params = nnx.split(Table())
    made = Program(
        objective=Everything(),
        graphs={"model": graph},
        vocab=VOCAB,
        optimizer=optax.adam(0.1),
        coefficients={"nll": lambda step: 1.0},
        seed=0,
        accumulate=request.param,
        guard=Guard(nonfinite="skip", spike="skip", warmup=6, threshold=6.0),
        ema=EMA(decay=0.5),
    )
    return made, made.init({"model": nnx.to_pure_dict(params)}, ROWS), jax.jit(made.train_step)


def batch(seed: int, poison: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "tokens": jnp.asarray(rng.integers(0, VOCAB.size, (ROWS, LENGTH)), jnp.int32),
        "row_ids": jnp.stack([jnp.zeros(ROWS, jnp.int32), jnp.arange(ROWS, dtype=jnp.int32)], 1),
        "poison": jnp.zeros(ROWS, jnp.int32).at[3].set(poison),
    }


@pytest.mark.parametrize(("poison", "kind"), [(1, "nonfinite"), (2, "nonfinite"), (3, "spike")])
def test_a_bad_update_changes_nothing_but_step_count_and_memory(
    program: tuple[Program, State, Any], poison: int, kind: str
) -> None:
    _, state, step = program
    for i in range(3):
        state, metrics = step(state, {}, batch(i))
        assert not Verdict.is_bad(metrics)
    spared, metrics = step(state, {}, batch(3, poison))
    assert Verdict.is_bad(metrics)
    assert Verdict.read(metrics).kind == kind
    assert (int(spared.step), int(spared.guard.skipped), int(metrics["skipped"][0])) == (4, 2, 2)  # both updates
    assert int(metrics[f"{GUARD}updates"][0]) == 6

    # The memory has read the batch, once for each update, but for one that is not finite.
    before, last = state.objective.carried["memory"], batch(3)["tokens"][:, -1]
    memory = before + 2 * state.params["model"]["embed"][last]
    expected = before if poison == 1 else memory
    np.testing.assert_allclose(spared.objective.carried["memory"], expected, rtol=1e-6)
    spared = spared._replace(objective=state.objective)

    undone = spared._replace(step=state.step, guard=spared.guard._replace(skipped=state.guard.skipped))
    assert jax.tree.structure(undone) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, undone, state)
    assert {len(jax.tree.leaves(part)) for part in (state.params, state.ema, state.objective.carried)} == {1}

    # What follows is as if the batch had never been, but for the step.
    later, metrics = step(spared, {}, batch(9))
    without, _ = step(state, {}, batch(9))
    assert not Verdict.is_bad(metrics)
    assert int(metrics[f"{GUARD}updates"][0]) == 6
    jax.tree.map(np.testing.assert_array_equal, later._replace(step=without.step, guard=without.guard), without)
    assert later.guard[1:] == without.guard[1:]


def test_the_verdict_is_on_the_first_bad_update() -> None:
    good, bad, worse = (Verdict(*map(jnp.asarray, (reason, loss, 1.0, 0.0, 1.0))) for reason, loss in
                        ((0, 1.0), (3, 2.0), (1, 3.0)))  # fmt: skip
    assert [float(a.first(b).loss) for a, b in ((good, bad), (bad, worse), (bad, good))] == [2.0, 2.0, 2.0]


# --- whole runs ---------------------------------------------------------------------------------------------------

STEPS = 12


def settings(corpus: pathlib.Path, run: pathlib.Path, **train: Any) -> Any:
    fast = AdamW(schedule=ConstantSchedule(peak=0.1, warmup_fraction=1.0))
    values = {"optimizer": fast, "steps": STEPS, "checkpoint_every": 2, "keep": 20, "evaluate_every": 4, **train}
    return experiment(corpus, run, train=values, sample=())


def run(config: Any, objective: Objective, **changes: Any) -> FitResult:
    return fit(config, objective=objective, model=BigramConfig(), **{"quiet": True, **changes})


@pytest.fixture(scope="module")
def skipping(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A run that passed over the batch of step 6, at which a checkpoint is due."""
    return run(settings(corpus, tmp_path_factory.mktemp("runs") / "skipping", guard=Guard("skip")), Poisoned((6,)))


def test_skipping_counts_and_goes_on(skipping: FitResult) -> None:
    lines = [line for line in metric_lines(skipping.run_dir) if "train/loss" in line]
    assert [line["train/skipped"] for line in lines] == [0.0] * 5 + [1.0] * 7
    assert [line["step"] for line in lines if line["train/loss"] is None] == [6]
    # The optimizer's schedule counts its updates: step 7 is made at the rate that step 6 was not.
    rates = [line["train/learning_rate"] for line in lines]
    np.testing.assert_allclose(rates, [0.1 * n / STEPS for n in (*range(6), *range(5, STEPS - 1))], rtol=1e-6)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(skipping.state))
    assert int(skipping.state.step) == STEPS
    assert "<b>1</b><span>updates passed over</span>" in (skipping.run_dir / "report.html").read_text()


def test_halting_saves_nothing_and_resume_may_skip(
    skipping: FitResult, corpus: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "halting"
    config = settings(corpus, folder)
    with pytest.raises(Halted) as caught:
        run(config, Poisoned((6,)))
    message = str(caught.value)
    assert message.startswith(
        "Step 6 halted the run (train.guard.nonfinite=halt): the loss is nan. No update was made with it, and the last "
        f"checkpoint, of step 4, is untouched. The batch is in {folder}/bad_batches/step-6.npz. To pass over such "
        f"batches: `lmobj resume {folder} train.guard.nonfinite=skip`."
    )
    assert "\n" not in message
    assert caught.value.exit_code == 3
    with Checkpoints(folder / "checkpoints") as checkpoints:
        assert checkpoints.steps == [2, 4]
    assert not (folder / "report.html").exists()
    assert metric_lines(folder)[-1]["step"] == 6

    with pytest.raises(Halted, match="Step 6 halted"):
        run(config, Poisoned((6,)), resume=True)
    changed = replace(config, train=replace(config.train, guard=Guard("skip")))
    run(changed, Poisoned((6,)), resume=True, quiet=False)
    assert (
        "Step 6 changed nothing (train.guard.nonfinite=skip): the loss is nan. The batch is in "
        f"{folder}/bad_batches/step-6.npz." in capsys.readouterr().out
    )
    assert metric_lines(folder) == metric_lines(skipping.run_dir)
    shapes = skipping.assembly.abstract_state
    assert stored_bits(folder, shapes) == stored_bits(skipping.run_dir, shapes)


def test_the_bad_batch_is_written_down(skipping: FitResult) -> None:
    folder = skipping.run_dir / "bad_batches"
    assert sorted(path.name for path in folder.iterdir()) == ["step-6.npz", "step-6.txt"]
    (expected,) = skipping.assembly.batches("train", start=5, steps=1)
    with np.load(folder / "step-6.npz", allow_pickle=False) as stored:
        assert set(stored) == set(expected)
        for name, rows in expected.items():
            np.testing.assert_array_equal(stored[name], rows)
    text = (folder / "step-6.txt").read_text()
    assert text.startswith("step 6: the loss is nan\n\n--- row 0 (source 0, example ")
    assert len(re.findall(r"^--- row \d \(source 0, example \d+\) ---$", text, re.MULTILINE)) == 8
    tokens, segments = expected["tokens"][7], expected["segment_ids"][7]
    assert skipping.assembly.dataset.tokenizer.decode(tokens[segments == segments[-1]]) in text
    assert skipping.assembly.config.train.guard.dumps == 10


def test_the_last_step_halts_too_and_not_too_many_batches_are_written(
    corpus: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = settings(corpus, tmp_path / "run", guard=Guard("skip", dumps=1), steps=4, log_every=3, checkpoint_every=9)
    run(config, Poisoned((1, 2)))
    assert sorted(path.name for path in (tmp_path / "run/bad_batches").iterdir()) == ["step-1.npz", "step-1.txt"]
    lines = [line for line in metric_lines(tmp_path / "run") if "train/loss" in line]
    assert [(line["step"], line["train/skipped"]) for line in lines] == [(3, 2.0), (4, 2.0)]

    config = settings(corpus, tmp_path / "last", guard=Guard(dumps=0), steps=4, checkpoint_every=None)
    with pytest.raises(Halted, match=r"Step 4 halted .* and there is no checkpoint yet\. To pass over"):
        run(config, Poisoned((4,)))
    assert not any("eval/loss" in line for line in metric_lines(tmp_path / "last"))
    assert not (tmp_path / "last/bad_batches").exists()
    assert not list((tmp_path / "last").glob("checkpoints/*"))


def test_spikes_on_one_device_and_on_eight(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    guard = Guard(spike="skip", warmup=4, threshold=4.0)
    states = []
    for devices in (8, 1):
        config = settings(corpus, tmp_path / str(devices), guard=guard, mesh=MeshConfig(data=devices))
        states.append(run(config, Poisoned((), spike=(8,))).state)
    eight, one = ([float(x) for x in state.guard] for state in states)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert (one[0], one[1]) == (1, STEPS - 1)
    text = (tmp_path / "1/bad_batches/step-8.txt").read_text()
    assert re.match(r"step 8: the loss is \d+\.\d+, \d+\.\d standard deviations above the mean", text)

    folder = tmp_path / "halted"
    shutil.copytree(tmp_path / "1", folder)
    for step in (8, 10, 12):
        shutil.rmtree(folder / "checkpoints" / str(step))
    halting = settings(corpus, folder, guard=replace(guard, spike="halt"), mesh=MeshConfig(data=1))
    with pytest.raises(Halted, match=r"Step 8 .*train\.guard\.spike=skip` or train\.guard\.spike=off\."):
        run(halting, Poisoned((), spike=(8,)), resume=True)


def test_the_command_ends_with_3(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmobj import config

    (tmp_path / "tiny.yaml").write_text(config.dump(settings(corpus, tmp_path / "run", steps=2)))
    own = lmobj.train.fit
    monkeypatch.setattr(
        lmobj.train, "fit", lambda *args, **kw: own(*args, objective=Poisoned((2,)), model=BigramConfig(), **kw)
    )
    assert main(["train", str(tmp_path / "tiny.yaml"), "-q"]) == 3
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("lmobj: Step 2 halted the run")
    again = config.load(tmp_path / "tiny.yaml", ["train.guard.nonfinite=skip", "train.guard.spike=off"])
    assert again.train.guard == Guard("skip", "off")
