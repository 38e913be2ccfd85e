"""`train.profile`: whole steps in the trace, settings that are refused, and runs that go on whatever becomes of it."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import pytest
from own_objective import BigramConfig, PredictPrevious
from tiny_runs import experiment

from lmobj.errors import UserError
from lmobj.train import FitResult, TrainConfig, fit
from lmobj.train.profile import Profile, Profiler

pytestmark = pytest.mark.usefixtures("quick_compilation")


def run(corpus: pathlib.Path, folder: pathlib.Path, *, resume: bool = False, **train: Any) -> FitResult:
    """A run of 4 steps of a model of two tables, its texts left out."""
    settings = {"steps": 4, "evaluate_every": None, "checkpoint_every": None, **train}
    config = experiment(corpus, folder, data={"validation": 0.0}, train=settings, sample=())
    return fit(config, objective=PredictPrevious(), model=BigramConfig(), resume=resume)


def traced_steps(folder: pathlib.Path) -> set[int]:
    """The numbers of the training steps in the trace under a folder."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return {int(dict(event.stats)["step_num"]) for event in events}


def test_the_trace_holds_the_steps_that_were_asked_for(
    corpus: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(corpus, tmp_path / "run", profile=Profile((2, 3)))
    assert traced_steps(tmp_path / "run" / "profile") == {2, 3}
    told = capsys.readouterr().out
    assert f"Profile of steps 2 to 3 in {tmp_path / 'run' / 'profile'}." in told
    assert "xprof --logdir" in told


def test_a_profile_that_cannot_start_is_told_and_the_run_goes_on(
    corpus: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jax.profiler.start_trace(str(tmp_path / "another"))
    try:
        result = run(corpus, tmp_path / "run", profile=Profile((1, 2)))
    finally:
        jax.profiler.stop_trace()
    assert int(result.state.step) == 4
    assert "No profile: it could not be started (" in capsys.readouterr().out
    assert not list((tmp_path / "run" / "profile").iterdir())


def _added(state: int, batch: int) -> int:
    return state + batch


def test_where_a_resumed_run_begins(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    started: list[str] = []
    monkeypatch.setattr(jax.profiler, "start_trace", started.append)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: None)
    late = Profiler(Profile((2, 5)), tmp_path, 5, notes.append)
    assert [late.run(step, _added, step, 1) for step in (6, 7)] == [7, 8]
    assert not started
    assert "[2, 5], and the run goes on after step 5" in notes.pop()
    with Profiler(Profile((2, 5)), tmp_path, 3, notes.append).closing() as inside:
        assert inside.run(4, _added, 4, 1) == 5
        assert started == [str(tmp_path)]
        assert notes == ["The profile begins at step 4, where the run goes on, not 2."]
    assert "It is not whole" in notes[-1], "the run ended before step 5"


@pytest.mark.parametrize("steps", [(0, 3), (4, 3)])
def test_steps_that_are_none(steps: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"train\.profile\.steps is \[\d, 3\]; accepted: \[a, b\] with 1 <= a <= b"):
        Profile(steps)


def test_steps_after_the_last_one() -> None:
    with pytest.raises(UserError, match=r"train\.profile\.steps is \[3, 9\] and train\.steps is 8"):
        TrainConfig(steps=8, profile=Profile((3, 9)))
