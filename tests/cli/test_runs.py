"""The commands on real, tiny runs: train, eval, generate, fill and resume, in process."""

from __future__ import annotations

import ast
import json
import pathlib
import random

import pytest
import yaml

from lmobj.cli import main
from lmobj.train.tracking import read_metrics

Captured = pytest.CaptureFixture[str]

_CONFIG = """
data:
  source: {name: text, files: [words.txt], documents: blocks}
  tokenizer: {vocab_size: 360}
  length: 16
  cache: cache
train:
  steps: 4
  batch_size: 4
  mesh: {data: 1}
  log_every: 2
  evaluate_every: 2
  checkpoint_every: 2
"""
_CAUSAL = (
    "model: {name: gru, width: 8, layers: 1}\nobjective: {name: causal_lm}\nsample: [the quick]\nrun: causal\n"
    + _CONFIG
)
_MASKED = (
    "model: {name: encoder, layers: 1, width: 8, heads: 2, mlp_width: 16, max_length: 16}\n"
    "objective: {name: masked_lm}\nsample: ['the [MASK] fox']\nrun: masked\n" + _CONFIG
)

_INFILLING = _CAUSAL.replace("{name: causal_lm}", "{name: fill_in_middle, max_documents: 1}")
_INFILLING = _INFILLING.replace("360}", "360, infilling_marks: true}").replace("run: causal", "run: infilling")
_INFILLING = _INFILLING.replace("[the quick]", "[the quick, 'the <fim_middle> fox', a lazy]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder in which both runs were trained by `lmobj train`."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "birds", "sing", "loudly"]
    draw = random.Random(0)
    (folder / "words.txt").write_text("\n\n".join(" ".join(draw.choices(words, k=30)) + "." for _ in range(80)))
    (folder / "causal.yaml").write_text(_CAUSAL)
    (folder / "masked.yaml").write_text(_MASKED)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "causal.yaml", "--quiet"]) == 0
        assert main(["train", "masked.yaml", "--quiet"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _inside(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def refusal(capsys: Captured, *argv: str) -> str:
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("lmobj: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("run", ["causal", "masked"])
def test_train_leaves_a_whole_run_folder(run: str) -> None:
    folder = pathlib.Path(run)
    assert {path.name for path in folder.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "checkpoints", "tensorboard", "environment.json", "samples.json", "report.html",
    }  # fmt: skip
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 4
    assert json.loads((folder / "environment.json").read_text())["devices"] == "8 x cpu (cpu)"
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if "train/loss" in line]
    assert steps == [2, 4]
    page = (folder / "report.html").read_text()
    prompt = {"causal": "the quick", "masked": "the [MASK] fox"}[run]
    assert f"<mark>{prompt}</mark>" in page
    assert "unigram" in page


def test_eval_prints_what_training_measured_last(capsys: Captured) -> None:
    assert main(["eval", "causal", "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    logged = read_metrics("causal/metrics.jsonl")[-1]
    assert metrics == {name.removeprefix("eval/"): value for name, value in logged.items() if name.startswith("eval/")}


def test_eval_of_another_split_differs_and_prints_a_table(capsys: Captured) -> None:
    tables = []
    for split in ("validation", "test"):
        assert main(["eval", "causal", "--split", split]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == f"metric\t{split}"
        tables.append(dict(line.split("\t") for line in lines[1:]))
    assert tables[0].keys() == tables[1].keys() >= {"loss", "perplexity", "bits_per_byte"}
    assert tables[0]["loss"] != tables[1]["loss"]


def test_whose_weights_they_are_is_told_apart_from_what_is_printed(capsys: Captured) -> None:
    for kind in ("causal", "masked"):
        arguments = [f"run={kind}_averaged", "train.ema.decay=0.5", "train.steps=1", "--quiet"]
        assert main(["train", f"{kind}.yaml", *arguments]) == 0
    uses = {
        "averaged": [
            ["eval", "causal_averaged"],
            ["generate", "causal_averaged", "--prompt", "the", "--tokens", "2"],
            ["fill", "masked_averaged", "the [MASK] fox"],
        ],
        "": [["eval", "causal_averaged", "--json"], ["fill", "masked", "the [MASK] fox"]],
    }
    for averaged, commands in uses.items():
        for command in commands:
            assert main(command) == 0
            out, err = capsys.readouterr()
            assert ("the moving average of the weights (train.ema, decay 0.5)" in err) == bool(averaged), command
            assert "moving average" not in out


def test_eval_refuses_a_config_that_the_run_was_not_made_with(capsys: Captured) -> None:
    assert "model.width is 16" in refusal(capsys, "eval", "causal", "model.width=16")


def test_eval_answers_a_task_and_keeps_what_was_found(capsys: Captured) -> None:
    pathlib.Path("dev.tsv").write_text("text\tlabel\nthe quick\tf\na lazy\td\nbirds sing\tf\n")
    pathlib.Path("words.yaml").write_text(
        "source: {name: tsv, files: [dev.tsv], label: label}\ntemplate: '{text} {answer}.'\nanswers: {f: fox, d: dog}\n"
    )
    assert main(["eval", "causal", "--task", "words.yaml"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["words", "this model", "commonest answer"]
    found = json.loads(pathlib.Path("causal/eval/tasks/words.json").read_text())
    table = {line[0]: line[1:] for line in lines if len(line) == 3}
    assert table["accuracy"] == [f"{found['accuracy']:.4f}", f"{2 / 3:.4f}"]
    assert table["Matthews"] == [f"{found['matthews']:.4f}", "0.0000"]
    assert [line[0] for line in lines if len(line) == 5] == ["class", "f", "d"]
    answers = [json.loads(line) for line in pathlib.Path("causal/eval/tasks/words.jsonl").read_text().splitlines()]
    assert [answer["label"] for answer in answers] == ["f", "d", "f"]
    assert main(["eval", "causal", "--task", "words.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found
    assert "--split is test" in refusal(capsys, "eval", "causal", "--task", "words.yaml", "--split", "test")
    assert "objective of this run is masked_lm" in refusal(capsys, "eval", "masked", "--task", "words.yaml")
    assert "none.yaml does not exist" in refusal(capsys, "eval", "causal", "--task", "none.yaml")


def _generate(capsys: Captured, *options: str) -> str:
    assert main(["generate", "causal", "--prompt", "the quick", "--tokens", "5", *options]) == 0
    return capsys.readouterr().out


def test_generate_continues_the_prompt_and_the_seed_decides(capsys: Captured) -> None:
    text = _generate(capsys)
    assert text.startswith("the quick")
    assert text == _generate(capsys, "--seed", "0")
    assert text != _generate(capsys, "--seed", "1")
    assert _generate(capsys, "--temperature", "0") == _generate(capsys, "--top-k", "1", "--seed", "5")
    assert _generate(capsys, "--temperature", "0") == _generate(capsys, "--beam", "1")


def test_generate_prints_log_probabilities_and_a_summary_on_request(capsys: Captured) -> None:
    out = _generate(capsys, "--samples", "2", "--logprobs", "--summary")
    texts = out.split("the quick")[1:]
    assert len(texts) == 2
    for text in texts:
        lines = text[text.index("ln p  token") :].splitlines()[1:]
        end = next(i for i, line in enumerate(lines) if line.endswith("together"))
        values = [float(line.split()[0]) for line in lines[:end]]
        assert 1 <= len(values) <= 5
        assert all(value < 0 for value in values)
        assert float(lines[end].split()[0]) == pytest.approx(sum(values), abs=0.003)  # each is rounded to 0.0005
    assert "distinct pairs / pairs" in out
    assert "distinct" not in _generate(capsys)


def test_fill_shows_the_likeliest_guesses_of_each_mask(capsys: Captured) -> None:
    assert main(["fill", "masked", "the [MASK] fox [MASK] over", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "[MASK]" not in lines[0]
    assert lines.count("mask 1") == lines.count("mask 2") == 1
    for mask in ("mask 1", "mask 2"):
        start = lines.index(mask) + 1
        shares = [float(line.split("%")[0]) for line in lines[start : start + 3]]
        assert shares == sorted(shares, reverse=True)
        assert shares[0] > 0


def test_fill_writes_into_a_hole(capsys: Captured, folder: pathlib.Path) -> None:
    (folder / "infilling.yaml").write_text(_INFILLING)
    assert main(["train", "infilling.yaml", "--quiet"]) == 0
    first, infilled, last = json.loads((folder / "infilling" / "samples.json").read_text())
    assert (first["text"][:9], last["text"][:6]) == ("the quick", "a lazy")
    assert "fim" not in infilled["text"]
    assert (infilled["text"][:3], infilled["text"][-4:]) == ("the", " fox")
    two = refusal(capsys, "train", "infilling.yaml", "run=two", "sample=['<fim_middle> a <fim_middle>']")
    assert "sample has the prompt" in two
    assert "has 2 holes" in two
    assert main(["fill", "infilling", "the quick <fim_middle> over", "--tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "middle, cut after 4 tokens" in lines or "middle" in lines
    share, middle = lines[-1].split(maxsplit=1)
    assert float(share) < 0
    assert "\n".join(lines[:-3]) == f"the quick{ast.literal_eval(middle)} over"
    assert "has 0 holes" in refusal(capsys, "fill", "infilling", "the quick")
    assert "has 2 holes" in refusal(capsys, "fill", "infilling", "<fim_middle>" * 2)


_PLAIN = ["--tokens", "5", "--temperature", "0"]


def test_prompts_come_from_options_and_files(capsys: Captured, tmp_path: pathlib.Path) -> None:
    (tmp_path / "queries.txt").write_text("a lazy dog\n\nbirds sing\r\n")
    (tmp_path / "queries.jsonl").write_text('{"input": "a lazy dog"}\n"birds sing"\n')
    (tmp_path / "queries.tsv").write_text("a lazy dog\tno matter\nbirds sing\n")
    outs = []
    for name in ("queries.txt", "queries.jsonl", "queries.tsv"):
        assert main(["generate", "causal", "--prompt", "the", "--prompts", str(tmp_path / name), *_PLAIN]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0].startswith("the")
    assert "\na lazy dog" in outs[0]
    assert "\nbirds sing" in outs[0]
    assert len(set(outs)) == 1


def test_examples_are_shown_before_each_prompt(capsys: Captured, tmp_path: pathlib.Path) -> None:
    """The same words as one prompt give the same answer; what is printed is the query and the answer alone."""
    (tmp_path / "shots.tsv").write_text('the quick\tbrown\nthe\t"lazy\n')
    (tmp_path / "shots.jsonl").write_text(
        '{"input": "the quick", "output": "brown"}\n{"input": "the", "output": "\\"lazy"}\n'
    )
    asked = ["--instruction", r"next\tword", "--template", r"{input}: {output}", "--separator", r"\n\n"]
    whole = 'next\tword\n\nthe quick: brown\n\nthe: "lazy\n\nover a:'
    assert main(["generate", "causal", "--prompt", whole, *_PLAIN]) == 0
    written = capsys.readouterr().out.removeprefix(whole).removesuffix("\n")
    for name in ("shots.tsv", "shots.jsonl"):
        assert (
            main(["generate", "causal", "--examples", str(tmp_path / name), *asked, "--prompt", "over a", *_PLAIN]) == 0
        )
        assert capsys.readouterr().out == "over a:" + written.split("\n\n")[0] + "\n"


def test_a_model_of_completions_writes_the_second_text(capsys: Captured, tmp_path: pathlib.Path) -> None:
    """Trained on A eos B eos, it reads the prompt as A with its end; another end would be another text."""
    lines = [json.dumps({"q": f"what is {i} and {i}", "a": f"that is {2 * i}"}) for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    changes = [
        "objective.loss_on=completion",
        f"data.source={{name: jsonl, files: [{tmp_path / 'pairs.jsonl'}], text: q, pair: a}}",
        "data.tokenizer.vocab_size=300",
        "data.length=32",
        f"run={tmp_path / 'pairs'}",
    ]
    assert main(["train", "causal.yaml", *changes, "--quiet"]) == 0
    page = (tmp_path / "pairs" / "report.html").read_text()
    assert "unigram" not in page  # which would not know the first text
    assert main(["generate", str(tmp_path / "pairs"), "--prompt", "what is 7 and 7", *_PLAIN]) == 0
    assert capsys.readouterr().out.startswith("what is 7 and 7\n")
    single = f"data.source={{name: jsonl, files: [{tmp_path / 'pairs.jsonl'}], text: q}}"
    message = refusal(capsys, "train", "causal.yaml", *changes[:1], single, *changes[2:4], f"run={tmp_path / 'single'}")
    assert "data.source.pair: COLUMN" in message


def test_bad_files_of_examples_are_named(capsys: Captured, tmp_path: pathlib.Path) -> None:
    files = {
        "columns.tsv": (b"a\tb\n\na\tb\tc\n", ["columns.tsv:3 has 3 columns", ".jsonl"]),
        "broken.jsonl": (b'{"input": "a", "output": "b"}\n{"input"\n', ["broken.jsonl:2 is not JSON"]),
        "number.jsonl": (b'{"input": "a", "output": 3}\n', ["number.jsonl:1 has no text 'output'"]),
        "half.jsonl": (b'{"input": "a", "output": "\\ud800"}\n', ["half.jsonl:1", "surrogate"]),
        "latin.tsv": (b"caf\xe9\tb\n", ["latin.tsv is not UTF-8 text at byte 3"]),
        "empty.tsv": (b"\n", ["empty.tsv holds no example"]),
        "stop.jsonl": (b'{"input": "a", "output": "b\\nc"}\n', [r"has '\n' in it", "another separator"]),
        "gone.tsv": (None, ["gone.tsv cannot be read", "No such file"]),
    }
    for name, (content, parts) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        message = refusal(capsys, "generate", "causal", "--prompt", "a", "--examples", str(tmp_path / name))
        assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["generate", "causal"], ["there is no prompt", "--prompts FILE"]),
        (["generate", "causal", "--prompt", "a", "--shots", "2"], ["--shots is 2", "--examples FILE"]),
        (["generate", "causal", "--prompt", "a", "--template", "{input}"], ["'{input}'", "{output} once after it"]),
        (["generate", "causal", "--prompt", "a", "--separator", ""], ["the separator is empty"]),
        (["generate", "causal", "--prompt", ""], ["the prompt is empty"]),
        (["generate", "causal", "--prompt", "a", "--top-p", "2"], ["top_p is 2.0", "at most 1"]),
        (["generate", "causal", "--prompt", "a", "--beam", "2", "--seed", "1"], ["--seed is 1", "--beam"]),
        (["generate", "causal", "--prompt", "a", "--length-penalty", "1"], ["--length-penalty is 1.0", "with --beam"]),
        (["generate", "masked", "--prompt", "a"], ["Encoder", "causal models"]),
        (["fill", "causal", "a [MASK]"], ["objective of this run is causal_lm", "fill masks", "fill_in_middle"]),
        (["fill", "masked", "no mask"], ["has no [MASK]"]),
        (["fill", "masked", "a [MASK]", "--top", "0"], ["k is 0"]),
        (["train", "causal.yaml"], ["'causal', which already exists", "lmobj resume causal"]),
        (["resume", "causal", "train.steps=5"], ["train.steps is 5", "4"]),
    ],
)
def test_what_cannot_be_done_is_told_in_one_paragraph(capsys: Captured, argv: list[str], parts: list[str]) -> None:
    message = refusal(capsys, *argv)
    for part in parts:
        assert part in message


def test_resume_of_a_finished_run_changes_no_metric(capsys: Captured) -> None:
    before = read_metrics("causal/metrics.jsonl")
    assert main(["resume", "causal", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    assert read_metrics("causal/metrics.jsonl") == before


def test_a_run_without_a_checkpoint_cannot_be_evaluated(capsys: Captured, tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.yaml").write_text(_CAUSAL)
    assert "has no checkpoint yet" in refusal(capsys, "eval", str(tmp_path))
