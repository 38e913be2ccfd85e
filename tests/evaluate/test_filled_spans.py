"""Spans that sentinels stand for: what is read, and how what is written is cut and put in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.data._tokenizer import train_tokenizer
from lmobj.errors import UserError
from lmobj.evaluate import Generated, _filled_spans, fill_spans

TEXT = "Thank you <extra_id_0> me to your party <extra_id_1> week."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    config = SentencePieceConfig(vocab_size=330, sentinels=4)
    trained = train_tokenizer(config, ["Thank you for inviting me to your party last week.\n" * 4])
    return trained.extended(config.control_pieces)


def filled(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, written: list[str], text: str = TEXT, **more: Any
) -> tuple[Any, Any]:
    """What is made of a model that writes these texts, with ln p of -1, -2, ..., and what it was given to read."""
    ids = [np.append(tokenizer.encode(one, special=True), tokenizer.vocabulary.eos) for one in written]
    given: dict[str, Any] = {}

    def write(model: Any, sources: Any, settings: Any, **settled: Any) -> Generated:
        given.update(sources=sources, settings=settings, **settled)
        tokens = np.zeros((1, len(ids), max(map(len, ids))), np.int32)
        for row, one in enumerate(ids):
            tokens[0, row, : len(one)] = one
        lengths = np.array([[len(one) for one in ids]])
        return Generated(tokens, np.zeros(tokens.shape), lengths, -np.arange(1.0, len(ids) + 1)[None])

    monkeypatch.setattr(_filled_spans, "write_targets", write)
    around = ((), (tokenizer.vocabulary.eos,))
    settled = {"start": 0, "around": around, "length": 40, "max_new_tokens": 9, **more}
    return fill_spans(None, tokenizer, text, len(written), **settled), given  # type: ignore[arg-type]


def test_spans_are_put_where_their_sentinels_stand(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    written = ["<extra_id_0> for inviting<extra_id_1> last<extra_id_2>", "<extra_id_1> for<extra_id_0>"]
    (text, fillings), given = filled(tokenizer, monkeypatch, written)
    assert text == "Thank you for inviting me to your party last week."
    assert [one.mark for one in fillings] == ["<extra_id_0>", "<extra_id_1>"]
    assert [one.pieces for one in fillings] == [[" for inviting", ""], [" last", " for"]]
    np.testing.assert_allclose(fillings[0].probabilities, np.exp([-1, -2]))
    first, second = tokenizer.vocabulary.sentinels[:2]
    # Spaces before a sentinel are part of its span, as they are of pieces; those after it stay.
    parts = [tokenizer.encode(part).tolist() for part in ("Thank you", " me to your party", " week.")]
    (source,) = given["sources"]
    assert source.tolist() == [*parts[0], first, *parts[1], second, *parts[2], tokenizer.vocabulary.eos]
    assert (given["settings"].num_beams, given["settings"].num_samples, given["settings"].max_new_tokens) == (2, 2, 9)


def test_what_is_not_written_is_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    (text, fillings), _ = filled(tokenizer, monkeypatch, ["me <extra_id_1> last"])
    assert text == "Thank you me to your party last week."
    assert [one.pieces for one in fillings] == [[""], [" last"]]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Thank you", "has no sentinels; accepted: <extra_id_0> where"),
        ("<extra_id_1> you", "has sentinels <extra_id_1>"),
        ("<extra_id_0> you <extra_id_0>", "has sentinels <extra_id_0>, <extra_id_0>"),
        ("week " * 40 + "<extra_id_0>", "tokens; accepted: up to 40"),
    ],
    ids=["none", "order", "twice", "long"],
)
def test_texts_that_cannot_be_filled(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str, part: str
) -> None:
    with pytest.raises(UserError, match=part):
        filled(tokenizer, monkeypatch, ["<extra_id_0>"], text)


def test_as_many_fillings_as_there_can_be(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"k is 0; accepted: 1 to {tokenizer.vocabulary.size} fillings"):
        filled(tokenizer, monkeypatch, [])


def test_a_vocabulary_needs_sentinels(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = train_tokenizer(SentencePieceConfig(vocab_size=300), ["Thank you for inviting me\n" * 4])
    with pytest.raises(UserError, match="needs a vocabulary with sentinels"):
        filled(plain, monkeypatch, ["a"])
