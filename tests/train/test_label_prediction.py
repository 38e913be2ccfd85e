"""A run of multi-label classification: what it predicts of files is what evaluation says of the same texts."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import tiny_runs

from lmobj.config import Experiment
from lmobj.data import DataConfig, HeldOut, JsonLines, SentencePieceConfig
from lmobj.models import EncoderConfig
from lmobj.objectives import MultiLabel
from lmobj.train import TrainConfig, fit
from lmobj.train.evaluation import Evaluation
from lmobj.train.prediction import predict
from lmobj.train.sharding import MeshConfig
from lmobj.train.trained import open_run


def rows(count: int) -> list[dict[str, object]]:
    words = ("sun", "rain", "wind")
    chosen = [[word for bit, word in enumerate(words) if i >> bit & 1] for i in range(count)]
    return [{"text": f"{i} {' '.join(names)} word", "y": names} for i, names in enumerate(chosen)]


def test_predictions_are_those_of_evaluation(tmp_path: pathlib.Path) -> None:
    for name, count in (("train", 80), ("dev", 11)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    source = JsonLines(files=(str(tmp_path / "train.jsonl"),), label="y", label_kind="classes")
    config = Experiment(
        run=str(tmp_path / "run"),
        data=DataConfig(
            source=source,
            tokenizer=SentencePieceConfig(vocab_size=290),
            validation=HeldOut(files=(str(tmp_path / "dev.jsonl"),)),
            test=0.0,
            length=16,
            cache=str(tmp_path / "cache"),
        ),
        model=EncoderConfig(layers=1, width=16, heads=2, max_length=16),
        objective=MultiLabel(classes=3),
        train=TrainConfig(steps=2, batch_size=4, mesh=MeshConfig(data=1)),
        sample=(),
    )
    with tiny_runs.quick_compilation():
        fit(config, quiet=True)
        run = open_run(config, quiet=True)
        assert predict(run, [str(tmp_path / "dev.jsonl")], tmp_path / "out.jsonl", quiet=True) == 11
        evaluation = Evaluation(run.assembly)
        metrics, report = evaluation.examine(run.state)
    assert report is not None
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    for row, line, record in zip(rows(11), found, report.records(), strict=True):
        assert line["text"] == row["text"]
        assert record["target"] == sorted(row["y"])
        assert line["labels"] == record["prediction"] == [n for n, p in line["probabilities"].items() if p >= 0.5]
        assert line["probabilities"] == pytest.approx(record["probabilities"], abs=2e-6)
    right = [line["labels"] == sorted(row["y"]) for line, row in zip(found, rows(11), strict=True)]
    assert metrics["exact_match"] == pytest.approx(np.mean(right))
    # The sets 0 to 7 are as frequent as one another but for 80 = 8 * 10: the first in order is taken, no label at all.
    assert evaluation.baselines()["most frequent set of labels"]["exact_match"] == pytest.approx(2 / 11)
