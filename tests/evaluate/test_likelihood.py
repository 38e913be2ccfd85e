"""Likelihoods of answers: exact against a full softmax in NumPy, whatever the batches, and where an answer begins."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from toy_models import VOCAB, TableModel, family

from lmobj import masks
from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import (
    AnsweredText,
    PromptTemplate,
    ScoredText,
    answer_scores,
    continuation_log_probs,
    same_start,
    scored_text,
)
from lmobj.evaluate._likelihood import _rounded


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(SentencePieceConfig(vocab_size=330), ["the quick brown fox sees the quiet river\n" * 4])


def rows(count: int, longest: int, vocab: int = VOCAB) -> list[ScoredText]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(2, longest + 1, count)
    return [ScoredText(draw.integers(0, vocab, n).astype(np.int32), int(draw.integers(1, n))) for n in lengths]


def test_log_probs_are_those_of_a_table_in_double_precision() -> None:
    p = np.random.default_rng(1).dirichlet(np.ones(VOCAB), VOCAB)
    asked = rows(150, 40)  # several shapes, and more rows of one than a batch holds
    told: list[int] = []
    with jax.enable_x64(True):
        found = continuation_log_probs(TableModel(p), asked, done=told.append)
    for row, values in zip(asked, found, strict=True):
        expected = [np.log(p[row.tokens[t - 1], row.tokens[t]]) for t in range(row.start, len(row.tokens))]
        np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert told == sorted(told)
    assert told[-1] == 150
    assert len({len(row.tokens) for row in asked}) > 30


@pytest.mark.parametrize("name", ["rotary", "gru"])
def test_log_probs_are_those_of_a_full_softmax(name: str) -> None:
    """Each row by itself, without padding or neighbours; the softmax over the whole vocabulary in float64."""
    model, asked = family(name), rows(6, 17)  # 17: the last token is not read by a model of 16
    for row, values in zip(asked, continuation_log_probs(model, asked), strict=True):
        hidden = np.asarray(model.hidden(row.tokens[None, :-1], mask=masks.causal())[0], np.float64)
        head = model.head_table()
        logits = hidden @ np.asarray(head.table, np.float64)[:VOCAB].T
        if head.bias is not None:
            logits += np.asarray(head.bias, np.float64)[:VOCAB]
        if head.soft_cap is not None:
            logits = head.soft_cap * np.tanh(logits / head.soft_cap)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(row.start - 1, len(row.tokens) - 1), row.tokens[row.start :]]
        np.testing.assert_allclose(values, expected, rtol=2e-6, atol=2e-6)


def test_rows_that_cannot_be_scored_are_refused() -> None:
    model = TableModel(np.full((VOCAB, VOCAB), 1 / VOCAB))
    for start in (0, 2):
        with pytest.raises(UserError, match=f"row 1 has 2 tokens, scored from {start}"):
            continuation_log_probs(model, [ScoredText(np.array([1, 2]), 1), ScoredText(np.array([1, 2]), start)])
    with pytest.raises(UserError, match="not finite"):
        continuation_log_probs(TableModel(np.full((VOCAB, VOCAB), np.nan)), [ScoredText(np.array([1, 2]), 1)])


def test_shapes_are_few_and_large_enough() -> None:
    sizes = [_rounded(number, 4) for number in range(1, 1000)]
    assert all(4 <= number <= size < max(1.5 * number, 5) for number, size in zip(range(1, 1000), sizes, strict=True)
               if number >= 4)  # fmt: skip
    assert sorted(set(sizes)) == [4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]


def test_an_answer_begins_where_the_tokens_of_the_prompt_end(tokenizer: Tokenizer) -> None:
    prompt, completion = "the quick brown", " fox sees"
    row = scored_text(tokenizer, prompt, completion)
    assert row.tokens.tolist() == tokenizer.encode(prompt + completion).tolist()
    assert row.start == len(tokenizer.encode(prompt))
    assert tokenizer.decode(row.tokens[row.start :]) == completion


def test_what_a_piece_spans_is_scored_whole(tokenizer: Tokenizer) -> None:
    fox = tokenizer.encode(" fox")
    assert len(fox) == 1, "a piece with its space"
    # The space by itself is a token of the prompt, and none of the whole text: it is no part of what was read.
    row = scored_text(tokenizer, "the quick brown ", "fox")
    assert len(tokenizer.encode("the quick brown ")) == row.start + 1
    assert row.tokens[row.start :].tolist() == fox.tolist()
    # The same text cut elsewhere has the same tokens, and the scored ones begin with the piece that spans the cut.
    again = scored_text(tokenizer, "the quick brown f", "ox")
    assert (again.tokens.tolist(), again.start) == (row.tokens.tolist(), row.start)


@pytest.mark.parametrize(("prompt", "completion"), [("", "fox"), (" f", "ox")])
def test_an_answer_after_nothing_is_refused(tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    with pytest.raises(UserError, match="at least one token"):
        scored_text(tokenizer, prompt, completion)


def test_all_answers_are_scored_from_the_same_place(tokenizer: Tokenizer) -> None:
    rows = [scored_text(tokenizer, "the quick brown f", ending) for ending in ("ox", "!")]
    assert rows[0].start < rows[1].start, "ox runs into what is before it"
    first, second = same_start(rows)
    assert first.start == second.start == rows[0].start
    np.testing.assert_array_equal(first.tokens[: first.start], second.tokens[: second.start])


def test_an_answer_is_at_least_one_token(tokenizer: Tokenizer) -> None:
    row = scored_text(tokenizer, "the fox", "")
    assert row.start == len(row.tokens) - 1


def test_scores_by_hand() -> None:
    log_p = [-2.0, -3.0, -8.0]
    sizes = {"tokens": [1, 2, 8], "num_bytes": [1, 6, 8], "priors": [-0.5, -2.5, -8.25]}
    expected = {
        "sum": [-2, -3, -8],
        "tokens": [-2 / 1, -3 / 2, -8 / 8],
        "bytes": [-2 / 1, -3 / 6, -8 / 8],
        "prior": [-1.5, -0.5, 0.25],
    }
    for normalise, values in expected.items():
        assert answer_scores(log_p, normalise, **sizes).tolist() == values  # type: ignore[arg-type]
    assert [int(np.argmax(values)) for values in expected.values()] == [0, 2, 1, 2]


def test_scores_that_cannot_be_had_are_refused() -> None:
    with pytest.raises(UserError, match="normalise is 'tokens'"):
        answer_scores([-1.0], "tokens")
    with pytest.raises(UserError, match="normalise is 'mean'"):
        answer_scores([-1.0], "mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has 0 bytes"):
        answer_scores([-1.0], "bytes", num_bytes=[0])


def test_prompt_and_completion_are_the_template_filled() -> None:
    template = PromptTemplate("{text} and {pair}: {answer}!", separator="|", instruction="go")
    shots = [AnsweredText("{answer}", "{text}", "yes"), AnsweredText("c", "d", "no")]
    prompt = template.prompt(shots, "{pair}", "f")
    assert prompt == "go|{answer} and {text}: yes!|c and d: no!|{pair} and f:"
    assert template.completion("{text}") == " {text}!"
    assert template.prompt((), "", "") == "go| and :"
    assert PromptTemplate("{text}{answer}").completion("s") == "s"
    assert PromptTemplate("so {text} {answer}").completion("s") == " s", "one space, also after an empty text"
    assert PromptTemplate("{text}  {answer}").prompt((), "a ") == "a"


@pytest.mark.parametrize("template", ["", "{text}", "{answer}", "{answer} {text}", "{text}{pair}{pair}{answer}",
                                      "{text} {answer} {answer}", "{text} {answer} {pair}"])  # fmt: skip
def test_templates_without_their_fields_are_refused(template: str) -> None:
    with pytest.raises(UserError, match=r"template is .*once after them"):
        PromptTemplate(template)
