"""Generated text in the report: the figures are those of the texts that are shown, beside held-out text."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest
import test_report
import tiny_runs

from lmobj import config
from lmobj.errors import UserError
from lmobj.evaluate import BeamConfig, GenerationConfig, SamplingConfig, passages, self_bleu
from lmobj.objectives import CausalLM
from lmobj.train import FitResult, generation, report
from lmobj.train.assemble import Assembly
from lmobj.train.generation import check_generation, generation_study

EVIL = test_report._EVIL
DECODINGS = {EVIL: SamplingConfig(temperature=0.0), "beam": BeamConfig(num_beams=2), "drawn": SamplingConfig()}
ASKED = GenerationConfig(prompts=("the quick", "the old fox", EVIL[:4]), samples=2, max_tokens=6, decodings=DECODINGS)


@pytest.fixture(scope="module")
def study(causal: FitResult) -> dict[str, Any]:
    with tiny_runs.quick_compilation():
        model = causal.assembly.model(causal.state)
        found = generation_study(causal.assembly, model, ASKED, step=12)
    return json.loads(json.dumps(found))


def test_figures_are_those_of_the_texts_shown(study: dict[str, Any], causal: FitResult) -> None:
    tokenizer = causal.assembly.dataset.tokenizer
    assert [(one["name"], len(one["texts"])) for one in study["decodings"]] == [(EVIL, 3), ("beam", 3), ("drawn", 6)]
    for one in (*study["decodings"], study["reference"]):
        texts = one["texts"]
        assert all(text["text"] == tokenizer.decode(text["tokens"]) for text in texts)
        count = sum(len(text["tokens"]) for text in texts)
        total = sum(text["log_probability"] for text in texts)
        assert one["figures"]["perplexity"] == pytest.approx(np.exp(-total / count), rel=1e-5)
        assert one["figures"]["tokens"] == pytest.approx(count / len(texts))
        samples = len(texts) // 3
        # Generated texts come prompt by prompt, held-out ones set by set.
        sets = [texts[i * 3 : i * 3 + 3] if one is study["reference"] else texts[i::samples] for i in range(samples)]
        tokens = [[text["tokens"] for text in each] for each in sets]
        pairs = [[pair for text in each for pair in itertools.pairwise(text)] for each in tokens]
        expected = np.mean([len(set(each)) / len(each) for each in pairs])
        assert one["figures"]["distinct_2"] == pytest.approx(expected)
        assert one["figures"]["self_bleu"] == pytest.approx(np.mean([self_bleu(each) for each in tokens]))


def test_the_reference_is_held_out_text(study: dict[str, Any], causal: FitResult) -> None:
    texts = study["reference"]["texts"]
    assert len(texts) == 6
    held_out = [causal.assembly.dataset.tokenizer.decode(d) for d in causal.assembly.dataset.documents("validation")]
    assert all(any(text["prompt"] + text["text"] in document for document in held_out) for text in texts)


def test_there_is_no_reference_with_fewer_passages_than_prompts(
    causal: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "passages", lambda *a, **b: passages(*a, **b)[:2])
    with tiny_runs.quick_compilation():
        found = generation_study(causal.assembly, causal.assembly.model(causal.state), ASKED, step=1)
    assert found["reference"] is None
    assert len(generation.figure_rows(found)[1]) == 3


def test_the_report_shows_figures_and_texts_escaped(study: dict[str, Any], tmp_path: pathlib.Path) -> None:
    run = test_report._write(tmp_path, metrics_jsonl=test_report._metrics(), generation_json=study)
    page = test_report._page(run)
    text = " ".join(page.text.split())
    for one in (study["reference"], *study["decodings"]):
        shown = one["figures"]
        shares = " ".join(f"{shown[name]:.3f}" for name in ("distinct_1", "distinct_2", "distinct_3", "repeated_4"))
        row = f"{one['name']} {shown['perplexity']:.4g} {shares} {shown['self_bleu']:.3f} {shown['tokens']:.1f}"
        assert row in text, one["name"]
    assert text.index("held-out text ") < text.index("Details")
    for prompt in ASKED.prompts:
        assert prompt in text
    for one in study["decodings"]:
        assert " ".join(one["texts"][0]["text"].split()) in text
    assert not {"script", "img"} & set(page.tags)
    assert page.text.count("alert('x')") >= 2
    charts = (run / "report.html").read_text().count("<svg")
    assert charts == 5, "the four of every run, and this"
    assert "perplexity under the model" in text
    without = {**study, "reference": None}
    test_report._write(tmp_path, generation_json=without)
    assert "held-out text" not in " ".join(test_report._page(run).text.split()).split("Generated text")[1]


def test_training_ends_with_it_and_the_config_may_ask_anew(
    causal: FitResult, corpus: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmobj.cli import main
    from lmobj.train import fit

    asked = dataclasses.replace(ASKED, prompts=(), decodings={"drawn": SamplingConfig()})
    settings = tiny_runs.experiment(corpus, tmp_path / "run", train={"steps": 4}, generation=asked)
    with tiny_runs.quick_compilation():
        fit(settings, quiet=True)
        kept = json.loads((tmp_path / "run" / "generation.json").read_text())
        assert kept["prompts"] == ["the quick"], "those of sample"
        assert kept["decodings"][0]["figures"]["self_bleu"] is None
        assert "Generated text" in (tmp_path / "run" / "report.html").read_text()
        arguments = ["eval", str(tmp_path / "run"), "--generation"]
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split("\t")[0] for line in lines] == ["", "held-out text", "drawn"]
        assert lines[2].split("\t")[6] == "-"
        assert json.loads((tmp_path / "run" / "generation.json").read_text()) == kept
        assert main([*arguments, "generation.max_tokens=3", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["max_tokens"] == 3
        assert main([*arguments, "--task", "x.yaml"]) == 2
        assert "one of the two" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "sample", "part"),
    [
        ({"prompts": ()}, (), "generation.prompts is empty, and so is sample"),
        ({"prompts": ("",)}, (), "generation.prompts has the prompt ''"),
        ({"max_tokens": 40}, (), "generation.max_tokens is 40, .* of generation.prompts: "),
        ({"prompts": (), "max_tokens": 40}, ("the fox",), "'the fox' of sample: "),
    ],
)
def test_what_cannot_be_written_is_refused(causal: FitResult, changes: Any, sample: Any, part: str) -> None:
    run = dataclasses.replace(causal.assembly, config=dataclasses.replace(causal.assembly.config, sample=sample))
    with pytest.raises(UserError, match=part):
        check_generation(run, dataclasses.replace(ASKED, **changes))


def test_models_that_write_nothing_are_refused(masked: FitResult, causal: FitResult) -> None:
    with pytest.raises(UserError, match="objective masked_lm with the model encoder trains none that writes text"):
        check_generation(masked.assembly, ASKED)
    check_generation(causal.assembly, ASKED)
    assert isinstance(causal.assembly, Assembly)
    assert causal.assembly.objective == CausalLM()


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("generation.sample=2", "unknown key generation.sample"),
        ("generation.samples=0", "generation.samples is 0"),
        ("generation.decodings={x: {name: greedy}}", "generation.decodings.x.name is"),
        ("generation.decodings={x: {name: sampling, top_p: 2.0}}", "generation.decodings.x: top_p is 2.0"),
        ("generation.decodings={x: {temperature: 2.0}}", "generation.decodings.x.name is missing"),
    ],
)
def test_configs_are_refused_by_key(tmp_path: pathlib.Path, override: str, part: str) -> None:
    (tmp_path / "c.yaml").write_text("model: {name: gru}\nobjective: {name: causal_lm}\n")
    with pytest.raises(UserError) as error:
        config.load(tmp_path / "c.yaml", [override])
    assert part in str(error.value)


def test_a_report_needs_no_generation(tmp_path: pathlib.Path) -> None:
    run = test_report._write(tmp_path, metrics_jsonl=test_report._metrics())
    assert "Generated text" not in report.write_report(run).read_text()
