"""Precision, recall and F1 of entities.

Source: Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task: Language-Independent Named
Entity Recognition", section 2.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from lmobj.data import TagScheme
from lmobj.errors import UserError
from lmobj.tasks import decode_tags

__all__ = ["EntityReport", "EntityScore", "score_entities"]


class EntityScore(NamedTuple):
    """Of one type, or of all; shares are in [0, 1]."""

    precision: float
    """Right ones among those found; 0 if none is found."""
    recall: float
    """Right ones among the true; 0 if none is true."""
    f1: float
    """2 P R / (P + R); 0 if both are 0."""
    true: int
    found: int
    right: int


class EntityReport(NamedTuple):
    """Scores of entities."""

    overall: EntityScore
    """From the counts of all types together (micro average)."""
    by_type: dict[str, EntityScore]
    """Of each type that is true or found somewhere, by name."""
    macro_f1: float
    """Mean F1 of the types; 0 without any."""


def score_entities(
    gold: Sequence[Sequence[str]],
    predicted: Sequence[Sequence[str]],
    scheme: TagScheme = "bio",
    *,
    strict: bool = False,
) -> EntityReport:
    """Scores predicted tags: an entity is right if its type, its first and its last word are.

    Args:
      gold, predicted: the tags of each sentence.
      scheme: of both.
      strict: as for `decode_tags`; False is seqeval's default mode.

    Raises:
      UserError: sentences or words that are not as many in both, or a tag that the scheme does not have.

    Source: as for the module.
    """
    if len(gold) != len(predicted):
        raise UserError(f"there are {len(gold)} gold sentences and {len(predicted)} predicted; accepted: as many.")
    true, found, right = Counter[str](), Counter[str](), Counter[str]()
    for number, (a, b) in enumerate(zip(gold, predicted, strict=True)):
        if len(a) != len(b):
            raise UserError(f"sentence {number} has {len(a)} gold tags and {len(b)} predicted; accepted: as many.")
        ours, theirs = (set(decode_tags(tags, scheme, strict=strict)) for tags in (a, b))
        true.update(entity.type for entity in ours)
        found.update(entity.type for entity in theirs)
        right.update(entity.type for entity in ours & theirs)
    by_type = {kind: _score(true[kind], found[kind], right[kind]) for kind in sorted({*true, *found})}
    macro = sum(score.f1 for score in by_type.values()) / len(by_type) if by_type else 0.0
    return EntityReport(_score(true.total(), found.total(), right.total()), by_type, macro)


def _score(true: int, found: int, right: int) -> EntityScore:
    return EntityScore(
        right / found if found else 0.0,
        right / true if true else 0.0,
        2 * right / (true + found) if right else 0.0,
        true,
        found,
        right,
    )
