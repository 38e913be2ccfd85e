"""Searches over nothing that is trained: what is tried, what ends early, what fails, and going on after a stop."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from search_curves import PEAKS, SPACE, Curve, Make

from lmobj import search
from lmobj.cli import main
from lmobj.config import Experiment, load
from lmobj.errors import UserError
from lmobj.search._study import Trial, best_of
from lmobj.train import Halted, Stopped

pytestmark = pytest.mark.usefixtures("unreported")


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "results.jsonl").read_text().splitlines()]


def _untimed(result: search.SearchResult) -> list[Trial]:
    return [dataclasses.replace(trial, seconds=0.0) for trial in result.trials]


# --- what is tried ------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_once(make: Make, tmp_path: pathlib.Path) -> None:
    trainer = Curve()
    result = search.run(make(method="grid", space=SPACE), quiet=True, trainer=trainer)
    tried = [(e.train.optimizer.schedule.peak, e.model.layers) for e in trainer.trained]
    assert sorted(tried) == [(peak, layers) for peak in PEAKS for layers in (1, 3)]
    assert [(e.name, e.run) for e in trainer.trained][4] == ("tried-0004", str(tmp_path / "run/trials/0004"))
    assert result.best.value == 1.0
    assert dict(result.best.settings) == {"train.optimizer.schedule.peak": 0.01, "model.layers": 1}
    lines = _lines(tmp_path / "run")
    assert [line["trial"] for line in lines] == list(range(6))
    best = lines[result.best.number]
    assert (best["state"], best["value"], best["metric"]) == ("complete", 1.0, "eval/loss")
    assert best["evaluations"] == [[10, 3.0], [20, 2.0], [30, 1.0]]
    assert best["run"] == f"trials/{result.best.number:04}"
    # The whole grid is 6 trials; more are not to be had, and fewer are the first of them.
    again = Curve()
    few = search.run(make("few", method="grid", space=SPACE, trials=4), quiet=True, trainer=again)
    assert [t.settings for t in few.trials] == [t.settings for t in result.trials][:4]
    assert make(method="grid", space=SPACE, trials=99).search.most_trials == 6


def test_the_best_config_is_one_for_train(make: Make, tmp_path: pathlib.Path) -> None:
    found = make(method="grid", space=SPACE)
    trainer = Curve()
    result = search.run(found, quiet=True, trainer=trainer)
    best = load(tmp_path / "run/best.yaml", ["run=elsewhere"])
    assert best == dataclasses.replace(trainer.trained[result.best.number], name="tried-best", run="elsewhere")


_RANGES = {
    "train.optimizer.schedule.peak": {"low": 1e-4, "high": 1.0, "log": True},
    "model.layers": {"low": 1, "high": 4},
    "train.layer_decay": {"low": 0.5, "high": 1.0, "step": 0.25},
}


@pytest.mark.parametrize("method", [pytest.param("random", marks=pytest.mark.slow), "tpe"])
def test_ranges_are_kept_and_the_seed_decides(make: Make, method: str) -> None:
    settings = {"method": method, "trials": 5, "startup_trials": 3, "space": _RANGES}
    result = search.run(make(**settings), quiet=True, trainer=Curve())
    for trial in result.trials:
        peak, layers, decay = trial.settings.values()
        assert 1e-4 <= peak <= 1
        assert layers in (1, 2, 3, 4)
        assert isinstance(layers, int)
        assert decay in (0.5, 0.75, 1.0)
    assert len({trial.settings["train.optimizer.schedule.peak"] for trial in result.trials}) == 5
    assert _untimed(search.run(make("same", **settings), quiet=True, trainer=Curve())) == _untimed(result)
    other = search.run(make("other", **settings | {"trials": 1}, seed=1), quiet=True, trainer=Curve())
    assert other.trials[0].settings != result.trials[0].settings


def test_tpe_learns_from_trials(make: Make) -> None:
    """Drawn at random, u in [-2, 2] and layers in 1..4, the mean of u^2 + layers is 4/3 + 5/2."""
    settings = {"trials": 18, "startup_trials": 6, "space": _RANGES}
    found = search.run(make(**settings), quiet=True, trainer=Curve())
    values = [trial.value or math.inf for trial in found.trials]
    assert sum(values[-8:]) / 8 < 4 / 3 + 5 / 2 - 1


def test_more_may_be_better(make: Make) -> None:
    """Layers are tried in the order 2, 3, 1, of which only the last is worse than the median before it."""

    class Accuracy(Curve):
        def train(self, experiment: Experiment, after_evaluation: Any) -> Any:
            metrics = {"eval/accuracy": experiment.model.layers / 10}
            after_evaluation(10, metrics)
            return metrics | {"best/accuracy": experiment.model.layers / 5}

    space = {"model.layers": {"choices": [1, 3, 2]}}
    pruner = {"startup_trials": 1, "warmup_evaluations": 0}
    found = make(method="grid", metric="accuracy", mode="max", space=space, pruner=pruner)
    result = search.run(found, quiet=True, trainer=Accuracy())
    assert [(t.settings["model.layers"], t.state) for t in result.trials] == [
        (2, "complete"), (3, "complete"), (1, "pruned")
    ]  # fmt: skip
    assert result.best.settings == {"model.layers": 3}
    assert result.best.value == 0.6, "of the checkpoint that the run goes back to"
    assert [row[1] for row in result.rows] == ["0.6", "0.4", ""]


def test_the_first_of_equals_is_the_best() -> None:
    trials = [Trial(n, "complete", {}, v, {}, 0.0, None, False) for n, v in enumerate((2.0, 1.0, 1.0, 3.0))]
    assert [getattr(best_of(trials, mode), "number", None) for mode in ("min", "max")] == [1, 3]  # type: ignore[arg-type]
    assert best_of([dataclasses.replace(trials[0], state="pruned")], "min") is None


# --- what ends early ----------------------------------------------------------------------------------------------


def test_trials_worse_than_the_median_end_early(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"method": "random", "trials": 12, "space": {"train.optimizer.schedule.peak": _RANGES[
        "train.optimizer.schedule.peak"]}}  # fmt: skip
    trainer = Curve()
    result = search.run(make(**settings, pruner={"startup_trials": 3, "warmup_evaluations": 1}), trainer=trainer)
    states = [trial.state for trial in result.trials]
    assert states[:3] == ["complete"] * 3, "none is ended before three came to their end"
    pruned = [trial.number for trial in result.trials if trial.state == "pruned"]
    assert pruned
    assert [trainer.steps[number] for number in pruned] == [20] * len(pruned), "one evaluation is let pass"
    for number in pruned:
        before = [t.evaluations[20] for t in result.trials[:number] if t.state == "complete"]
        assert result.trials[number].evaluations[20] > sorted(before)[len(before) // 2 - (len(before) % 2 == 0)]
        assert result.trials[number].value is None
    assert "pruned at step 20, loss" in capsys.readouterr().out
    unpruned = search.run(make("all", **settings), quiet=True, trainer=Curve())
    assert {trial.state for trial in unpruned.trials} == {"complete"}


# --- what fails ---------------------------------------------------------------------------------------------------


def test_what_fails_is_written_down_and_the_others_go_on(make: Make, tmp_path: pathlib.Path) -> None:
    def halt(experiment: Experiment, step: int) -> None:
        if experiment.train.optimizer.schedule.peak == 0.1 and step == 20:
            raise Halted("Step 17 halted the run:\nthe loss is nan")
        if experiment.train.optimizer.schedule.peak == 0.001:
            raise UserError("model.width is 12; accepted: another.")

    result = search.run(make(method="grid", space=SPACE), quiet=True, trainer=Curve(halt))
    states = {(t.settings["train.optimizer.schedule.peak"], t.state, t.reason) for t in result.trials}
    assert states == {
        (0.1, "failed", "Step 17 halted the run: the loss is nan"),
        (0.001, "failed", "model.width is 12; accepted: another."),
        (0.01, "complete", None),
    }
    assert result.header[-1] == "reason"
    assert [row[-2] for row in result.rows] == ["complete"] * 2 + ["failed"] * 4
    assert {line["reason"] for line in _lines(tmp_path / "run") if line["state"] == "failed"} == {
        "Step 17 halted the run: the loss is nan", "model.width is 12; accepted: another."
    }  # fmt: skip


def test_values_that_are_no_numbers_and_settings_that_do_not_go_together(make: Make) -> None:
    class NaN(Curve):
        def loss(self, experiment: Experiment) -> float:
            return math.nan if experiment.model.width == 12 else 1.0

    space = {"model.width": {"choices": [12, 15]}, "model.heads": {"choices": [2, 3]}}
    trainer = NaN()
    result = search.run(make(method="grid", space=space), quiet=True, trainer=trainer)
    reasons = {tuple(t.settings.values()): t.reason or "" for t in result.trials}
    assert reasons[12, 2] == reasons[12, 3] == "eval/loss is nan"
    assert reasons[15, 3] == ""
    assert "model.width" in reasons[15, 2]
    assert len(trainer.trained) == 3, "what no experiment can be is not trained"


def test_none_that_comes_to_its_end_is_an_error(make: Make, tmp_path: pathlib.Path) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("no such thing")

    with pytest.raises(UserError, match=r"none of the 6 trials .* came to its end; the last failed with: no such"):
        search.run(make(method="grid", space=SPACE), quiet=True, trainer=Curve(refuse))
    assert not (tmp_path / "run/best.yaml").exists()


def test_a_full_disk_is_not_held_against_the_settings(make: Make) -> None:
    def full(*_: Any) -> None:
        raise UserError("no room left") from OSError(errno.ENOSPC, "no space")

    found = make(method="grid", space=SPACE)
    with pytest.raises(UserError, match="no room left"):
        search.run(found, quiet=True, trainer=Curve(full))
    result = search.run(found, quiet=True, trainer=Curve())
    assert {trial.state for trial in result.trials} == {"complete"}


# --- going on -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nothing catches: stands for a kill, after which nothing more is written."""


def _dying(number: int, step: int) -> Callable[[Experiment, int], None]:
    def before(experiment: Experiment, at: int) -> None:
        if (experiment.name, at) == (f"tried-{number:04}", step):
            raise Killed

    return before


@pytest.mark.parametrize("method", ["grid", pytest.param("random", marks=pytest.mark.slow), "tpe"])
def test_after_a_kill_it_goes_on_to_the_same_end(make: Make, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"method": method, "trials": 6, "startup_trials": 2, "space": SPACE, "pruner": {"startup_trials": 2}}
    whole = search.run(make("whole", **settings), quiet=True, trainer=Curve())
    killed = Curve(_dying(3, 20))
    with pytest.raises(Killed):
        search.run(make(**settings), quiet=True, trainer=killed)
    assert len(killed.trained) == 4
    trainer = Curve()
    result = search.run(make(**settings), trainer=trainer)
    assert "3 trials are finished already." in capsys.readouterr().out
    assert [e.name for e in trainer.trained] == [f"tried-{n:04}" for n in (3, 4, 5)], "and no other again"
    assert trainer.trained[0] == killed.trained[-1], "what was under way goes on with its settings, in its folder"
    assert _untimed(result) == _untimed(whole)
    # Once more: nothing is left to do, so nothing is trained.
    assert search.run(make(**settings), quiet=True, trainer=Curve(_dying(0, 10))).rows == result.rows


def test_one_given_up_is_not_trained_on(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed between the decision and the note of it."""
    space = {"model.layers": {"low": 1, "high": 2, "step": 1}}
    found = make(method="grid", space=space, pruner={"startup_trials": 1, "warmup_evaluations": 0})
    end = search._study.RunningTrial.end  # type: ignore[attr-defined]

    def dying(self: Any, state: str, *rest: Any) -> None:
        if state == "pruned":
            raise Killed
        end(self, state, *rest)

    class Worse(Curve):
        def loss(self, experiment: Experiment) -> float:
            return float(experiment.name[-1])

    with monkeypatch.context() as patch:
        patch.setattr(search._study.RunningTrial, "end", dying)  # type: ignore[attr-defined]
        with pytest.raises(Killed):
            search.run(found, quiet=True, trainer=Worse())
    trainer = Worse()
    result = search.run(found, quiet=True, trainer=trainer)
    assert [trial.state for trial in result.trials] == ["complete", "pruned"]
    assert trainer.trained == []


def test_a_signal_stops_and_says_how_to_go_on(make: Make, tmp_path: pathlib.Path, capsys: Any) -> None:
    def stop(experiment: Experiment, step: int) -> None:
        if (experiment.name, step) == ("tried-0002", 20):
            raise Stopped(15)

    with pytest.raises(Stopped) as stopped:
        search.run(make(method="grid", space=SPACE), trainer=Curve(stop))
    assert stopped.value.code == 143
    assert f"Continue with: lmobj search {tmp_path / 'run/config.yaml'}" in capsys.readouterr().out
    trainer = Curve()
    search.run(search.load(tmp_path / "run/config.yaml"), quiet=True, trainer=trainer)
    assert [e.name for e in trainer.trained] == [f"tried-{n:04}" for n in (2, 3, 4, 5)]


def test_time_ends_it_and_more_may_be_asked_for(make: Make) -> None:
    space = {"model.layers": {"low": 1, "high": 9}}
    result = search.run(make(method="random", seconds=1e-9, space=space), quiet=True, trainer=Curve())
    assert len(result.trials) == 1
    more = make(method="random", seconds=1e9, trials=3, space=space)
    assert len(search.run(more, quiet=True, trainer=Curve()).trials) == 3


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            {"space": SPACE | {"model.layers": {"choices": [1, 2]}}},
            r"space\.model\.layers\.choices is \[1, 2\]",
        ),
        ({"space": SPACE | {"train.steps": {"choices": [3]}}}, r"search\.space\.train\.steps is .*\(not set\)"),
        ({"metric": "nll", "mode": "min"}, r"search\.metric is 'nll', and the search in .* was begun with None"),
        ({"seed": 5}, r"search\.seed is 5"),
    ],
)
def test_another_search_is_refused_in_the_same_folder(make: Make, change: dict[str, Any], key: str) -> None:
    settings = {"method": "grid", "space": SPACE, "trials": 1}
    search.run(make(**settings), quiet=True, trainer=Curve())
    with pytest.raises(UserError, match=key):
        search.run(make(**(settings | change)), quiet=True, trainer=Curve())


def test_another_base_or_other_data_are_refused(make: Make, tmp_path: pathlib.Path) -> None:
    found = make(method="grid", space=SPACE, trials=1)
    search.run(found, quiet=True, trainer=Curve())
    train = dataclasses.replace(found.train, batch_size=8)
    with pytest.raises(UserError, match=r"train\.batch_size is 8, and the search in .* was begun with 16"):
        search.run(dataclasses.replace(found, train=train), quiet=True, trainer=Curve())
    moved = Curve()
    moved.check = lambda *_, **__: "other"  # type: ignore[method-assign]
    with pytest.raises(UserError, match="the data has changed: its fingerprint is now other"):
        search.run(found, quiet=True, trainer=moved)
    (tmp_path / "run/trials").mkdir()
    (tmp_path / "run/study.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(UserError, match=r"study\.db cannot be opened as a study"):
        search.run(found, quiet=True, trainer=Curve())
    (tmp_path / "run/study.db").unlink()
    with pytest.raises(UserError, match=r"study\.db is missing, and .*trials holds its trials"):
        search.run(found, quiet=True, trainer=Curve())
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(UserError, match=r"exists and holds no search"):
        search.run(make("full", method="grid", space=SPACE), quiet=True, trainer=Curve())


def test_two_processes_do_not_search_in_one_folder(make: Make, tmp_path: pathlib.Path) -> None:
    found = make(method="grid", space=SPACE, trials=1)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(UserError, match="in which another process is searching"):
            search.run(found, quiet=True, trainer=Curve())
    search.run(found, quiet=True, trainer=Curve())


def test_odd_folders(make: Make, tmp_path: pathlib.Path) -> None:
    """Names that mean something in a URL, which Optuna is given."""
    search.run(make("50% of a#b?c=d &", method="grid", space=SPACE, trials=1), quiet=True, trainer=Curve())
    assert (tmp_path / "50% of a#b?c=d &/study.db").is_file()


# --- before anything is written -----------------------------------------------------------------------------------


def test_without_optuna_the_extra_is_named(make: Make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"a search needs the package optuna.*pip install 'lmobj\[search\]'"):
        search.run(make(method="grid", space=SPACE), quiet=True, trainer=Curve())
    assert not (tmp_path / "run").exists()


def test_a_search_is_one_process(make: Make, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"one of 2 processes.*accepted: 1 process"):
        search.run(make(method="grid", space=SPACE), quiet=True, trainer=Curve())
    assert not (tmp_path / "run").exists()


def test_schemas_are_printed_one_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--search"]) == 0
    assert json.loads(capsys.readouterr().out) == search.schema()
    assert main(["schema", "--search", "--bench"]) == 2
    assert "--bench and --search are both given" in capsys.readouterr().err
