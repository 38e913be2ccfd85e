"""Predictions of files: those of evaluation, in order, whatever the batches, and through a stop."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest
import tiny_runs

from lmobj.cli._main import main
from lmobj.config import Experiment
from lmobj.data import DataConfig, HeldOut, JsonLines, SentencePieceConfig
from lmobj.errors import UserError
from lmobj.models import EncoderConfig
from lmobj.objectives import Classification, Regression
from lmobj.train import FitResult, TrainConfig, fit
from lmobj.train.prediction import predict
from lmobj.train.sharding import MeshConfig
from lmobj.train.trained import TrainedRun, open_run

Captured = pytest.CaptureFixture[str]


def rows(count: int) -> list[dict[str, object]]:
    """Pairs of texts, of which many are longer than a row, labelled by whether a word is in the first."""
    words = [("sun", "dry") if i % 3 else ("rain", "wet") for i in range(count)]
    return [
        {"a": f"{word} " * (i % 9 + 1), "b": "word " * (i % 5 + 1), "y": label} for i, (word, label) in enumerate(words)
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    folder = tmp_path_factory.mktemp("predicted")
    for name, count in (("train", 80), ("dev", 11)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    config = Experiment(
        run=str(folder / "run"),
        data=DataConfig(
            source=JsonLines(files=(str(folder / "train.jsonl"),), text="a", pair="b", label="y"),
            tokenizer=SentencePieceConfig(vocab_size=280),
            validation=HeldOut(files=(str(folder / "dev.jsonl"),)),
            test=0.0,
            length=12,
            cache=str(folder / "cache"),
        ),
        model=EncoderConfig(layers=1, width=16, heads=2, max_length=12),
        objective=Classification(),
        train=TrainConfig(steps=30, batch_size=4, mesh=MeshConfig(data=1)),
    )
    with tiny_runs.quick_compilation():
        fit(config, quiet=True)
        return open_run(config, quiet=True)


def lines(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_predictions_are_those_of_evaluation(run: TrainedRun, tmp_path: pathlib.Path, capsys: Captured) -> None:
    folder = pathlib.Path(run.assembly.config.run).parent
    output = tmp_path / "out.jsonl"
    arguments = ["predict", str(folder / "run"), "--input", str(folder / "dev.jsonl"), "--output", str(output)]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"11 texts: {output}\n"
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
        (tmp_path / "out.jsonl.partial").write_bytes(b"{}\n" + b"".join(begun[1:5]) + begun[5][:7])
        assert predict(run, inputs, tmp_path / "out.jsonl", quiet=True) == 11
    assert (tmp_path / "out.jsonl").read_bytes() == b"{}\n" + b"".join(begun[1:])


def test_what_cannot_be_predicted(run: TrainedRun, causal: FitResult, tmp_path: pathlib.Path) -> None:
    other = TrainedRun(causal.assembly, causal.state)
    with pytest.raises(UserError, match="objective of this run is causal_lm, which says nothing about whole texts"):
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
