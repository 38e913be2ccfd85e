"""A whole benchmark, tiny: what it leaves, that it goes on after a kill, and what it refuses to compare."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import jax
import pytest
import tiny_runs
import yaml
from tiny_runs import metric_lines

from lmobj import _settings, _yaml, bench
from lmobj.batch import RowSpec
from lmobj.bench import Labelled, ProbeData, SwappedWordsProbe, _prepare, _run
from lmobj.bench._compare import check_comparable, check_same_data
from lmobj.bench._plan import ArmPlan, plan_arm
from lmobj.bench._probe import NotFinite
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.objectives import CausalLM, MaskedLM
from lmobj.train import Halted, assemble
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
    monkeypatch.setattr(_prepare, "plan_arm", lambda *_: pytest.fail("the plan is there"))
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


@pytest.mark.slow
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


def test_changed_texts_of_the_probe_are_refused(
    corpus: pathlib.Path, tmp_path: pathlib.Path, whole: bench.BenchResult
) -> None:
    benchmark = _benchmark(corpus, shutil.copytree(whole.folder, tmp_path / "copy"))
    labelled = pathlib.Path(benchmark.probe.train[0])  # type: ignore[union-attr]
    labelled.write_text(labelled.read_text().replace("river 2\t0", "river 2\t1"))
    with pytest.raises(UserError, match=r"the texts or labels of the probe have changed: .* was begun with"):
        bench.run(benchmark, quiet=True)


# --- runs that diverge --------------------------------------------------------------------------------------------


def test_a_run_that_diverges_is_written_down_and_the_others_go_on(
    corpus: pathlib.Path, tmp_path: pathlib.Path, whole: bench.BenchResult, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    benchmark = _benchmark(corpus, shutil.copytree(whole.folder, tmp_path / "copy"))
    (tmp_path / "copy/results.jsonl").unlink()
    trained: list[str] = []

    def fit(experiment: Any, **_: Any) -> Any:
        trained.append(experiment.name)
        if experiment.name == "tiny-clm":
            raise Halted("Step 5 halted the run")
        return SimpleNamespace(assembly=SimpleNamespace(dataset=SimpleNamespace(fingerprint=whole.lines[0]["data"])))

    def finished_line(*_: Any) -> Any:
        raise NotFinite("hidden states are not finite")

    monkeypatch.setattr(_run, "fit", fit)
    monkeypatch.setattr(_run, "finished_line", finished_line)
    result = bench.run(benchmark)
    assert trained == ["tiny-clm", "tiny-mlm"]
    for line, undisturbed in zip(result.lines, whole.lines, strict=True):
        assert (line["diverged"], line["metrics"], line["probe"], line["seconds"]) == (True, None, None, None)
        same = ("arm", "seed", "objective", "model", "steps", "flops", "data", "run")
        assert [line[key] for key in same] == [undisturbed[key] for key in same]
        assert undisturbed["diverged"] is False
    out = capsys.readouterr().out
    assert "Step 5 halted the run" in out
    assert "hidden states are not finite" in out
    assert out.count("diverged, and is left out of the means") == 2
    assert "| clm | 1 (1 diverged) | (0 of 1) |" in (result.folder / "results.md").read_text()
    bench.run(benchmark, quiet=True)
    assert len(trained) == 2, "what diverged is not trained again"


# --- what may be compared -----------------------------------------------------------------------------------------


class _Arm:
    """As much of an `Assembly` as comparisons read."""

    def __init__(
        self, objective: Any, fingerprint: str = "f", coefficients: dict[str, Any] | None = None, **data: Any
    ) -> None:
        self.objective = objective
        self.program = dataclasses.make_dataclass("Program", ["objective"])(objective)
        self.dataset = dataclasses.make_dataclass("Data", ["fingerprint"])(fingerprint)
        self.spec = RowSpec(getattr(objective, "layout", "packed"), 16)
        self.identity = {
            "config": {
                "data": {"length": 16, "source": {"files": ["a"]}, **data},
                "train": {"coefficients": coefficients or {}},
            }
        }


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


def test_metrics_are_compared_on_rows_of_one_length_and_layout() -> None:
    shorter: Any = {"a": _CLM, "b": _Arm(CausalLM(), length=8)}
    with pytest.raises(UserError, match=r"eval/bits_per_byte, which depends on data.length, .* 16 in a, 8 in b"):
        check_comparable(shorter, ["eval/bits_per_byte"])
    check_comparable(shorter, ["perf/tokens_per_second"])
    single: Any = {"a": _MLM, "b": _Arm(MaskedLM(layout="single"))}
    with pytest.raises(UserError, match=r'eval/top5_accuracy, .* layout of rows, .* "packed" in a, "single" in b'):
        check_comparable(single, ["eval/top5_accuracy"])


@pytest.mark.parametrize("metric", ["eval/loss", "train/loss"])
def test_losses_are_compared_where_their_terms_weigh_alike(metric: str) -> None:
    arms: Any = {"a": _MLM, "b": _Arm(MaskedLM(), coefficients={"nll": 0.5})}
    with pytest.raises(UserError, match=r"train.coefficients, .* \{nll: 1.0\} in a, \{nll: 0.5\} in b"):
        check_comparable(arms, [metric])
    check_comparable(arms, ["eval/nll"])
    check_comparable(arms | {"b": _Arm(MaskedLM(), coefficients={"nll": 1})}, [metric])


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_texts_of_the_probe_must_be_the_same_in_all_arms(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def labelled_texts(probe: Any, dataset: Any) -> ProbeData:
        rows = {"train": [Labelled("x", None, "1")], "test": [Labelled("y", None, "1")]}
        return ProbeData(**{**rows, part: [Labelled(dataset.fingerprint, None, "1")]})

    monkeypatch.setattr(_prepare, "labelled_texts", labelled_texts)
    benchmark: Any = SimpleNamespace(probe=SwappedWordsProbe())
    arms: Any = {"a": _CLM, "b": _Arm(CausalLM(), "g", source={"files": ["b"]})}
    with pytest.raises(UserError, match=r"probe.name is swapped_words.*different data \(data.source.files: \['a'\] in"):
        _prepare._probe_texts(benchmark, arms)
    texts = _prepare._probe_texts(benchmark, {"a": arms["a"], "b": _MLM})  # type: ignore[dict-item]
    assert texts == labelled_texts(None, _CLM.dataset)


def test_arms_with_the_same_settings_must_read_the_same_data() -> None:
    check_same_data({"a": _CLM, "b": _MLM, "c": _Arm(CausalLM(), length=8)})  # type: ignore[dict-item]
    check_same_data({"a": _CLM, "b": _Arm(CausalLM(), "g", source={"files": ["b"]})})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="the arms a and b have the same data settings, and their data has"):
        check_same_data({"a": _CLM, "b": _Arm(MaskedLM(), "g", length=8)})  # type: ignore[dict-item]


def test_a_benchmark_refuses_to_rank_losses_before_it_trains(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="cannot be ranked against each other"):
        bench.run(_benchmark(corpus, tmp_path / "losses", metrics=["eval/loss"]), quiet=True)
    assert not (tmp_path / "losses" / "arms").exists()


# --- what cannot work ---------------------------------------------------------------------------------------------


def test_what_cannot_work_is_told_before_training_and_leaves_the_folder_free(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(arm: str, run: Any, budget: bench.Budget) -> ArmPlan:
        return ArmPlan(_STEPS, 64, 1, 1.0, None, 1, run.dataset.fingerprint)

    def begin(*_: Any, **__: Any) -> Any:
        raise Killed

    monkeypatch.setattr(_prepare, "plan_arm", plan)
    monkeypatch.setattr(_run, "fit", begin)
    folder = tmp_path / "free"
    arms = _benchmark(corpus, folder).arms
    schedule = {"optimizer": {"schedule": {"name": "constant", "peak": 1e-3, "warmup_steps": 5000}}}
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{'the old river ' * 20}\tthe quick fox\t{i % 2}\n" for i in range(10)))
    probe = {"name": "tsv", "train": [str(pairs)], "pair": 1, "label": 2}
    for changes, message in (
        ({"arms": {**arms, "mlm": {**arms["mlm"], "train": schedule}}},
         r"arm mlm, for 6 steps of which budget.tokens pays: .*warmup_steps is 5000, longer than the 6 steps"),
        ({"probe": {**probe, "length": 64}},
         r"arm clm: probe.length is 64, .* rows of 64 tokens: model.max_length is 32"),
        ({"probe": {**probe, "length": 4}},
         r"arm mlm: probe.length is 4, which leaves 1 tokens for text; accepted: 5 or more"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            bench.run(_benchmark(corpus, folder, **changes), quiet=True)
        assert not list(folder.iterdir())
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn", None)
        with pytest.raises(UserError, match="a probe needs scikit-learn"):
            bench.run(_benchmark(corpus, folder), quiet=True)
    with pytest.raises(Killed):
        bench.run(_benchmark(corpus, folder), quiet=True)
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "plan.json"}


def test_a_benchmark_is_one_process(
    corpus: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"one of 2 processes.*accepted: 1 process"):
        bench.run(_benchmark(corpus, tmp_path / "two"), quiet=True)
    assert not (tmp_path / "two").exists()


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
