"""Evaluation: one quotient of sums whatever the batches, the figures by hand, and baselines on the same tokens."""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from flax import nnx
from tiny_runs import Kind, experiment

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig, HeldOut, SentencePieceConfig, SeparatedValues
from lmobj.errors import UserError
from lmobj.evaluate import TASKS, NGram, output_logits
from lmobj.models import EncoderConfig, OutputHead
from lmobj.objectives import Classification, MaskedLM
from lmobj.train import Assembly, FitResult, TrainConfig, assemble
from lmobj.train.evaluation import Evaluation, readable
from lmobj.train.sharding import MeshConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")


def assembled(corpus: pathlib.Path, kind: Kind, **changes: Any) -> Assembly:
    """The parts of a tiny run on one device."""
    train = {"mesh": MeshConfig(data=1), **changes.pop("train", {})}
    return assemble(experiment(corpus, "unused", kind, train=train, **changes), quiet=True)


def held_out(run: Assembly) -> dict[str, np.ndarray]:
    """All rows of the validation split."""
    batches = list(run.batches("validation"))
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def test_a_batch_is_read_while_the_device_is_at_the_next(causal: FitResult, monkeypatch: pytest.MonkeyPatch) -> None:
    run, order, read = replace(causal.assembly), [], jax.device_get

    def step(*given: Any) -> Any:
        order.append("step")
        return causal.assembly.eval_step(*given)

    vars(run)["eval_step"] = step
    monkeypatch.setattr(jax, "device_get", lambda tree: order.append("read") or read(tree))
    assert Evaluation(run)(causal.state) == Evaluation(causal.assembly)(causal.state)
    batches = order.count("step")
    assert batches >= 2
    assert order[: 2 * batches] == ["step", *["step", "read"] * (batches - 1), "read"]


# --- the figures by hand ------------------------------------------------------------------------------------------


def log_probs(result: FitResult, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    """ln p over the vocabulary at every position, from full logits, in float64."""
    model = result.assembly.model(result.state)
    logits = output_logits(model, model.hidden(jnp.asarray(tokens), **inputs))
    wide = np.asarray(logits, np.float64)
    return wide - np.log(np.sum(np.exp(wide), axis=-1, keepdims=True))


def test_bits_per_byte_by_hand(causal: FitResult) -> None:
    rows = held_out(causal.assembly)
    tokens, segments = rows["tokens"], rows["segment_ids"]
    mask = masks.causal().packed(jnp.asarray(segments))
    scores = log_probs(causal, tokens, mask=mask, positions=jnp.asarray(rows["positions"]))
    tokenizer = causal.assembly.dataset.tokenizer
    nats, count, right, size = 0.0, 0, 0, 0
    for row, at in np.argwhere(segments[:, 1:] > 0):
        if segments[row, at] == segments[row, at + 1]:
            target = int(tokens[row, at + 1])
            nats -= scores[row, at, target]
            right += int(np.argmax(scores[row, at]) == target)
            size += len(tokenizer.decode([target]).encode())  # the words are ASCII, so that pieces decode alone
            count += 1
    measured = Evaluation(causal.assembly)(causal.state)
    expected = {
        "nll": nats / count,
        "loss": nats / count,
        "perplexity": math.exp(nats / count),
        "accuracy": right / count,
        "bits_per_byte": nats / math.log(2) / size,
    }
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(measured[name], value, rtol=1e-5, err_msg=name)
    assert {f"eval/{name}": value for name, value in measured.items()}.items() <= causal.metrics.items()


def test_the_bytes_are_those_of_the_text(causal: FitResult) -> None:
    """The predicted tokens have all bytes of the split but those of the tokens that begin a segment."""
    run = causal.assembly
    batches = list(run.batches("validation"))
    pairs = [run.eval_step(causal.state, batch)[0]["bits_per_byte"][1] for batch in batches]
    rows = held_out(run)
    first = rows["segment_ids"] != np.pad(rows["segment_ids"], ((0, 0), (1, 0)))[:, :-1]
    text = run.dataset.summary()["splits"]["validation"]["bytes"]
    assert sum(map(float, pairs)) == text - np.sum(rows["token_bytes"][first])


def test_top5_accuracy_by_hand(masked: FitResult) -> None:
    evaluation = Evaluation(masked.assembly)
    cloze = evaluation.cloze
    assert cloze is not None
    assert cloze.count > 100
    rows = held_out(masked.assembly)
    mask = masks.bidirectional().packed(jnp.asarray(cloze.segment_ids))
    scores = log_probs(masked, cloze.tokens, mask=mask, positions=jnp.asarray(cloze.positions))
    hits = 0
    for row, slots in enumerate(cloze.where):
        # What was hidden is in one row of the held-out text, at its place.
        source = np.flatnonzero(
            np.all((rows["tokens"] == cloze.tokens[row]) | (cloze.tokens[row] == 6), axis=1)
        )  # 6 is [MASK]
        for slot, at in enumerate(slots[slots >= 0]):
            answer = int(cloze.answers[row, slot])
            assert answer in rows["tokens"][source, at]
            hits += answer in np.argsort(-scores[row, at])[:5]
    assert evaluation(masked.state)["top5_accuracy"] == hits / cloze.count == masked.metrics["eval/top5_accuracy"]
    # What is most frequent at all, and the most frequent words: ids by how often the training text has them.
    data = masked.assembly.dataset
    counts = np.bincount(np.concatenate(list(data.documents("train"))), minlength=320)
    words = np.where(data.tokenizer.is_word, counts, -1)
    assert evaluation.baselines() == {
        name: {"top5_accuracy": cloze.baseline(np.argsort(-n)[:5])}
        for name, n in (("unigram", counts), ("unigram of words", words))
    }
    # A diverged model has guessed nothing.
    nan = jax.tree.map(lambda x: x * jnp.nan, masked.state.params)
    assert evaluation(masked.state._replace(params=nan))["top5_accuracy"] == 0.0


def test_readable_divides_once() -> None:
    pairs = {
        "term/nll": (6.0, 4.0),
        "term/size": (10.0, 5.0),
        "nll": (8.0, 4.0),
        "accuracy": (1.0, 4.0),
        "absent": (0.0, 0.0),
    }
    # 2 * 6/4 + 0.5 * 10/5 = 4.
    expected = {
        "term/nll": 1.5,
        "term/size": 2.0,
        "nll": 2.0,
        "accuracy": 0.25,
        "loss": 4.0,
        "perplexity": math.exp(2.0),
    }
    assert readable(pairs, {"nll": 2.0, "size": 0.5}) == expected
    # One term is the loss itself; an absurd nll does not end the run.
    assert readable({"term/nll": (0.0, 0.0)}, {"nll": 1.0}) == {}, "a loss of nothing is none, not 0"
    assert readable({"term/nll": (6.0, 4.0), "nll": (1e6, 1.0)}, {"nll": 1.0}) == {
        "nll": 1e6,
        "loss": 1.5,
        "perplexity": math.exp(700),
    }


# --- batches ------------------------------------------------------------------------------------------------------


EPSILON: dict[Kind, float] = {"causal_lm": 0.0, "masked_lm": 1e-5}


@pytest.mark.parametrize("kind", ["causal_lm", "masked_lm"])
def test_the_batch_size_does_not_matter(corpus: pathlib.Path, kind: Kind) -> None:
    """In float64 to 1e-12: batches of 24 end with a part empty one, a batch of 512 holds the whole split."""
    wide = {"dtype": "float64", "param_dtype": "float64", "layers": 1}
    changes = {"objective": MaskedLM(selection="bernoulli")} if kind == "masked_lm" else {}
    with jax.enable_x64(True):
        small = assembled(corpus, kind, model=wide, train={"batch_size": 24}, **changes)
        large = assembled(corpus, kind, model=wide, train={"batch_size": 512}, **changes)
        rows = small.dataset.rows(small.rows, split="validation", batch_size=24).per_epoch
        assert rows % 24 != 0
        assert rows < 512
        state = small.initial_state()
        one, other = Evaluation(small)(state), Evaluation(large)(state)
        (batch,) = large.batches("validation")
        weight = float(large.eval_step(state, batch)[0]["nll"][1])
        assert Evaluation(large)(state._replace(step=state.step + 7)) == other  # the noise is the same at every step
    # The epsilon of the denominator counts once.
    np.testing.assert_allclose(one["loss"], one["nll"] * weight / (weight + EPSILON[kind]), rtol=1e-12)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-12, err_msg=name)


def test_part_of_a_split_is_its_first_batches(causal: FitResult) -> None:
    evaluation = Evaluation(causal.assembly)
    whole, part = evaluation(causal.state), evaluation(causal.state, 2)
    sums = np.zeros(2)
    for batch in list(causal.assembly.batches("validation"))[:2]:
        sums += np.asarray(causal.assembly.eval_step(causal.state, batch)[0]["nll"], np.float64)
    assert part["nll"] == sums[0] / sums[1] != whole["nll"]
    assert evaluation(causal.state, 10_000) == whole


def test_splits_are_evaluated_apart(causal: FitResult) -> None:
    assert Evaluation(causal.assembly, "test")(causal.state)["nll"] != causal.metrics["eval/nll"]
    without = replace(causal.assembly.config, data=replace(causal.assembly.config.data, test=0.0))
    empty = Evaluation(assemble(without, quiet=True), "test")
    assert not empty.has_text
    assert empty.baselines() == {}
    with pytest.raises(UserError, match="the test split holds no documents"):
        empty(causal.state)


def test_text_without_words_has_no_cloze(tmp_path: pathlib.Path) -> None:
    (tmp_path / "numbers.txt").write_text("\n\n".join(f"{n} {n * n} {n**3}; 1, 2." for n in range(60)))
    evaluation = Evaluation(assembled(tmp_path / "numbers.txt", "masked_lm"))
    assert evaluation.cloze is not None
    assert evaluation.cloze.count == 0
    assert evaluation.baselines() == {}


# --- baselines ----------------------------------------------------------------------------------------------------


class Table(nnx.Module):
    """ln p(next | last) is a row of a table."""

    def __init__(self, vocab: Vocabulary) -> None:
        self.scores = nnx.Param(jnp.zeros((vocab.size, vocab.size)))

    def hidden(self, tokens: jax.Array, **_: Any) -> jax.Array:
        return self.scores[...][tokens]

    def head_hidden(self, hidden: jax.Array) -> jax.Array:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.eye(self.scores.shape[0]))


@dataclass(frozen=True)
class TableConfig:
    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> Table:
        return Table(vocab)


def test_baselines_score_the_tokens_that_the_model_predicts(corpus: pathlib.Path) -> None:
    """An n-gram model put into a network reaches, through the objective, the figure that the baseline has."""
    config = experiment(corpus, "unused", train={"mesh": MeshConfig(data=1)})
    run = assemble(config, model=TableConfig(), quiet=True)
    evaluation, size = Evaluation(run), run.dataset.vocab.size
    baselines = evaluation.baselines()
    documents = [np.append(document, run.dataset.vocab.eos) for document in run.dataset.documents("train")]
    pairs = np.stack(np.meshgrid(np.arange(size), np.arange(size), indexing="ij"), -1).reshape(-1, 2)
    state = run.initial_state()
    for name, order in (("unigram", 1), ("bigram", 2)):
        scores = NGram.fit(documents, order, size).log_probs(pairs)[:, 1].reshape(size, size)
        np.testing.assert_allclose(np.exp(scores).sum(1), 1, rtol=1e-9)
        reached = evaluation(state._replace(params={"model": {"scores": jnp.asarray(scores, jnp.float32)}}))
        np.testing.assert_allclose(reached["bits_per_byte"], baselines[name]["bits_per_byte"], rtol=1e-5)
    figures = [values["bits_per_byte"] for values in baselines.values()]
    assert list(baselines) == ["unigram", "bigram", "5-gram"]
    assert figures == sorted(figures, reverse=True)


def test_figures_of_a_task_are_those_of_its_rows_in_any_batches(tmp_path: pathlib.Path) -> None:
    """Over 8 devices and in one batch: empty rows that fill the last batch count for nothing."""
    lines = [f"{'ab'[i % 3 > 0]}\t{'good' if i % 3 else 'bad'} number {i}" for i in range(90)]
    (tmp_path / "train.tsv").write_text("\n".join(lines))
    (tmp_path / "dev.tsv").write_text("\n".join(lines[:11]))
    source = SeparatedValues(files=(str(tmp_path / "train.tsv"),), columns=("l", "t"), text="t", label="l")
    data = DataConfig(
        source=source,
        tokenizer=SentencePieceConfig(vocab_size=300),
        validation=HeldOut(files=(str(tmp_path / "dev.tsv"),)),
        test=0.0,
        length=16,
        cache=str(tmp_path / "cache"),
    )
    model = EncoderConfig(layers=1, width=16, heads=2, max_length=16)
    found = []
    for batch_size, mesh in ((8, MeshConfig()), (11, MeshConfig(data=1))):
        train = TrainConfig(batch_size=batch_size, mesh=mesh)
        run = assemble(Experiment(data=data, model=model, objective=Classification(), train=train), quiet=True)
        with tiny_runs.quick_compilation():
            found.append(Evaluation(run)(run.initial_state()))
        assert {"accuracy", "nll", "loss", "macro_f1", "matthews"} <= set(found[-1])
        # Of 11 held-out lines, as of the 90, every third is an a.
        assert Evaluation(run).baselines() == {"most frequent class": {"accuracy": pytest.approx(7 / 11)}}
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_the_mean_is_what_numbers_are_compared_with() -> None:
    # The mean of 1, 2 and 6 is 3; 2 and 7 are 1 and 4 away.
    found = TASKS["regression"].baselines(np.float32([1, 2, 6]), np.float32([2, 7]))
    assert found == {"mean of the training": {"mse": pytest.approx((1 + 16) / 2)}}
