"""Runs of token classification and extractive QA: what the person is told, evaluation of a part, predictions."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import pathlib
from typing import Any

import pytest
import tiny_runs

from lmobj.cli._main import main
from lmobj.config import Experiment
from lmobj.data import ConllFiles, DataConfig, HeldOut, SentencePieceConfig, SquadFiles
from lmobj.models import EncoderConfig
from lmobj.objectives import ExtractiveQA, TokenClassification
from lmobj.tasks import Entity, decode_tags
from lmobj.train import TrainConfig, fit
from lmobj.train.evaluation import Evaluation
from lmobj.train.prediction import _check_origin, predict
from lmobj.train.sharding import MeshConfig
from lmobj.train.trained import TrainedRun, open_run

Captured = pytest.CaptureFixture[str]


def sentences(count: int) -> str:
    """Words and tags; every fifth sentence is longer than a row."""
    found = []
    for i in range(count):
        words = ["Ada B-PER", "Lovelace I-PER", "met O", f"w{i} O", "Rome B-LOC"] * (6 if i % 5 == 4 else 1)
        found.append("\n".join(words[2 * (i % 2) :]))
    return "\n\n".join(found) + "\n"


def questions(count: int) -> dict[str, Any]:
    """SQuAD's format; contexts of one to five windows, and every third question without an answer."""
    paragraphs = []
    for i in range(count):
        context = "Ann saw a cat. " * (i % 4) + f"Bob has a red hat {i}."
        text, start = "red hat", context.index("red hat")
        qas = {"id": f"q{i}", "question": "what has Bob?", "is_impossible": i % 3 == 2}
        answers = [] if i % 3 == 2 else [{"text": text, "answer_start": start}]
        paragraphs.append({"context": context, "qas": [{**qas, "answers": answers}]})
    return {"data": [{"title": "", "paragraphs": [paragraph]} for paragraph in paragraphs]}


def trained(folder: pathlib.Path, source: Any, held_out: str, objective: Any, length: int) -> tuple[TrainedRun, str]:
    """A run, and what was printed while it was trained."""
    config = Experiment(
        run=str(folder / "run"),
        data=DataConfig(
            source=source,
            tokenizer=SentencePieceConfig(vocab_size=300),
            validation=HeldOut(files=(held_out,)),
            test=0.0,
            length=length,
        ),
        model=EncoderConfig(layers=1, width=16, heads=2, max_length=length),
        objective=objective,
        train=TrainConfig(steps=20, batch_size=4, mesh=MeshConfig(data=1)),
    )
    told = io.StringIO()
    with tiny_runs.quick_compilation(), contextlib.redirect_stdout(told):
        fit(config)
        return open_run(config, quiet=True), told.getvalue()


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedRun, str]:
    folder = tmp_path_factory.mktemp("tagger")
    for name, count in (("train", 40), ("dev", 11)):
        (folder / f"{name}.conll").write_text(sentences(count))
    source = ConllFiles(files=(str(folder / "train.conll"),), subwords="all")
    return trained(folder, source, str(folder / "dev.conll"), TokenClassification(classes=5), 24)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainedRun, str]:
    folder = tmp_path_factory.mktemp("reader")
    for name, count in (("train", 24), ("dev", 9)):
        (folder / f"{name}.json").write_text(json.dumps(questions(count)))
    source = SquadFiles(files=(str(folder / "train.json"),), stride=8, null_threshold=0.0)
    return trained(folder, source, str(folder / "dev.json"), ExtractiveQA(), 28)


def folder_of(run: TrainedRun) -> pathlib.Path:
    return pathlib.Path(run.assembly.config.run).parent


def records(run: TrainedRun) -> list[dict[str, Any]]:
    """Of evaluation, what it says of every held-out example."""
    with tiny_runs.quick_compilation():
        report = Evaluation(run.assembly).examine(run.state)[1]
    assert report is not None
    return list(report.records())


def predicted(run: TrainedRun, inputs: pathlib.Path, output: pathlib.Path) -> list[dict[str, Any]]:
    with tiny_runs.quick_compilation():
        count = predict(run, [str(inputs)], output, quiet=True)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert count == len(lines)
    return lines


def test_the_person_is_told_what_does_not_fit(tagger: tuple[TrainedRun, str], capsys: Captured) -> None:
    run, told = tagger
    (train,), (dev,) = (run.assembly.notes(split) for split in ("train", "validation"))
    assert train.startswith("train: sentences that are longer than a row (data.length is 24): 8 of 40; words")
    assert dev.startswith("validation: sentences that are longer than a row (data.length is 24): 2 of 11; words")
    assert told.count(train) == told.count(dev) == 1
    with tiny_runs.quick_compilation():
        assert main(["eval", run.assembly.config.run]) == 0
    shown = capsys.readouterr()
    assert shown.err.splitlines().count(dev) == 1
    assert "train: " not in shown.err
    assert "entity_f1" in shown.out


def test_predictions_of_sentences_are_those_of_evaluation(
    tagger: tuple[TrainedRun, str], tmp_path: pathlib.Path
) -> None:
    run, _ = tagger
    found = predicted(run, folder_of(run) / "dev.conll", tmp_path / "out.jsonl")
    expected = records(run)
    assert [(line["words"], line["tags"]) for line in found] == [
        (list(record["words"]), record["prediction"]) for record in expected
    ]
    assert [[Entity(*entity) for entity in line["entities"]] for line in found] == [
        decode_tags(record["prediction"]) for record in expected
    ]
    assert any(line["entities"] for line in found)
    words = "\n".join(line.split(" ")[0] for line in sentences(11).splitlines())
    (tmp_path / "words.conll").write_text(words + "\n")
    assert predicted(run, tmp_path / "words.conll", tmp_path / "words.jsonl") == found, "tags need not be there"


def test_a_stopped_prediction_of_sentences_is_gone_on_with(
    tagger: tuple[TrainedRun, str], tmp_path: pathlib.Path
) -> None:
    run, inputs = tagger[0], folder_of(tagger[0]) / "dev.conll"
    predicted(run, inputs, tmp_path / "whole.jsonl")
    begun = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    _check_origin(tmp_path / "out.jsonl.partial", run, [str(inputs)])
    (tmp_path / "out.jsonl.partial").write_bytes(b"{}\n" + b"".join(begun[1:5]) + begun[5][:7])
    predicted(run, inputs, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_bytes() == b"{}\n" + b"".join(begun[1:])


def test_predictions_of_questions_are_those_of_evaluation(
    reader: tuple[TrainedRun, str], tmp_path: pathlib.Path
) -> None:
    run, _ = reader
    asked = questions(9)
    for article in asked["data"]:
        for question in article["paragraphs"][0]["qas"]:
            del question["answers"], question["is_impossible"]
    nothing = {"context": " ", "qas": [{"id": "blank", "question": "what?"}]}
    asked["data"].insert(2, {"paragraphs": [nothing]})
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    found = predicted(run, tmp_path / "asked.json", tmp_path / "out.jsonl")
    assert found.pop(2) == {
        "id": "blank",
        "question": "what?",
        "answer": "",
        "score": None,
        "probability": None,
        "null_odds": None,
    }
    for line, record in zip(found, records(run), strict=True):
        assert line.keys() == {"id", "question", "answer", "score", "probability", "null_odds"}
        assert (line["id"], line["question"]) == (record["id"], "what has Bob?")
        assert line["answer"] == record["prediction"] == ("" if line["null_odds"] > 0 else record["best"][0][0])
        assert line["score"] == pytest.approx(record["best"][0][1], abs=1e-4)
        assert line["probability"] == pytest.approx(record["best"][0][2], abs=1e-4)
        assert line["null_odds"] == pytest.approx(record["null_odds"], abs=1e-4)


def test_evaluation_of_a_part_leaves_out_the_question_it_breaks_off_in(reader: tuple[TrainedRun, str]) -> None:
    run, _ = reader
    asked = run.assembly.dataset.reference(run.assembly.spec, "validation").asked
    windows = [len(one.windows.tokens) for one in asked]
    assert max(windows) > 2
    batches = next(n for n in range(1, 9) if all(sum(windows[:k]) != 4 * n for k in range(len(windows))))
    whole = sum(sum(windows[: k + 1]) <= 4 * batches for k in range(len(windows)))
    with tiny_runs.quick_compilation():
        metrics, report = Evaluation(run.assembly).examine(run.state, batches)
    assert report is not None
    every = records(run)
    assert [record["id"] for record in report.records()] == [record["id"] for record in every[:whole]]
    assert 0 < whole < len(every)
    assert metrics["f1"] == pytest.approx(sum(record["f1"] for record in every[:whole]) / whole)


def test_words_in_lines_of_sentences_are_predicted(tagger: tuple[TrainedRun, str], tmp_path: pathlib.Path) -> None:
    run, _ = tagger
    data = run.assembly.dataset
    source = dataclasses.replace(data.kind.source, lines="sentences")
    changed = dataclasses.replace(data, kind=dataclasses.replace(data.kind, source=source))
    (tmp_path / "lines.txt").write_text("Ada met Rome\nAda w1\tO O\n")
    other = TrainedRun(dataclasses.replace(run.assembly, dataset=changed), run.state)
    found = predicted(other, tmp_path / "lines.txt", tmp_path / "out.jsonl")
    assert [line["words"] for line in found] == [["Ada", "met", "Rome"], ["Ada", "w1"]]
