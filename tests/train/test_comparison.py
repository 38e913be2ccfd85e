"""Reports of splits, and task runs beside one another: figures, files and refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import fsspec
import numpy as np
import pytest

from lmobj.cli._comparing import found_runs, group_names
from lmobj.cli._main import main
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.evaluate import TASKS, ScatterPicture, paired_bootstrap, seed_difference
from lmobj.train import comparison
from lmobj.train.comparison import compare
from lmobj.train.report import write_report
from lmobj.train.run_folder import RunFolder
from lmobj.train.split_report import SplitReport, read_reports
from lmobj.train.tracking import last_metrics
from lmobj.train.trained import TrainedRun

Captured = pytest.CaptureFixture[str]
Made = Callable[..., Experiment]

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRUE = ["wet", "dry", "dry", "wet", "dry", "dry", "wet", "dry", "dry", "wet", "dry"]
"""The labels of the 11 held-out rows."""


@pytest.fixture
def original(classified: TrainedRun) -> pathlib.Path:
    return pathlib.Path(classified.assembly.config.run_dir)


@pytest.fixture
def made(classified: TrainedRun, original: pathlib.Path, tmp_path: pathlib.Path) -> Made:
    """Makes a copy of the run with another seed, and with predictions that are right but at some places."""

    def make(name: str, seed: int, wrong: Sequence[int] | None = None, **changes: Any) -> Experiment:
        place = tmp_path / name
        shutil.copytree(original, place)
        text = (place / "config.yaml").read_text().replace("  seed: 0\n", f"  seed: {seed}\n")
        (place / "config.yaml").write_text(text)
        if wrong is not None:
            records = made_up(wrong)
            right = float(np.mean([one["target"] == one["prediction"] for one in records]))
            f1 = macro_f1(records)
            report = SplitReport.read(place / "eval" / "validation.json")
            report = dataclasses.replace(
                report,
                records=lambda: records,
                figures={"accuracy": right, "macro_f1": f1, "perplexity": 2.0},
                **changes,
            )
            report.write(RunFolder(place))
        config = classified.assembly.config
        return dataclasses.replace(config, run=str(place), train=dataclasses.replace(config.train, seed=seed))

    return make


def made_up(wrong: Sequence[int]) -> list[dict[str, Any]]:
    other = {"wet": "dry", "dry": "wet"}
    given = [other[label] if i in wrong else label for i, label in enumerate(TRUE)]
    logits = {"dry": [1.0, 0.0], "wet": [0.0, 1.0]}
    return [
        {"index": i, "target": t, "prediction": g, "logits": logits[g], "probabilities": {"dry": 0.0, "wet": 0.0}}
        for i, (t, g) in enumerate(zip(TRUE, given, strict=True))
    ]


def macro_f1(records: Sequence[dict[str, Any]]) -> float:
    """Of two classes, in plain counts."""
    each = []
    for name in ("dry", "wet"):
        right = sum(one["target"] == one["prediction"] == name for one in records)
        both = sum((one["target"] == name) + (one["prediction"] == name) for one in records)
        each.append(2 * right / both)
    return sum(each) / 2


# --- reports ---


def test_training_leaves_what_the_model_says_of_each_example(original: pathlib.Path) -> None:
    (report,) = read_reports(original)
    records = report.records()
    assert [one["target"] for one in records] == TRUE
    metrics = last_metrics(original / "metrics.jsonl")
    assert report.figures == {n.removeprefix("eval/"): x for n, x in metrics.items() if n.startswith("eval/")}
    assert (report.step, report.split, report.examples) == (30, "validation", 11)
    for name, scores in TASKS["classification"].scores.items():
        values, statistic = scores(records)
        found = values.mean() if statistic is None else statistic(values.mean(0, keepdims=True))[0]
        assert found == pytest.approx(report.figures[name], rel=1e-5), name
    for one in records:
        assert one["prediction"] == max(one["probabilities"], key=one["probabilities"].get)
        p = np.exp(one["logits"]) / np.exp(one["logits"]).sum()
        assert list(one["probabilities"].values()) == pytest.approx(p.tolist(), abs=1e-6)
    assert "<svg" in (original / "eval" / "validation_confusion.svg").read_text()
    page = (original / "report.html").read_text()
    assert "Scores on validation" in page
    assert "<td>11</td></tr>" in page
    dry = report.lines()[0]
    assert "".join(f"<td>{value}</td>" for value in dry[1:]) in page
    assert (dry[0], dry[4]) == ("dry", "7")


def test_eval_prints_the_scores_of_classes_and_writes_them(
    made: Made, original: pathlib.Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = pathlib.Path(str(made("copy", 0).run))
    shutil.rmtree(place / "eval")
    assert main(["eval", str(place)]) == 0
    told = capsys.readouterr().out
    figures, table, files = (part.splitlines() for part in told.split("\n\n"))
    assert figures[0] == "metric\tvalidation\tmost frequent class"
    assert figures[1].startswith("accuracy\t")
    assert figures[1].endswith(f"\t{7 / 11:.6g}")
    assert table[0] == "class\tprecision\trecall\tF1\tsupport"
    assert [line.split("\t")[0] for line in table[1:]] == ["dry", "wet", "macro average", "weighted average"]
    assert [line.split("\t")[4] for line in table[1:]] == ["7", "4", "11", "11"]
    assert files == [f"Files: {place}/eval/validation.jsonl, {place}/eval/validation_confusion.svg, "
                     f"{place}/eval/validation.json"]  # fmt: skip
    for name in ("validation.jsonl", "validation.json", "validation_confusion.svg"):
        assert (place / "eval" / name).read_bytes() == (original / "eval" / name).read_bytes()


def test_a_report_survives_its_file(tmp_path: pathlib.Path, original: pathlib.Path) -> None:
    """With figures that are no numbers, a name that is markup, and a scatter."""
    (tmp_path / "metrics.jsonl").write_text((original / "metrics.jsonl").read_text())
    records = [{"index": 0, "target": 1.0, "prediction": math.nan, "text": "a\u2028b\x85c"}]
    evil = "<script>x</script>"
    report = SplitReport(
        task="regression", split="test", step=3, data="f", examples=1, figures={"mse": 1.0, evil: math.inf},
        baselines={evil: {"mse": 0.5}}, header=["", evil], rows=[[evil, 0.25], ["n", 1234]],
        picture=ScatterPicture.of([1.0], [2.0]), records=lambda: records,
    )  # fmt: skip
    assert [path.name for path in report.write(RunFolder(tmp_path))] == [
        "test.jsonl", "test_scatter.svg", "test.json",
    ]  # fmt: skip
    (found,) = read_reports(tmp_path)
    assert found == dataclasses.replace(report, figures=found.figures)
    assert found.figures["mse"] == 1.0
    assert math.isnan(found.figures[evil])
    assert found.records() == [{**records[0], "prediction": None}]
    assert found.lines() == [[evil, "0.2500"], ["n", "1,234"]]
    page = write_report(tmp_path).read_text()
    assert evil not in page
    assert page.count("&lt;script&gt;x&lt;/script&gt;") >= 4


def test_a_store_gets_the_files_of_the_split_alone(
    original: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is old in the working copy of whoever evaluates."""
    monkeypatch.setenv("LMOBJ_CACHE", str(tmp_path / "cache"))
    folder = RunFolder("memory://reported/run")
    folder.create("name: x\n")
    (folder.path / "metrics.jsonl").write_text("old")
    (report,) = read_reports(original)
    report.write(RunFolder("memory://reported/run"))
    store = fsspec.filesystem("memory")
    names = {name.removeprefix("/reported/run/") for name in store.find("/reported/run")}
    assert names == {"config.yaml", *(f"eval/validation{end}" for end in (".json", ".jsonl", "_confusion.svg"))}
    shutil.rmtree(folder.path)
    found = folder.fetched("eval/validation.json")
    assert found is not None
    assert SplitReport.read(found) == report
    assert folder.fetched("eval/test.json") is None
    store.rm("/reported", recursive=True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("validation.json", "{"),
        ("validation.json", "[]"),
        ("validation.json", '{"figures": {}, "picture": {"kind": "pie"}}'),
        ("validation.jsonl", '{"index": 0, "target": "dry", "prediction": "dry"}\n'),
        ("validation.jsonl", '{"index": 0}\n' * 11),
    ],
)
def test_damaged_files_are_named(made: Made, name: str, content: str) -> None:
    place = pathlib.Path(str(made("damaged", 0).run))
    (place / "eval" / name).write_text(content)
    with pytest.raises(UserError, match=rf"eval/{name} is damaged"):
        [report.records() for report in read_reports(place)]


# --- comparisons ---


def test_two_groups_by_hand(made: Made) -> None:
    # Right of 11: 11 and 9 in one group, 6, 8 and 7 in the other.
    wrongs = {"one": [[], [0, 1]], "two": [[0, 1, 2, 3, 4], [1, 2, 4], [0, 5, 7, 9]]}
    groups = {
        name: [made(f"{name}_{seed}", seed, wrong) for seed, wrong in enumerate(group)]
        for name, group in wrongs.items()
    }
    found = compare(groups, samples=2000, seed=5)
    assert found.metric == "accuracy"
    accuracy = {"one": [11 / 11, 9 / 11], "two": [6 / 11, 8 / 11, 7 / 11]}
    assert {name: list(values.values()) for name, values in found.values.items()} == accuracy
    assert found.over_seeds == seed_difference(accuracy["one"], accuracy["two"])
    mean = {
        name: np.mean([[i not in wrong for i in range(11)] for wrong in group], axis=0)
        for name, group in wrongs.items()
    }
    assert found.over_examples == paired_bootstrap(mean["one"], mean["two"], seed=5, samples=2000)
    assert found.over_examples.difference == pytest.approx(10 / 11 - 7 / 11)
    header, rows = found.table(baselines=True)
    assert header == [
        "accuracy on validation", "runs", "mean", "deviation", "seed 0", "seed 1", "seed 2", "most frequent class",
    ]  # fmt: skip
    assert rows[0] == ["one", "2", "0.9091", "0.1286", "1.0000", "0.8182", "", "0.6364"]
    lines = found.lines()
    assert lines[0] == "one - two: accuracy +0.2727."
    assert "Resampled were the 11 examples of validation" in lines[3]

    # The mean of F1s over the runs of a group, not the F1 of their counts together; two runs beside three.
    f1 = {name: np.mean([macro_f1(made_up(wrong)) for wrong in group]) for name, group in wrongs.items()}
    found = compare(groups, metric="macro_f1", samples=50)
    assert found.over_examples is not None
    assert found.over_examples.difference == pytest.approx(f1["one"] - f1["two"])
    assert found.baselines == {}


def test_records_are_made_where_they_are_missing_or_old(
    made: Made, classified: TrainedRun, original: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing of one run, of an earlier step in another, at hand in the third."""
    runs = [made("missing", 0), made("old", 1, [], step=15), made("there", 2, [0])]
    shutil.rmtree(pathlib.Path(str(runs[0].run)) / "eval")
    opened = []

    def opens(config: Experiment, **_: Any) -> TrainedRun:
        opened.append(str(config.run))
        return classified

    monkeypatch.setattr(comparison, "open_run", opens)
    said: list[str] = []
    found = compare({"all": runs}, say=said.append)
    assert opened == [runs[0].run, runs[1].run]
    assert said == [f"Evaluating {run} on validation" for run in opened]
    own = last_metrics(original / "metrics.jsonl")["eval/accuracy"]
    assert list(found.values["all"].values()) == [own, own, 10 / 11]
    assert (found.over_seeds, found.over_examples, found.lines()) == (None, None, [])
    for name in ("validation.jsonl", "validation.json"):
        text = (original / "eval" / name).read_text()
        assert (pathlib.Path(opened[0]) / "eval" / name).read_text() == text
    assert compare({"all": runs}).values == found.values
    assert len(opened) == 2


def test_the_command_prints_and_writes_a_table(
    made: Made, tmp_path: pathlib.Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed, wrong in (("base_0", 0, [0]), ("base_1", 1, [0, 1]), ("large_0", 0, []), ("large_1", 1, [1])):
        made(name, seed, wrong)
    monkeypatch.chdir(tmp_path)
    argv = ["compare", "large_*", "--with", "base_0", "base_1", "--baseline", "--samples", "100", "--output", "out.md"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "large\t2\t0.9545\t0.0643\t1.0000\t0.9091\t0.6364\nbase\t2\t0.8636\t0.0643\t0.9091\t0.8182\t0.6364\n" in out
    assert "large - base: accuracy +0.0909." in out
    text = (tmp_path / "out.md").read_text()
    assert text.startswith("| accuracy on validation | runs | mean |")
    assert "| large | 2 | 0.9545 |" in text
    assert "p = " in text
    assert main([*argv, "--name", "first", "--name", "second"]) == 0
    assert "first - second: accuracy +0.0909." in capsys.readouterr().out


def test_names_and_patterns(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert group_names([["a/base_seed0", "b/base-1/"], ["large_0"]], []) == ["base", "large_0"]
    assert group_names([["0", "1"], ["x", "y"]], []) == ["A", "B"]
    assert group_names([["x_0", "x_1"], ["y/x_0", "y/x_1"]], []) == ["x", "A"]
    assert group_names([["x"], ["x"]], ["A"]) == ["A", "x"]
    assert group_names([["x"], ["A"]], ["A"]) == ["A", "B"]
    for name in ("r_1", "r_0", "[x]"):
        (tmp_path / name).mkdir()
    (tmp_path / "r_notes.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    assert found_runs(["r_*", "r_1", "[x]", "gs://b/r_*", "none"], "RUN") == ["r_0", "r_1", "[x]", "gs://b/r_*", "none"]


def _other(run: Experiment, **changes: Any) -> Experiment:
    return dataclasses.replace(run, **changes)


def test_what_cannot_stand_beside_one_another(made: Made, causal: Any) -> None:
    one, two = made("one", 0, [0]), made("two", 1, [1])
    wide = _other(two, model=dataclasses.replace(two.model, width=32))
    elsewhere = _other(two, data=dataclasses.replace(two.data, test=0.25))

    def refusals() -> Iterator[tuple[dict[str, Sequence[Experiment]], dict[str, Any], str]]:
        yield {"a": [one, wide]}, {}, r"model\.width is 16 in .* and 32 in .*; accepted: .* train\.seed alone"
        yield {"a": [one, _other(one)]}, {}, r"train\.seed is 0 in both"
        yield {"a": [one, elsewhere]}, {}, r"data\.test is 0\.0 in"
        yield {"a": [causal.assembly.config]}, {}, r"objective\.name is 'causal_lm' in .* accepted: runs of a task"
        yield {"a": [one]}, {"metric": "bleu"}, r"--metric is 'bleu', which .* accepted: accuracy, macro_f1, perplexity"
        yield {"a": [one], "b": [two]}, {"metric": "perplexity"}, r"--metric is 'perplexity', by which two groups"
        yield {"a": [one], "b": []}, {}, "a group without runs"
        yield {}, {}, "0 groups"

    for groups, settings, message in refusals():
        with pytest.raises(UserError, match=message):
            compare(groups, **settings)
    # Of other data by the record of the run; then a setting that differs is named, else the files.
    strange = made("strange", 1, [1], data="another")
    with pytest.raises(UserError, match=r"fingerprint another.*the files of data\.source changed"):
        compare({"a": [one], "b": [strange]})
    with pytest.raises(UserError, match=r"data\.test is 0\.0 in .* and 0\.25 in"):
        compare({"a": [one], "b": [_other(strange, data=elsewhere.data)]})
    records = pathlib.Path(str(two.run)) / "eval" / "validation.jsonl"
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    lines[3]["target"] = "dry"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=r"the targets in .*two/eval/validation\.jsonl are not those"):
        compare({"a": [one], "b": [two]})
