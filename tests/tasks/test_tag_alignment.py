"""Tags of words on subwords: by hand, as tags of longer sentences, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mutants import Mutant, assert_killed

from lmobj.data import TagScheme
from lmobj.errors import UserError
from lmobj.tasks import (
    Entity,
    _tag_alignment,
    align_tags,
    decode_tags,
    encode_tags,
    encode_words,
    tag_ids,
    word_tags,
)

SCHEMES: tuple[TagScheme, ...] = ("bio", "iob1", "bioes", "bmes")
WORDS = [-1, 0, 1, 1, 1, 2, 2, 3, -1]


def test_by_hand() -> None:
    tags = ["O", "B-P", "I-P", "B-P"]
    assert align_tags(tags, WORDS) == [None, "O", "B-P", None, None, "I-P", None, "B-P", None]
    assert align_tags(tags, WORDS, subwords="all") == [
        None, "O", "B-P", "I-P", "I-P", "I-P", "I-P", "B-P", None,
    ]  # fmt: skip
    assert align_tags(["S-Q", "B-P", "E-P", "S-P"], WORDS, "bmes", subwords="all") == [
        None, "S-Q", "B-P", "M-P", "M-P", "M-P", "E-P", "S-P", None,
    ]  # fmt: skip
    assert align_tags(["O", "S-P", "O", "O"], WORDS, "bioes", subwords="all")[2:5] == ["B-P", "I-P", "E-P"]
    assert align_tags(["I-P", "B-P", "I-P", "O"], WORDS, "iob1", subwords="all")[1:7] == [
        "I-P", "B-P", "I-P", "I-P", "I-P", "I-P",
    ]  # fmt: skip


def random_sentence(rng: np.random.Generator) -> tuple[list[Entity], np.ndarray]:
    """Entities of some words, and the word of each subword with specials strewn in."""
    entities, at = [], 0
    for size in rng.integers(1, 4, rng.integers(1, 6)):
        if rng.random() < 0.6:
            entities.append(Entity(str(rng.choice(["x", "y"])), at, at + int(size)))
        at += int(size)
    numbers = np.repeat(np.arange(at), rng.integers(1, 4, at))
    return entities, np.insert(numbers, np.sort(rng.integers(0, len(numbers) + 1, 3)), -1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_subwords_are_tagged_as_a_sentence_of_their_own(scheme: TagScheme) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        entities, numbers = random_sentence(rng)
        count = int(numbers.max()) + 1
        tags = encode_tags(entities, count, scheme)
        words = numbers[numbers >= 0]
        stretched = [
            Entity(e.type, int(np.searchsorted(words, e.start)), int(np.searchsorted(words, e.end))) for e in entities
        ]
        aligned = align_tags(tags, numbers, scheme, subwords="all")
        assert [tag for tag in aligned if tag is not None] == encode_tags(stretched, len(words), scheme)
        assert [tag is None for tag in aligned] == (numbers < 0).tolist()
        assert word_tags(aligned, numbers, count, scheme, subwords="all") == tags


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_first_subword_has_the_words_tag(scheme: TagScheme) -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        entities, numbers = random_sentence(rng)
        count = int(numbers.max()) + 1
        tags = encode_tags(entities, count, scheme)
        aligned = align_tags(tags, numbers, scheme)
        assert [tag for tag in aligned if tag is not None] == tags
        for word in range(count):
            assert aligned[int(np.argmax(numbers == word))] == tags[word]
        filled = [tag or "B-x" for tag in aligned]  # whatever a model says of the others
        assert decode_tags(word_tags(filled, numbers, count, scheme), scheme) == entities


def test_disagreeing_subwords_by_hand() -> None:
    numbers = [0, 0, 1, 1, 2]
    tags = ["B-P", "E-P", "S-P", "E-Q", "I-P"]
    # B and E of one type make S; with another type at its end, the second word is what it began as. The fourth is gone.
    assert word_tags(tags, numbers, 4, "bioes", subwords="all") == ["S-P", "S-P", "I-P", "O"]
    assert word_tags(["O", "E-P", "B-P", "O", "O"], numbers, 3, "bioes", subwords="all") == ["O", "B-P", "O"]
    assert word_tags(["I-P", "E-P", "B-P", "I-P", "E-P"], numbers, 3, "bioes", subwords="all") == ["E-P", "B-P", "E-P"]
    assert word_tags(tags, numbers, 3, "bioes") == ["B-P", "S-P", "I-P"]


def test_words_become_tokens() -> None:
    encode = lambda text: [ord(character) for character in text]  # noqa: E731
    ids, numbers = encode_words(["ab", "", "c"], encode)
    np.testing.assert_array_equal(ids, [ord(c) for c in "ab  c"])
    np.testing.assert_array_equal(numbers, [0, 0, 1, 2, 2])
    ids, numbers = encode_words(["北", "京"], encode, space="")
    np.testing.assert_array_equal(numbers, [0, 1])
    ids, numbers = encode_words([], encode)
    assert len(ids) == len(numbers) == 0
    # A word without any token, as of a control character: it has no tag, and is O on the way back.
    numbers = encode_words(["a", "", "b"], encode, space="")[1]
    assert align_tags(["B-P", "I-P", "I-P"], numbers) == ["B-P", "I-P"]
    assert word_tags(["B-P", "I-P"], numbers, 3) == ["B-P", "O", "I-P"]


def test_ids_of_tags() -> None:
    np.testing.assert_array_equal(tag_ids([None, "O", "B-P"], ["O", "B-P"]), [-100, 0, 1])
    with pytest.raises(UserError, match="position 1 has the tag 'B-Q'; accepted: O, B-P"):
        tag_ids(["O", "B-Q"], ["O", "B-P"])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="reach 3 for 3 words"):
        align_tags(["O"] * 3, WORDS)
    with pytest.raises(UserError, match="go back"):
        align_tags(["O"] * 3, [0, 1, 0])
    with pytest.raises(UserError, match="word 1: 'X' is no tag"):
        align_tags(["O", "X"], [0, 1], subwords="all")
    with pytest.raises(UserError, match="1 tags for 2 subwords"):
        word_tags(["O"], [0, 1], 2)
    with pytest.raises(UserError, match="subword 1: '' is no tag"):
        word_tags(["O", None], [0, 1], 2)


def _last_for_first(real: Any) -> Any:
    return lambda numbers: real(numbers)[::-1]


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("the last subword stands for a word", _tag_alignment, "_edges", _last_for_first),
        Mutant("B on all subwords", _tag_alignment, "_part", lambda _: lambda tag, *_: tag),
        Mutant(
            "an end on all subwords", _tag_alignment, "_part", lambda f: lambda t, o, _, *rest: f(t, o, True, *rest)
        ),
        Mutant("the first subword alone is asked", _tag_alignment, "_whole", lambda f: lambda a, _, c: f(a, a, c)),
    ],
    ids=str,
)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [test_by_hand, test_disagreeing_subwords_by_hand])
