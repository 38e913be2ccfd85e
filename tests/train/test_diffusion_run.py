"""A run of masked diffusion: it writes by unmasking, fills masks, and bounds the likelihood of held-out text."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs

from lmobj.cli import main
from lmobj.data import JsonLines, SentencePieceConfig
from lmobj.errors import UserError
from lmobj.evaluate import FewShot, FilledMasks, SamplingConfig, Shot, UnmaskingConfig, _text
from lmobj.objectives import MaskedDiffusion
from lmobj.train import FitResult, fit, summary
from lmobj.train.diffusion import _texts, held_out_bound
from lmobj.train.trained import TrainedRun, open_run

pytestmark = pytest.mark.usefixtures("quick_compilation")

SAMPLES = ("the quick", "the quick [MASK] sees", "the old fox sees")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A finished run, opened again."""
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    settings = {"objective": MaskedDiffusion(), "sample": SAMPLES, "train": {"steps": 4}}
    config = tiny_runs.experiment(corpus, folder, **settings)  # type: ignore[arg-type]
    with tiny_runs.quick_compilation():
        fit(config, quiet=True)
        return open_run(config, quiet=True)


def folder(trained: TrainedRun) -> pathlib.Path:
    return pathlib.Path(trained.assembly.config.run_dir)


def printed(capsys: Captured, *argv: str) -> str:
    assert main(argv) == 0
    return capsys.readouterr().out


def refused(capsys: Captured, *argv: str) -> str:
    assert main(argv) == 2
    return capsys.readouterr().err


# --- writing ------------------------------------------------------------------------------------------------------


def test_prompts_are_continued_and_those_with_masks_filled(trained: TrainedRun) -> None:
    samples = json.loads((folder(trained) / "samples.json").read_text())
    assert [one["prompt"] for one in samples] == list(SAMPLES)
    texts = [one["text"] for one in samples]
    assert texts[0].startswith(SAMPLES[0])
    assert texts[2].startswith(SAMPLES[2])
    assert len(texts[0]) > len(SAMPLES[0])
    assert texts[1].startswith("the quick")
    assert texts[1].endswith(" sees")
    assert not any("[MASK]" in text for text in texts)


def test_prompts_without_room_are_refused_before_training(trained: TrainedRun) -> None:
    """Rows of 16 tokens, though the model has room for 32."""
    for count in (15, 16):
        prompt = " ".join(["the"] * count)
        assert len(trained.tokenizer.encode(prompt)) == count
        config = dataclasses.replace(trained.assembly.config, sample=(prompt,))
        run = dataclasses.replace(trained.assembly, config=config)
        if count < 16:
            summary.check_samples(run)
            continue
        with pytest.raises(UserError, match=r"data\.length is 16, and with a new token it has 17"):
            summary.check_samples(run)


def test_generate_unmasks(trained: TrainedRun, capsys: Captured) -> None:
    argv = ["generate", str(folder(trained)), "--prompt", "the quick", "--tokens", "6"]
    text = printed(capsys, *argv)
    assert text.startswith("the quick")
    assert text == printed(capsys, *argv, "--seed", "0")
    assert text != printed(capsys, *argv, "--seed", "1")
    assert printed(capsys, *argv, "--steps", "2", "--order", "random", "--block", "3", "--samples", "2", "--logprobs")
    one = UnmaskingConfig(max_new_tokens=6, steps=2, block_length=3, order="random", num_samples=2)
    found = trained.continue_text(["the quick"], one)[0]
    assert len(found) == 2
    assert all(len(each.tokens) <= 6 for each in found)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--beam", "2"], ["--beam is 2", "unmasking", "accepted: a search with --beam"]),
        (["--top-k", "2"], ["--top-k is 2", "unmasking", "accepted: drawing without --beam"]),
        (["--steps", "7"], ["steps is 7", "1 to 6"]),
        (["--block", "4"], ["block_length is 4", "divide the 6"]),
        (["--order", "left"], ["order is 'left'", "confidence, random"]),
        (["--tokens", "40"], ["model.max_length is 32"]),
    ],
)
def test_options_that_unmasking_has_not(
    trained: TrainedRun, capsys: Captured, options: list[str], parts: list[str]
) -> None:
    message = refused(capsys, "generate", str(folder(trained)), "--prompt", "the", "--tokens", "6", *options)
    assert message.count("\n") == 1
    assert all(part in message for part in parts), message


def test_models_write_in_the_way_that_they_learned(
    trained: TrainedRun, causal: FitResult, masked: FitResult, capsys: Captured
) -> None:
    with pytest.raises(UserError, match=r"SamplingConfig, and the objective of this run is masked_diffusion, .*Unmask"):
        trained.continue_text(["the"], SamplingConfig())
    for result, name in ((causal, "causal_lm"), (masked, "masked_lm")):
        run = TrainedRun(result.assembly, result.state)
        with pytest.raises(UserError, match=f"UnmaskingConfig, and the objective of this run is {name}, .*Sampling"):
            run.continue_text(["the"], UnmaskingConfig())
    argv = ["generate", str(causal.run_dir), "--prompt", "the"]
    assert "--steps is 3, which is no setting of drawing" in refused(capsys, *argv, "--steps", "3")
    assert "--block is 3, which is no setting of a search" in refused(capsys, *argv, "--block", "3", "--beam", "2")


def test_queries_are_answered_after_as_many_examples_as_fit(trained: TrainedRun) -> None:
    """Prompt and answer together have up to 32 tokens; the last one is read, too."""
    task, settings = FewShot(), UnmaskingConfig(max_new_tokens=6, steps=2)
    shots = [Shot("the quick", "fox")] * 20
    answers = trained.answer(task, shots, ["the old"], settings)
    assert answers.asked == [20]
    count, (shown,) = trained.tokenizer.encode, answers.shown
    assert 0 < shown < 20
    fits, more = (len(count(task.prompt(shots[:n], "the old"))) for n in (shown, shown + 1))
    assert fits + 6 <= 32 < more + 6


def test_fill_reads_the_text_by_itself(trained: TrainedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in training, where there is neither [CLS] nor [SEP]."""
    read: list[Any] = []

    def fill(graph: Any, state: Any, tokens: Any, where: Any, k: int) -> Any:
        read.extend(np.array(tokens).tolist())
        return FilledMasks(np.zeros((1, 1, k), int), np.zeros((1, 1, k)))

    monkeypatch.setattr(_text, "_fill", fill)
    trained.fill_text("the [MASK]", k=1)
    assert read == [[*trained.tokenizer.encode("the").tolist(), trained.tokenizer.vocabulary.mask]]


# --- the bound ----------------------------------------------------------------------------------------------------


def test_a_model_that_knows_nothing_costs_log_v(trained: TrainedRun) -> None:
    """All of 320 tokens but [MASK] are as probable: n / k times k log 319 for every copy, with no chance in it."""
    state = trained.state._replace(params=jax.tree.map(jnp.zeros_like, trained.state.params))
    found = held_out_bound(dataclasses.replace(trained, state=state), "validation", samples=2, quiet=True)
    documents = list(trained.assembly.dataset.documents("validation"))
    tokens = sum(len(document) + 1 for document in documents)  # with the end of each
    num_bytes = sum(len(trained.tokenizer.decode(document).encode()) for document in documents)
    assert (found["tokens"], found["samples"]) == (tokens, 2)
    assert found["documents"] >= len(documents), "rows cut some"
    assert found["nll"] == pytest.approx(math.log(319), rel=1e-6)
    assert found["nll_error"] == pytest.approx(0, abs=1e-6)
    assert found["perplexity"] == pytest.approx(319, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(math.log2(319) * tokens / num_bytes, rel=1e-6)


def test_eval_prints_the_bound(trained: TrainedRun, causal: FitResult, capsys: Captured) -> None:
    argv = ["eval", str(folder(trained)), "--bound", "4"]
    found = json.loads(printed(capsys, *argv, "--json"))
    assert found == held_out_bound(trained, "validation", samples=4, quiet=True)
    assert found["samples"] == 4
    # After four steps nearly all is still as probable as before.
    assert abs(found["nll"] - math.log(319)) < 0.5
    table = dict(line.split("\t") for line in printed(capsys, *argv, "--split", "test").splitlines()[1:])
    assert table.keys() == found.keys()
    assert table["nll"] != f"{found['nll']:.6g}"
    assert "samples is 1; accepted: 2 to" in refused(capsys, "eval", str(folder(trained)), "--bound", "1")
    message = refused(capsys, "eval", str(causal.run_dir), "--bound", "4")
    assert "the objective of this run is causal_lm, whose" in message
    assert "--bound is 4, and --generation is given too" in refused(capsys, *argv, "--generation")


def test_a_run_of_completions_writes_and_bounds_second_texts(tmp_path: pathlib.Path) -> None:
    lines = [json.dumps({"q": f"what is {i} and {i}", "a": f"that is {2 * i}"}) for i in range(60)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    source = JsonLines(files=(str(tmp_path / "pairs.jsonl"),), text="q", pair="a")
    config = tiny_runs.experiment(
        tmp_path / "pairs.jsonl",
        tmp_path / "run",
        data={"source": source, "tokenizer": SentencePieceConfig(vocab_size=300), "length": 32},
        objective=MaskedDiffusion(loss_on="completion"),
        sample=("what is 7 and 7",),
        train={"steps": 4},
    )
    fit(config, quiet=True)
    (sample,) = json.loads((tmp_path / "run" / "samples.json").read_text())
    assert sample["text"].startswith("what is 7 and 7\n")
    trained = open_run(config, quiet=True)
    state = trained.state._replace(params=jax.tree.map(jnp.zeros_like, trained.state.params))
    found = held_out_bound(dataclasses.replace(trained, state=state), "validation", samples=2, quiet=True)
    assert found["nll"] == pytest.approx(math.log(299), rel=1e-6)
    # "that is N" and its end, of each text.
    data, spec = trained.assembly.dataset, trained.assembly.spec
    rows = [row for batch in data.batches(spec, split="validation", batch_size=8) for row in batch["tokens"]]
    texts = [trained.tokenizer.decode(row) for row in rows if row.any()]
    answers = ["that" + text.partition("that")[2] for text in texts]
    assert found["documents"] == len(answers) > 0
    assert found["tokens"] == sum(len(trained.tokenizer.encode(answer)) + 1 for answer in answers)


def test_of_pairs_the_second_text_is_bounded() -> None:
    """Rows A A end B end padding, and B alone of three tokens."""
    batch = {
        "tokens": np.array([[7, 8, 3, 9, 3, 0], [7, 3, 9, 9, 9, 3]], np.int32),
        "segment_ids": np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]], np.int32),
        "token_types": np.array([[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]], np.int32),
    }
    run = types.SimpleNamespace(
        dataset=types.SimpleNamespace(batches=lambda spec, **_: [batch]),
        spec=types.SimpleNamespace(two_texts=True),
        config=types.SimpleNamespace(train=types.SimpleNamespace(batch_size=2)),
    )
    found = list(_texts(types.SimpleNamespace(assembly=run), "validation"))  # type: ignore[arg-type]
    assert [(text.row.tokens.tolist(), text.row.start) for text in found] == [
        ([7, 8, 3, 9, 3], 3),
        ([7, 3, 9, 9, 9, 3], 2),
    ]
    assert [text.num_bytes for text in found] == [0, 0]
