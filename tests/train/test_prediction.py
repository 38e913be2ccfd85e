"""Predictions of files: those of evaluation, in order, whatever the batches, and through a stop."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
import tiny_runs
from tiny_runs import labelled_rows as rows

from lmobj.cli._main import main
from lmobj.data import JsonLines
from lmobj.errors import UserError
from lmobj.objectives import Regression
from lmobj.train import FitResult, fit
from lmobj.train.prediction import _check_origin, predict
from lmobj.train.trained import TrainedRun, open_run

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(classified: TrainedRun) -> TrainedRun:
    return classified


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_those_of_evaluation(run: TrainedRun, tmp_path: pathlib.Path, capsys: Captured) -> None:
    folder = pathlib.Path(run.assembly.config.run).parent
    output = tmp_path / "out.jsonl"
    arguments = ["predict", str(folder / "run"), "--input", str(folder / "dev.jsonl"), "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"11 examples: {output}\n"
    assert not output.with_name("out.jsonl.partial").exists()
    found = lines(output)
    assert [(line["text"], line["pair"]) for line in found] == [(row["a"], row["b"]) for row in rows(11)]
    for line in found:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    right = [line["label"] == row["y"] for line, row in zip(found, rows(11), strict=True)]
    nll = [-math.log(line["probabilities"][row["y"]]) for line, row in zip(found, rows(11), strict=True)]
    with tiny_runs.quick_compilation():
        metrics = run.evaluate()
    assert metrics["accuracy"] == np.mean(right)
    assert metrics["nll"] == pytest.approx(np.mean(nll), rel=1e-3)

    assert main(arguments) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_stopped_prediction_is_gone_on_with(run: TrainedRun, tmp_path: pathlib.Path) -> None:
    inputs = [str(pathlib.Path(run.assembly.config.run).parent / "dev.jsonl")]
    with tiny_runs.quick_compilation():
        assert predict(run, inputs, tmp_path / "whole.jsonl", quiet=True) == 11
        whole = (tmp_path / "whole.jsonl").read_bytes()
        begun = whole.splitlines(keepends=True)
        # Five lines were written and part of a sixth; the first is changed, to see that it is kept.
        partial = tmp_path / "out.jsonl.partial"
        _check_origin(partial, run, inputs)
        partial.write_bytes(b"{}\n" + b"".join(begun[1:5]) + begun[5][:7])
        later = TrainedRun(run.assembly, run.state._replace(step=run.state.step + 1))
        with pytest.raises(UserError, match=r"partial' is what an earlier .* whose step is \d+ and not \d+"):
            predict(later, inputs, tmp_path / "out.jsonl", quiet=True)
        assert predict(run, inputs, tmp_path / "out.jsonl", quiet=True) == 11
    assert (tmp_path / "out.jsonl").read_bytes() == b"{}\n" + b"".join(begun[1:])
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "whole.jsonl"}


def test_what_cannot_be_predicted(run: TrainedRun, causal: FitResult, tmp_path: pathlib.Path) -> None:
    other = TrainedRun(causal.assembly, causal.state)
    with pytest.raises(UserError, match="objective of this run is causal_lm, which says nothing about single examples"):
        predict(other, ["x"], tmp_path / "out.jsonl")
    with pytest.raises(UserError, match=r"--input\.files: no file matches"):
        predict(run, [str(tmp_path / "none")], tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_scores_of_regression(run: TrainedRun, tmp_path: pathlib.Path) -> None:
    folder = pathlib.Path(run.assembly.config.run).parent
    numbered = [{**row, "y": float(i)} for i, row in enumerate(rows(30))]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    source = JsonLines(files=(str(tmp_path / "train.jsonl"),), text="a", pair="b", label="y", label_kind="number")
    data = dataclasses.replace(run.assembly.config.data, source=source, validation=0.0)
    config = dataclasses.replace(run.assembly.config, run=str(tmp_path / "run"), data=data, objective=Regression())
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2))
    with tiny_runs.quick_compilation():
        fit(config, quiet=True)
        predict(open_run(config, quiet=True), [str(folder / "dev.jsonl")], tmp_path / "out.jsonl", quiet=True)
    assert all(math.isfinite(line["score"]) for line in lines(tmp_path / "out.jsonl"))
    assert len(lines(tmp_path / "out.jsonl")) == 11
