"""Tags to entities and back, by hand and over all short sequences; seqeval reads tags as this does."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest
from mutants import Mutant, assert_killed
from seqeval.metrics.sequence_labeling import get_entities
from seqeval.scheme import IOB2, IOBES, Entities

from lmobj.data import TagScheme
from lmobj.errors import UserError
from lmobj.tasks import Entity, _tag_schemes, check_tags, decode_tags, encode_tags

SCHEMES: tuple[TagScheme, ...] = get_args(TagScheme)
ALPHABETS = {"bio": "BI", "iob1": "BI", "bioes": "BIES", "bmes": "BMES"}


def all_tags(scheme: TagScheme, types: str = "xy") -> list[str]:
    return ["O", *(f"{letter}-{kind}" for letter in ALPHABETS[scheme] for kind in types)]


BY_HAND = [
    ("bio", "B-P I-P O B-P B-P", [("P", 0, 2), ("P", 3, 4), ("P", 4, 5)]),
    ("iob1", "I-P I-P O I-P B-P", [("P", 0, 2), ("P", 3, 4), ("P", 4, 5)]),
    ("bioes", "B-P E-P O S-P S-P", [("P", 0, 2), ("P", 3, 4), ("P", 4, 5)]),
    ("bmes", "B-P M-P E-P S-Q O", [("P", 0, 3), ("Q", 3, 4)]),
    ("bmes", "B M E S", [("", 0, 3), ("", 3, 4)]),  # segmentation: letters alone
    ("bio", "B-a-b I-a-b", [("a-b", 0, 2)]),  # the first hyphen parts letter and type
]


@pytest.mark.parametrize(("scheme", "tags", "entities"), BY_HAND)
def test_well_formed_tags_by_hand(scheme: TagScheme, tags: str, entities: list[Any]) -> None:
    for strict in (False, True):
        assert decode_tags(tags.split(), scheme, strict=strict) == entities
    assert encode_tags(reversed([Entity(*entity) for entity in entities]), len(tags.split()), scheme) == tags.split()
    check_tags([tags.split()], scheme)


@pytest.mark.parametrize(
    ("scheme", "tags", "lenient", "strict"),
    [
        ("bio", "I-P I-P O", [("P", 0, 2)], []),
        ("bio", "B-P I-Q I-Q", [("P", 0, 1), ("Q", 1, 3)], [("P", 0, 1)]),
        ("iob1", "B-P I-P O I-P", [("P", 0, 2), ("P", 3, 4)], [("P", 3, 4)]),
        ("iob1", "I-Q B-P", [("Q", 0, 1), ("P", 1, 2)], [("Q", 0, 1)]),
        ("bioes", "B-P I-P O E-P", [("P", 0, 2), ("P", 3, 4)], []),
        ("bioes", "B-P S-P I-P E-P", [("P", 0, 1), ("P", 1, 2), ("P", 2, 4)], [("P", 1, 2)]),
        ("bmes", "B-P E-Q", [("P", 0, 1), ("Q", 1, 2)], []),
    ],
)
def test_other_tags_by_hand(scheme: TagScheme, tags: str, lenient: list[Any], strict: list[Any]) -> None:
    assert decode_tags(tags.split(), scheme) == lenient
    assert decode_tags(tags.split(), scheme, strict=True) == strict


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_short_sequences(scheme: TagScheme) -> None:
    """What is checked is what is encoded, and no other; and entities come back."""
    written = set()
    for length in range(5):
        spans = [Entity(kind, i, j) for kind in "xy" for i in range(length) for j in range(i + 1, length + 1)]
        for count in range(length + 1):
            for chosen in itertools.combinations(spans, count):
                ordered = sorted(chosen, key=lambda entity: entity.start)
                if all(a.end <= b.start for a, b in itertools.pairwise(ordered)):
                    tags = encode_tags(chosen, length, scheme)
                    written.add(tuple(tags))
                    assert decode_tags(tags, scheme) == decode_tags(tags, scheme, strict=True) == ordered
        for tags in itertools.product(all_tags(scheme), repeat=length):
            try:
                check_tags([tags], scheme)
                valid = True
            except UserError:
                valid = False
            assert valid == (tags in written)
            strict, lenient = decode_tags(tags, scheme, strict=True), decode_tags(tags, scheme)
            assert set(strict) <= set(lenient)
            assert (encode_tags(strict, length, scheme) == list(tags)) == valid
            covered = {word for entity in lenient for word in range(entity.start, entity.end)}
            assert covered == {word for word, tag in enumerate(tags) if tag != "O"}


def test_entities_are_seqevals() -> None:
    """3,000 random sequences a scheme; seqeval knows no M, and counts last words instead of those after."""
    rng = np.random.default_rng(0)
    strict = {"bio": IOB2, "bioes": IOBES, "bmes": IOBES}
    for scheme in SCHEMES:
        names = np.array(all_tags(scheme))
        sentences = [names[rng.integers(0, len(names), rng.integers(1, 12))].tolist() for _ in range(3000)]
        theirs = [[tag.replace("M-", "I-") for tag in tags] for tags in sentences]
        for tags, other in zip(sentences, theirs, strict=True):
            assert decode_tags(tags, scheme) == [(kind, start, end + 1) for kind, start, end in get_entities(other)]
        if scheme in strict:
            for tags, found in zip(sentences, Entities(theirs, strict[scheme]).entities, strict=True):
                assert decode_tags(tags, scheme, strict=True) == [(e.tag, e.start, e.end) for e in found]


@pytest.mark.parametrize(
    ("scheme", "tags", "message"),
    [
        ("bio", "O I-P", r"sentence 1, position 1: I-P after O; accepted: the scheme bio, every entity begins with B-"),
        ("bio", "I-P", "sentence 1, position 0: I-P at the beginning"),
        ("bio", "B-P I-Q", "position 1: I-Q after B-P"),
        ("iob1", "I-P B-Q", "position 1: B-Q after I-P"),
        ("bioes", "O B-P", "position 2: the end after B-P"),
        ("bmes", "B-P M-P O", "position 2: O after M-P"),
        ("bmes", "B-P I-P", "position 1: 'I-P' is no tag of the scheme bmes; accepted: O, B-TYPE, E-TYPE, M-TYPE"),
        ("bio", "B-", "position 0: 'B-' is no tag"),
        ("bio", "O-P", "position 0: 'O-P' is no tag"),
        ("bio", "", "position 0: '' is no tag"),
    ],
)
def test_faults_are_named(scheme: TagScheme, tags: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tags([["O"], tags.split(" ")], scheme)


def test_what_cannot_be_encoded_is_refused() -> None:
    for entities in ([("P", 1, 1)], [("P", 2, 4)], [("P", 0, 2), ("Q", 1, 3)]):
        with pytest.raises(UserError, match="in a sentence of 3 words"):
            encode_tags([Entity(*entity) for entity in entities], 3)
    unknown: Any = "bilou"
    with pytest.raises(UserError, match="scheme is 'bilou'; accepted: bio, iob1, bioes, bmes"):
        decode_tags(["O"], unknown)


def _by_hand() -> None:
    for scheme, tags, entities in BY_HAND:
        test_well_formed_tags_by_hand(scheme, tags, entities)


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("types flow into one another", _tag_schemes, "_begins",
               lambda f: lambda a, b, c: f((a[0], b[1]), b, c)),
        Mutant("ends do not end", _tag_schemes, "_begins",
               lambda f: lambda a, b, c: f(("I" if a[0] in "ES" else a[0], a[1]), b, c)),
        Mutant("strict is lenient", _tag_schemes, "_well_formed", lambda _: lambda *_: True),
    ],
    ids=str,
)  # fmt: skip
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [_by_hand, test_entities_are_seqevals])
