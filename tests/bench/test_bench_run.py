"""A whole benchmark, tiny: what it leaves, that it goes on after a kill, and what it refuses to compare."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import pytest
import tiny_runs
import yaml
from tiny_runs import metric_lines

from lmobj import _settings, _yaml, bench
from lmobj.bench import _run
from lmobj.bench._compare import check_comparable, check_same_data
from lmobj.bench._plan import ArmPlan, plan_arm
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.objectives import CausalLM, MaskedLM
from lmobj.train import assemble
from lmobj.train.tracking import Tracker, read_metrics

_ROWS, _STEPS = 4, 6


def _benchmark(corpus: pathlib.Path, folder: pathlib.Path, **changes: Any) -> bench.Benchmark:
    """Two arms, a causal and a masked LM, for six steps each on one device; a probe on a file of two kinds of words."""
    train = {"steps": 999, "batch_size": _ROWS, "mesh": {"data": 1}, "log_every": 1, "evaluate_every": 3}
    shared = tiny_runs.experiment(corpus, folder, model={"layers": 1, "width": 8, "heads": 2, "dropout": 0.0})
    values = _settings.plain(shared) | {"name": "tiny", "sample": []}
    values["train"] |= train | {"checkpoint_every": 2}
    masked = tiny_runs.experiment(corpus, folder, "masked_lm", model={"layers": 1, "width": 8, "heads": 2})
    arms = {"clm": {}, "mlm": {key: _settings.plain(getattr(masked, key)) for key in ("model", "objective")}}
    labelled = corpus.parent / "labelled.tsv"
    labelled.write_text("".join(f"the {'quick fox' if i % 2 else 'old river'} {i}\t{i % 2}\n" for i in range(40)))
    values |= {
        "arms": arms,
        "budget": {"tokens": _STEPS * _ROWS * tiny_runs.LENGTH + 1},
        "seeds": [0],
        "probe": {"name": "tsv", "train": [str(labelled)], "batch_size": 8},
        **changes,
    }
    return _settings.build(bench.Benchmark, _yaml.Document(values), "test")


@pytest.fixture(scope="module")
def whole(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> bench.BenchResult:
    """A benchmark that nothing disturbed. Nothing may write into its folder."""
    with tiny_runs.quick_compilation():
        return bench.run(_benchmark(corpus, tmp_path_factory.mktemp("bench") / "whole"), quiet=True)


def test_it_leaves_lines_tables_pictures_and_run_folders(whole: bench.BenchResult) -> None:
    assert {path.name for path in whole.folder.iterdir()} == {
        "config.yaml", "plan.json", "arms", "results.jsonl", "results.md", "results.svg", "results.png",
    }  # fmt: skip
    lines = [json.loads(line) for line in (whole.folder / "results.jsonl").read_text().splitlines()]
    assert lines == whole.lines
    assert [(line["arm"], line["seed"], line["objective"]) for line in lines] == [
        ("clm", 0, "causal_lm"), ("mlm", 0, "masked_lm")
    ]  # fmt: skip
    for line in lines:
        assert line["steps"] == _STEPS, "a token more than six steps need buys no seventh"
        assert line["tokens"] == _STEPS * _ROWS * tiny_runs.LENGTH
        assert line["flops"] > 0
        assert line["flops_formula"] > 0
        assert line["seconds"] > 0
        assert line["probe"]["accuracy"] > line["probe"]["majority"]["accuracy"]
        assert (line["probe"]["train"], line["probe"]["test"]) == (32, 8)
        assert {"jax", "lmobj", "scikit-learn"} <= set(line["versions"])
        assert {"eval/loss", "train/loss"} <= set(line["metrics"])
        folder = whole.folder / line["run"]
        assert (folder / "report.html").is_file()
        assert line["metrics"]["eval/loss"] == read_metrics(folder / "metrics.jsonl")[-1]["eval/loss"]
        assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == _STEPS
    text = (whole.folder / "results.md").read_text()
    assert "| clm | 1 |" in text
    assert "majority class" in text


# --- going on -----------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What nothing catches: stands for a kill, after which nothing more is written."""


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Dies when the arm named `arm` has logged step `step`; saves nothing of it."""
    settings: dict[str, Any] = {}
    log = Tracker.log

    def dying(self: Tracker, step: int, values: Any) -> None:
        log(self, step, values)
        if settings and self.run_dir.parent.name == settings["arm"] and step == settings["step"]:
            raise Killed

    monkeypatch.setattr(Tracker, "log", dying)
    return settings


def test_after_a_kill_it_goes_on_to_the_same_end(
    corpus: pathlib.Path, tmp_path: pathlib.Path, whole: bench.BenchResult, killed_after: dict[str, Any],
    capsys: pytest.CaptureFixture[str], quick_compilation: None, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    benchmark = _benchmark(corpus, tmp_path / "killed")
    killed_after |= {"arm": "mlm", "step": 5}  # the newest checkpoint is that of step 4
    with pytest.raises(Killed):
        bench.run(benchmark, quiet=True)
    folder = tmp_path / "killed"
    assert [json.loads(line)["arm"] for line in (folder / "results.jsonl").read_text().splitlines()] == ["clm"]
    finished = (folder / "arms/clm/seed_0/report.html").stat().st_mtime_ns
    killed_after.clear()
    plans = json.loads((folder / "plan.json").read_text())
    monkeypatch.setattr(_run, "plan_arm", lambda *_: pytest.fail("the plan is there"))
    result = bench.run(benchmark)
    out = capsys.readouterr().out
    assert "1 of 2 runs are finished already." in out
    assert "Run 2 of 2: arm 2 of 2 (mlm), seed 0, 6 steps" in out
    assert "Run 1 of 2" not in out
    assert (folder / "arms/clm/seed_0/report.html").stat().st_mtime_ns == finished
    assert json.loads((folder / "plan.json").read_text()) == plans
    for arm in ("clm", "mlm"):
        assert metric_lines(folder / f"arms/{arm}/seed_0") == metric_lines(whole.folder / f"arms/{arm}/seed_0")
    same = ("arm", "seed", "steps", "flops", "data", "probe")
    assert [[line[key] for key in same] for line in result.lines] == [
        [line[key] for key in same] for line in whole.lines
    ]

    # Once more: nothing is left to do, so nothing is trained.
    monkeypatch.setattr(_run, "fit", lambda *_, **__: pytest.fail("everything is finished"))
    assert bench.run(benchmark, quiet=True).rows == result.rows


def test_the_written_config_is_itself_a_benchmark(
    tmp_path: pathlib.Path, whole: bench.BenchResult, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "moved")
    # Nothing is left to do: it prints the table of what is there.
    assert main(["bench", str(folder / "config.yaml"), f"run={folder}"]) == 0
    out = capsys.readouterr().out
    assert "2 of 2 runs are finished already." in out
    assert "\t".join(whole.header) in out
    assert all("\t".join(row) in out for row in whole.rows)


def test_another_config_is_refused_in_the_same_folder(
    corpus: pathlib.Path, tmp_path: pathlib.Path, whole: bench.BenchResult
) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "copy")
    before = (folder / "config.yaml").read_text()
    changed = _benchmark(corpus, folder, budget={"tokens": 100})
    with pytest.raises(UserError, match=r"budget.tokens is 100, and the benchmark in .* was begun with 385"):
        bench.run(changed, quiet=True)
    arms = {**changed.arms, "mlm": {**changed.arms["mlm"], "train": {"batch_size": 8}}}
    with pytest.raises(UserError, match=r"arms.mlm.train is .*'batch_size': 8.*\(not set\)"):
        bench.run(_benchmark(corpus, folder, arms=arms), quiet=True)
    assert (folder / "config.yaml").read_text() == before
    with pytest.raises(UserError, match="holds no benchmark"):
        bench.run(_benchmark(corpus, folder / "arms"), quiet=True)


def test_changed_data_is_refused(corpus: pathlib.Path, tmp_path: pathlib.Path, whole: bench.BenchResult) -> None:
    folder = shutil.copytree(whole.folder, tmp_path / "copy")
    plans = json.loads((folder / "plan.json").read_text())
    plans["mlm"]["data"] = "another"
    (folder / "plan.json").write_text(json.dumps(plans))
    with pytest.raises(UserError, match=r"the data of the arm mlm has changed.*begun with another"):
        bench.run(_benchmark(corpus, folder), quiet=True)


# --- what may be compared -----------------------------------------------------------------------------------------


class _Arm:
    """As much of an `Assembly` as comparisons read."""

    def __init__(self, objective: Any, fingerprint: str = "f", **data: Any) -> None:
        self.objective = objective
        self.dataset = dataclasses.make_dataclass("Data", ["fingerprint"])(fingerprint)
        self.identity = {"config": {"data": {"length": 16, "source": {"files": ["a"]}, **data}}}


_CLM, _MLM = _Arm(CausalLM()), _Arm(MaskedLM())


@pytest.mark.parametrize("metric", ["eval/loss", "eval/nll", "eval/perplexity", "eval/accuracy", "train/loss"])
def test_raw_losses_of_different_objectives_are_not_ranked(metric: str) -> None:
    arms: Any = {"gpt": _CLM, "bert": _MLM}
    with pytest.raises(UserError) as error:
        check_comparable(arms, [metric])
    for part in (metric, "gpt (causal_lm)", "bert (masked_lm)", "probe", "eval/bits_per_byte among causal"):
        assert part in str(error.value)
    # Nor those of one objective with other settings: hiding less makes an easier task.
    with pytest.raises(UserError, match="cannot be ranked"):
        check_comparable({"a": _MLM, "b": _Arm(MaskedLM(mask_rate=0.4))}, [metric])  # type: ignore[dict-item]
    check_comparable({"a": _MLM, "b": _Arm(MaskedLM())}, [metric])  # type: ignore[dict-item]


def test_metrics_that_mean_the_same_are_compared() -> None:
    smoothed = _Arm(CausalLM(label_smoothing=0.1))
    check_comparable({"a": _CLM, "b": smoothed}, ["eval/bits_per_byte"])  # type: ignore[dict-item]
    check_comparable({"a": _MLM, "b": _Arm(MaskedLM(mask_rate=0.4))}, ["eval/top5_accuracy"])  # type: ignore[dict-item]
    check_comparable({"a": _CLM, "b": _MLM}, ["perf/tokens_per_second"])  # type: ignore[dict-item]
    with pytest.raises(UserError, match=r"eval/bits_per_byte, which b \(masked_lm\) is not measured by"):
        check_comparable({"a": _CLM, "b": _MLM}, ["eval/bits_per_byte"])  # type: ignore[dict-item]
    other = _Arm(CausalLM(), "g", source={"files": ["b"]})
    with pytest.raises(UserError, match=r"different data \(data.source.files: \['a'\] in a, \['b'\] in b\)"):
        check_comparable({"a": _CLM, "b": other}, ["eval/bits_per_byte"])  # type: ignore[dict-item]


def test_arms_with_the_same_settings_must_read_the_same_data() -> None:
    check_same_data({"a": _CLM, "b": _MLM, "c": _Arm(CausalLM(), length=8)})  # type: ignore[dict-item]
    check_same_data({"a": _CLM, "b": _Arm(CausalLM(), "g", source={"files": ["b"]})})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="the arms a and b have the same data settings, and their data has"):
        check_same_data({"a": _CLM, "b": _Arm(MaskedLM(), "g", length=8)})  # type: ignore[dict-item]


def test_a_benchmark_refuses_to_rank_losses_before_it_trains(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot be ranked against each other"):
        bench.run(_benchmark(corpus, tmp_path / "losses", metrics=["eval/loss"]), quiet=True)
    assert not (tmp_path / "losses" / "arms").exists()


# --- plans --------------------------------------------------------------------------------------------------------


def test_steps_follow_from_what_one_takes(
    corpus: pathlib.Path, tmp_path: pathlib.Path, whole: bench.BenchResult, quick_compilation: None
) -> None:
    benchmark = _benchmark(corpus, tmp_path / "unwritten")
    run = assemble(bench.experiments(benchmark)["clm"], quiet=True)
    stored = ArmPlan(**json.loads((whole.folder / "plan.json").read_text())["clm"])
    assert stored.seconds_per_step is None, "nothing is timed where the budget does not ask"
    plan = plan_arm("clm", run, bench.Budget(seconds=60.0))
    assert plan.seconds_per_step is not None
    assert 0 < plan.seconds_per_step < 5
    assert plan.steps == int(60 / plan.seconds_per_step)
    assert plan.flops_per_step == stored.flops_per_step
    arm = plan.experiment(run.config, name="x", run="y", seed=5)  # type: ignore[arg-type]
    assert (arm.train.steps, arm.train.seed, arm.run) == (plan.steps, 5, "y")
    assert arm.train.batch_size == _ROWS
