"""Runs of an encoder with a decoder: what is told at the end, evaluated, predicted and generated is the same."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Any

import pytest
import tiny_runs

from lmobj.cli._main import main
from lmobj.config import Experiment
from lmobj.data import DataConfig, HeldOut, JsonLines, SentencePieceConfig, TextFiles
from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, WritingConfig, score_written
from lmobj.models import DecoderConfig, EncoderDecoderConfig
from lmobj.objectives import CausalLM, Denoiser, MixtureOfDenoisers, PrefixLM, SequenceToSequence, SpanCorruption
from lmobj.train import TrainConfig, fit
from lmobj.train.assemble import assemble
from lmobj.train.sharding import MeshConfig
from lmobj.train.summary import check_samples
from lmobj.train.trained import TrainedRun, open_run

Captured = pytest.CaptureFixture[str]

MODEL = EncoderDecoderConfig(layers=1, width=16, heads=2, head_width=8, mlp_width=16, max_length=24)
SOURCE, TARGET = 12, 9
"""Tokens, ends included."""


def rows(count: int) -> list[dict[str, str]]:
    """Numbers, and their words in another order; some are longer than rows."""
    words = ["one", "two", "three", "four", "five"]
    sources = (" ".join(str(i * k % 7) for k in range(1, 2 + i % 5)) for i in range(1, count + 1))
    targets = (" ".join(words[i * k % 5] for k in range(1, 2 + i % 4)) for i in range(1, count + 1))
    return [{"a": source, "b": target} for source, target in zip(sources, targets, strict=True)]


def experiment(folder: pathlib.Path, **changes: Any) -> Experiment:
    for name, count in (("train", 60), ("dev", 11)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    settings: dict[str, Any] = {
        "run": str(folder / "run"),
        "data": DataConfig(
            source=JsonLines(files=(str(folder / "train.jsonl"),), text="a", pair="b"),
            tokenizer=SentencePieceConfig(vocab_size=290),
            validation=HeldOut(files=(str(folder / "dev.jsonl"),)),
            test=0.0,
            length=SOURCE,
            cache=str(folder / "cache"),
        ),
        "model": MODEL,
        "objective": SequenceToSequence(target_length=TARGET),
        "train": TrainConfig(steps=6, batch_size=4, mesh=MeshConfig(data=1)),
        "sample": ("1 2",),
        "writing": WritingConfig(decoding=BeamConfig(num_beams=2)),
    }
    return Experiment(**{**settings, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    config = experiment(tmp_path_factory.mktemp("written"))
    with tiny_runs.quick_compilation():
        fit(config, quiet=True)
        return open_run(config, quiet=True)


def records(run: TrainedRun) -> tuple[pathlib.Path, list[dict[str, Any]]]:
    folder = pathlib.Path(run.assembly.config.run_dir)
    return folder, [json.loads(line) for line in (folder / "eval" / "validation.jsonl").read_text().splitlines()]


def test_training_ends_with_the_scores_of_what_it_writes(run: TrainedRun) -> None:
    folder, found = records(run)
    assert [(one["source"], one["target"]) for one in found] == [(row["a"], row["b"]) for row in rows(11)]
    stored = json.loads((folder / "eval" / "validation.json").read_text())
    scores = score_written([one["prediction"] for one in found], [row["b"] for row in rows(11)])
    assert {name: stored["figures"][name] for name in scores.figures} == pytest.approx(scores.figures)
    copied = score_written([row["a"] for row in rows(11)], [row["b"] for row in rows(11)])
    assert stored["baselines"] == {"source copied": pytest.approx(copied.figures)}
    assert stored["figures"]["nll"] > 0
    assert "BLEU" in (folder / "report.html").read_text()
    (sample,) = json.loads((folder / "samples.json").read_text())
    assert sample["prompt"] == "1 2"
    assert run.writer is not None
    with tiny_runs.quick_compilation():
        assert sample["text"] == run.writer.write_texts(["1 2"], run.writer.decoding)[0][0].text
    # What is evaluated while it trains is not written.
    lines = tiny_runs.metric_lines(folder)
    assert not any("bleu" in name for line in lines for name in line)


def test_eval_predict_and_generate_write_the_same(run: TrainedRun, tmp_path: pathlib.Path, capsys: Captured) -> None:
    folder, found = records(run)
    with tiny_runs.quick_compilation():
        assert main(["eval", str(folder), "--json"]) == 0
        printed = capsys.readouterr()
        stored = json.loads((folder / "eval" / "validation.json").read_text())
        assert json.loads(printed.out) == pytest.approx(stored["figures"])
        assert "sources that are cut to 12 tokens" not in printed.err  # none is
        assert "validation: targets that are cut to 9 tokens" in printed.err

        # Second texts need not be there; nor do batches matter.
        source = tmp_path / "sources.jsonl"
        source.write_text("".join(json.dumps({"a": row["a"]}) + "\n" for row in rows(11)))
        output = tmp_path / "out.jsonl"
        assert main(["predict", str(folder), "--input", str(source), "--output", str(output), "-q"]) == 0
        lines = [json.loads(line) for line in output.read_text().splitlines()]
        assert [line["text"] for line in lines] == [row["a"] for row in rows(11)]
        assert [line["prediction"] for line in lines] == [one["prediction"] for one in found]
        assert all(line["log_probability"] < 0 for line in lines)

        capsys.readouterr()
        assert main(["generate", str(folder), "--prompt", rows(2)[1]["a"]]) == 0
        assert capsys.readouterr().out == f"{rows(2)[1]['a']}\n{found[1]['prediction']}\n"
        assert main(["generate", str(folder), "--prompt", "1", "--beam", "1", "--tokens", "3", "--logprobs"]) == 0
        shown = capsys.readouterr().out.split("ln p  token\n")[1].splitlines()
        assert 1 <= len(shown) - 1 <= 3  # and the sum
        assert main(["generate", str(folder), "--prompt", "1", "--tokens", "25"]) == 2
        assert "model.max_length is 24 and rows have 25 tokens" in capsys.readouterr().err
        assert main(["generate", str(folder), "--prompt", ""]) == 2
        assert "the prompt is empty" in capsys.readouterr().err
        assert main(["fill", str(folder), "1 <extra_id_0>"]) == 2
        assert "does not teach a model to fill masks" in capsys.readouterr().err


def test_a_part_of_a_split_is_written_or_nothing(run: TrainedRun) -> None:
    writing = WritingConfig(examples=3, decoding=BeamConfig(num_beams=2))
    config = dataclasses.replace(run.assembly.config, writing=writing)
    assembly = dataclasses.replace(run.assembly, config=config)
    with tiny_runs.quick_compilation():
        _, told = TrainedRun(assembly, run.state).examine()
        assert told is not None
        assert told.examples == 3
        assert [one["prediction"] for one in told.records()] == [one["prediction"] for one in records(run)[1][:3]]
        none = dataclasses.replace(assembly, config=dataclasses.replace(config, writing=WritingConfig(examples=0)))
        metrics, told = TrainedRun(none, run.state).examine()
    assert told is None
    assert "bleu" not in metrics


def test_what_cannot_be_is_told_before_training(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = experiment(tmp_path)
    with pytest.raises(UserError, match=r"objective.target_length is 25 and model.max_length is 24"):
        fit(dataclasses.replace(config, objective=SequenceToSequence(target_length=25)), quiet=True)
    with pytest.raises(UserError, match=r"objective.rendering is encoder_decoder, and Decoder"):
        fit(dataclasses.replace(config, model=DecoderConfig(layers=1, width=16, heads=2)), quiet=True)
    with pytest.raises(UserError, match=r"sample has the prompt '', which the model cannot use: it is empty"):
        fit(dataclasses.replace(config, sample=("",)), quiet=True)
    best = dataclasses.replace(config.train.best, metric="bleu")
    with pytest.raises(UserError, match=r"train.best.metric is 'bleu'; accepted: accuracy, loss"):
        fit(dataclasses.replace(config, train=dataclasses.replace(config.train, best=best)), quiet=True)
    with pytest.raises(UserError, match=r"sample has the prompt '', which the model cannot use: it is empty"):
        fit(dataclasses.replace(config, sample=("",)), quiet=True)
    causal = {"objective": CausalLM(), "model": DecoderConfig(layers=1, width=16, heads=2, max_length=24)}
    with pytest.raises(UserError, match=r"writing is set, and objective.name=causal_lm trains no encoder with a dec"):
        fit(dataclasses.replace(config, **causal), quiet=True)
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'lmobj\[scores\]', or set writing.examples=0"):
        fit(config, quiet=True)
    assert not (tmp_path / "run").exists()


def _untrained(tmp_path: pathlib.Path, objective: Any, **changes: Any) -> TrainedRun:
    corpus = tiny_runs.write_corpus(tmp_path / "corpus.txt", documents=40)
    source = TextFiles(files=(str(corpus),), documents="blocks")
    config = experiment(tmp_path, objective=objective, sample=(), writing=None, **changes)
    tokenizer = SentencePieceConfig(vocab_size=300, sentinels=6)
    data = DataConfig(source, tokenizer, length=24, cache=str(tmp_path / "cache"))
    run = assemble(dataclasses.replace(config, data=data), quiet=True)
    return TrainedRun(run, run.initial_state())


def test_span_corruption_fills_spans_and_prefixes_are_gone_on_with(tmp_path: pathlib.Path) -> None:
    text = "the quick <extra_id_0> sees the"
    with tiny_runs.quick_compilation():
        run = _untrained(tmp_path, SpanCorruption())
        whole, fillings = run.fill_text(text, 2)
        assert whole.startswith("the quick")
        long = dataclasses.replace(run.assembly.config, sample=("the quick " * 9 + "<extra_id_0>",))
        with pytest.raises(UserError, match=r"sample has the prompt .* tokens; accepted: up to 24, as in training"):
            check_samples(dataclasses.replace(run.assembly, config=long))
        assert whole.endswith(" sees the")
        assert [(one.mark, len(one.pieces)) for one in fillings] == [("<extra_id_0>", 2)]
        assert run.assembly.objective.rooms(run.assembly.spec.length).targets == run.writer.max_new_tokens
        mixed = _untrained(tmp_path, MixtureOfDenoisers(denoisers=(Denoiser(),)))
        assert mixed.fill_text("<extra_id_0> sees", 1)[1][0].mark == "<extra_id_0>"
        prefix = _untrained(tmp_path, PrefixLM())
        settings = prefix.writer.settings(None, 4)
        assert len(prefix.continue_text(["the quick"], settings)[0][0].tokens) <= 4
    with pytest.raises(UserError, match=r"has \d+ tokens; accepted: up to 23, as in training"):
        prefix.continue_text(["the quick " * 11], settings)
    with pytest.raises(UserError, match="does not teach a model to fill masks"):
        prefix.fill_text(text)
    decoder = DecoderConfig(layers=1, width=16, heads=2, max_length=24)
    joined = _untrained(tmp_path, PrefixLM(rendering="decoder"), model=decoder)
    with pytest.raises(UserError, match=r"prefix_lm with objective.rendering=decoder, whose model reads its inputs"):
        joined.continue_text(["the quick"], settings)
