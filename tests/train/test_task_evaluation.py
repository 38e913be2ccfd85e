"""Tasks answered by likelihood: a model that knows the answers gives them, and what cannot be asked is refused."""

from __future__ import annotations

import json
import pathlib
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj.config import load_task
from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, GRUConfig, OutputHead
from lmobj.objectives import CausalLM, Classification, MaskedDiffusion, MaskedLM
from lmobj.train import FitResult
from lmobj.train.run_folder import RunFolder
from lmobj.train.task_evaluation import evaluate_task
from lmobj.train.trained import TrainedRun

_ANSWERS = "answers: {f: fox, r: river}\n"
_TASK = "source: {name: tsv, files: [FOLDER/dev.tsv], label: label}\ntemplate: '{text} {answer}'\n" + _ANSWERS
_SHOTS = "shots: SHOTS\nshots_source: {name: tsv, files: [FOLDER/train.tsv], label: label}\n"
_DEV = "text\tlabel\nthe quick\tf\nthe quiet\tr\nthe fox sees the quick\tf\nthe river sees the quick\tr\n"


class Bigram(nnx.Module):
    """ln p(next | last) from a table."""

    def __init__(self, probabilities: np.ndarray, max_length: int | None):
        self.table = nnx.Param(np.log(probabilities).astype(np.float32))
        self.config = GRUConfig() if max_length is None else DecoderConfig(max_length=max_length)

    def hidden(self, tokens: Any, **_: Any) -> Any:
        assert tokens.shape[1] <= getattr(self.config, "max_length", np.inf)
        return self.table[...][tokens]

    def head_hidden(self, hidden: Any) -> Any:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(np.eye(len(self.table), dtype=np.float32))


class LeftNeighbour(Bigram):
    """The same of the token to the left, at the place of the [MASK] itself."""

    def hidden(self, tokens: Any, **given: Any) -> Any:
        assert not given["mask"].causal
        return super().hidden(jnp.roll(tokens, 1, axis=1))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SentencePieceConfig(vocab_size=330), ["the quick brown fox sees the quiet river\n" * 4])


Run = Callable[..., Any]


@pytest.fixture
def run(tokenizer: Tokenizer) -> Run:
    """A run whose model goes on from "quick" to " fox" (0.75) or " river" (0.25), and from "quiet" the other way."""
    ids = {word: int(tokenizer.encode(f" {word}")[-1]) for word in ("quick", "quiet", "fox", "river")}
    assert all(len(tokenizer.encode(f" {word}")) == 1 for word in ids)
    size = tokenizer.vocabulary.size
    p = np.full((size, size), 1 / size)
    for word, chances in (("quick", (0.75, 0.25)), ("quiet", (0.25, 0.75))):
        p[ids[word]] = 1e-9
        p[ids[word], [ids["fox"], ids["river"]]] = chances

    def make(max_length: int | None = None, suffix: tuple[int, ...] = (), objective: Any = None) -> Any:
        return types.SimpleNamespace(
            assembly=types.SimpleNamespace(
                objective=objective or CausalLM(), spec=types.SimpleNamespace(suffix=suffix), program=None
            ),
            state=types.SimpleNamespace(step=7),
            model=(LeftNeighbour if isinstance(objective, MaskedDiffusion) else Bigram)(p, max_length),
            tokenizer=tokenizer,
            writes_second_texts=bool(suffix),
            unmasks=isinstance(objective, MaskedDiffusion),
        )

    return make


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Callable[[str], pathlib.Path]:
    (tmp_path / "dev.tsv").write_text(_DEV)
    (tmp_path / "train.tsv").write_text("text\tlabel\nthe brown fox\tf\nthe river\tr\nsees\tf\n")

    def to_file(text: str) -> pathlib.Path:
        path = tmp_path / "animals.yaml"
        path.write_text(text.replace("FOLDER", str(tmp_path)))
        return path

    return to_file


def test_a_model_that_knows_a_bigram_answers_by_it(run: Run, write: Any, tmp_path: pathlib.Path) -> None:
    found = evaluate_task(run(), load_task(write(_TASK)), quiet=True)
    assert [answer["prediction"] for answer in found.answers] == ["f", "r", "f", "f"]
    for answer, (fox, river) in zip(
        found.answers, [(0.75, 0.25), (0.25, 0.75), (0.75, 0.25), (0.75, 0.25)], strict=True
    ):
        assert answer["log_likelihoods"] == pytest.approx({"f": np.log(fox), "r": np.log(river)}, abs=1e-6)
        assert answer["scores"] == answer["log_likelihoods"]
    # Three of four are right. F1: of f 2 * 2 / (2 + 3), of r 2 * 1 / (2 + 1). Always f: accuracy 1/2, F1 (2/3 + 0) / 2.
    # Matthews: TP 2, TN 1, FP 1, FN 0: (2 * 1 - 1 * 0) / sqrt(3 * 2 * 2 * 1).
    figures = found.figures
    assert (figures["task"], figures["examples"], figures["step"], figures["cut"]) == ("animals", 4, 7, 0)
    assert (figures["accuracy"], figures["majority"]) == (0.75, 0.5)
    assert figures["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert figures["majority_macro_f1"] == pytest.approx(1 / 3)
    assert figures["matthews"] == pytest.approx(2 / np.sqrt(12))
    assert figures["confusion"] == [[2, 0], [1, 1]]
    found.write(RunFolder(tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "eval" / "tasks" / "animals.json").read_text()) == figures
    lines = (tmp_path / "run" / "eval" / "tasks" / "animals.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.answers
    assert found.answers[1]["text"] == "the quiet"
    assert found.answers[1]["label"] == "r"


def test_a_model_of_masked_diffusion_answers_by_its_bound(run: Run, write: Any) -> None:
    """Of one token it is what the model says; of "river fox" either may come first: the second with river hidden, too,
    is anybody's guess, and so it is after river."""
    made = run(objective=MaskedDiffusion())
    found = evaluate_task(made, load_task(write(_TASK)), quiet=True)
    assert [answer["prediction"] for answer in found.answers] == ["f", "r", "f", "f"]
    assert found.answers[0]["log_likelihoods"] == pytest.approx({"f": np.log(0.75), "r": np.log(0.25)}, abs=1e-6)
    assert found.figures["samples"] == 128
    size = made.tokenizer.vocabulary.size - 1  # without [MASK]
    task = _TASK.replace("river}", "river fox}") + "samples: 200\n"
    found = evaluate_task(made, load_task(write(task)), quiet=True)
    # Half of the copies hide one of the two, at twice its loss: 2 log 4 or 2 log size, 4.4 from their mean.
    error = (np.log(size) - np.log(4)) / np.sqrt(100) / 2
    expected = np.log(0.25) - np.log(size)
    assert found.answers[0]["log_likelihoods"]["r"] == pytest.approx(expected, abs=4 * error)
    assert found.figures["samples"] == 200
    # A row has room for 2 tokens, the last of which is read, too: one of the question and the answer.
    short = evaluate_task(run(2, objective=MaskedDiffusion()), load_task(write(_TASK)), quiet=True)
    assert short.figures["cut"] == 4
    assert [answer["prediction"] for answer in short.answers] == ["f", "r", "f", "f"]
    with pytest.raises(UserError, match="samples is 200, and the model of this run is causal"):
        evaluate_task(run(), load_task(write(task)), quiet=True)
    with pytest.raises(UserError, match="samples is 1; accepted: at least 2"):
        load_task(write(_TASK + "samples: 1\n"))


def test_normalisations_divide_by_what_they_say(run: Run, write: Any) -> None:
    """The second answer has two tokens after "quick", the last of which has 1 in 330."""
    size = run().tokenizer.vocabulary.size
    task = _TASK.replace("river}", "river fox}").replace("{text} ", "see {text} ")
    log_p = np.array([np.log(0.75), np.log(0.25) - np.log(size)])
    expected = {
        "sum": log_p,
        "tokens": log_p / [1, 2],
        "bytes": log_p / [len(" fox"), len(" river fox")],
        "prior": log_p - [-np.log(size), -2 * np.log(size)],  # after "see" all tokens are as probable
    }
    for normalise, (fox, river) in expected.items():
        found = evaluate_task(run(), load_task(write(task + f"normalise: {normalise}\n")), quiet=True)
        assert found.answers[0]["scores"] == pytest.approx({"f": fox, "r": river}, rel=1e-5), normalise
        assert found.answers[0]["log_likelihoods"]["f"] == pytest.approx(np.log(0.75), rel=1e-5)


def test_choices_of_their_own(run: Run, write: Any, tmp_path: pathlib.Path) -> None:
    rows = [
        {"context": "the quick", "choices": ["river", "fox"], "label": 1},
        {"context": "the quiet", "choices": ["fox", "sees", "river", "fox fox"], "label": 2},
        {"context": "the quiet", "choices": ["river", "fox"], "label": 1},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = "source: {name: choices, files: [FOLDER/c.jsonl]}\ntemplate: '{text} {answer}'\n"
    shots = "shots: 1\nshots_source: {name: choices, files: [FOLDER/c.jsonl]}\n"
    for text in (task, task + shots):
        found = evaluate_task(run(), load_task(write(text)), quiet=True)
        assert [answer["prediction"] for answer in found.answers] == ["1", "2", "0"]
        figures = found.figures
        assert figures["accuracy"] == pytest.approx(2 / 3)
        assert figures["majority"] == pytest.approx(2 / 3), "two of three have the second choice"
        assert figures["chance"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 3)
        assert found.report is None


def test_shots_that_do_not_fit_are_left_out_and_then_the_beginning(run: Run, write: Any) -> None:
    task = _TASK + _SHOTS.replace("SHOTS", "3")
    whole = evaluate_task(run(), load_task(write(task)), quiet=True)
    assert (whole.figures["shots"], whole.figures["shots_shown"], whole.figures["cut"]) == (3, 3, 0)
    some = evaluate_task(run(14), load_task(write(task)), quiet=True)
    assert 0 < some.figures["shots_shown"] < 3
    assert some.figures["cut"] == 0
    none = evaluate_task(run(1), load_task(write(task)), quiet=True)
    assert (none.figures["shots_shown"], none.figures["cut"]) == (0, 4)
    for found in (some, none):  # the last word decides, which is there in any case
        assert [answer["prediction"] for answer in found.answers] == ["f", "r", "f", "f"]
    with pytest.raises(UserError, match="an answer to which takes 3 tokens, and a row has room for 2"):
        evaluate_task(run(1), load_task(write(task.replace("river}", "river fox fox}"))), quiet=True)


def test_answers_are_second_texts_where_the_model_learned_pairs(run: Run, write: Any) -> None:
    """After the token that ends the first text all are as probable, the answer's own end included."""
    made = run(suffix=(3,))
    found = evaluate_task(made, load_task(write(_TASK)), quiet=True)
    count = len(made.tokenizer.encode("fox")) + 1
    assert found.answers[0]["log_likelihoods"]["f"] == pytest.approx(-count * np.log(made.tokenizer.size), rel=1e-5)


def test_a_limit_draws_questions_and_keeps_their_order(run: Run, write: Any) -> None:
    texts = [line.split("\t")[0] for line in _DEV.splitlines()[1:]]
    drawn = set()
    for seed in range(12):
        found = evaluate_task(run(), load_task(write(_TASK + f"limit: 2\nseed: {seed}\n")), quiet=True)
        places = [texts.index(answer["text"]) for answer in found.answers]
        assert places == sorted(set(places))
        assert len(places) == 2
        drawn.add(tuple(places))
    assert len(drawn) > 2


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (_TASK + "temlate: x\n", ["unknown key temlate", "Did you mean template?"]),
        (_TASK + "normalise: byte\n", ["normalise is", "Did you mean bytes?"]),
        (_TASK.replace("{answer}", ""), ["template is '{text} '"]),
        (_TASK.replace("tsv", "text"), ["source.name is", "jsonl, parquet, tsv, tfds, choices"]),
        (_TASK.replace(", label: label", ""), ["source.label is null"]),
        (_TASK.replace("label: label", "label: label, pair: b"), ["source.pair is 'b'"]),
        (_TASK.replace("{text}", "{text} {pair}"), ["source.pair is null"]),
        (_TASK.replace(_ANSWERS, ""), ["answers has 0 classes"]),
        (_TASK.replace("river", "fox"), ["answers has the words ['fox', 'fox']"]),
        (_TASK + "shots: 2\n", ["shots is 2 and shots_source is null"]),
        (_TASK + _SHOTS.replace("SHOTS", "0"), ["shots is 0 and shots_source is tsv"]),
        (_TASK + "shots: -1\n", ["shots is -1"]),
        (_TASK + "limit: 0\n", ["limit is 0"]),
        (_TASK + "name: a/b\n", ["name is 'a/b'"]),
        (_TASK + "separator: ''\n", ["separator is"]),
        (_TASK + "normalise: prior\n", ["normalise is prior and template is '{text} {answer}'"]),
        (_TASK.replace("name: tsv, files: [FOLDER/dev.tsv], label: label", "name: choices, files: [a]"),
         ["answers are given"]),
        (_TASK + "shots: 1\nshots_source: {name: choices, files: [a]}\n", ["shots_source.name is"]),
        ("template: '{text} {answer}'\n" + _ANSWERS, ["source is missing"]),
    ],
)  # fmt: skip
def test_files_that_describe_no_task_are_refused(write: Any, text: str, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_task(write(text))
    for part in ("animals.yaml", *parts):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (_TASK.replace("r: river", "q: river"), "answers has no words for the class 'r' of source; it has f, q"),
        (_TASK.replace("FOLDER/dev", "FOLDER/none"), "source.files: no file matches"),
        (_TASK + _SHOTS.replace("SHOTS", "4"), "shots is 4, and shots_source has 3 examples"),
    ],
)
def test_tasks_that_do_not_fit_their_data_are_refused(run: Run, write: Any, text: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate_task(run(), load_task(write(text)), quiet=True)
    assert part in str(error.value)


@pytest.mark.parametrize(
    ("objective", "part"),
    [
        (MaskedLM(), "sees both sides of a token"),
        (Classification(attention="causal", pooling="last"), "no vocabulary head"),
    ],
)
def test_other_than_causal_models_are_refused_and_told_why(run: Run, write: Any, objective: Any, part: str) -> None:
    with pytest.raises(UserError, match=f"objective of this run is {objective.name}, which .*{part}"):
        evaluate_task(run(objective=objective), load_task(write(_TASK)), quiet=True)


def test_a_trained_run_answers(causal: FitResult, write: Any) -> None:
    task = load_task(write(_TASK + _SHOTS.replace("SHOTS", "2")))
    found = evaluate_task(TrainedRun(causal.assembly, causal.state), task, quiet=True)
    assert found.figures["step"] == 12
    assert all(np.isfinite(list(answer["scores"].values())).all() for answer in found.answers)
