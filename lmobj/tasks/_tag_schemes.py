"""Tags of words and the entities they stand for, in the schemes of the field.

    text      Ada Lovelace met   Babbage Charles   (two persons side by side at the end)
    iob1      I-P I-P      O     I-P     B-P       B- only where an entity follows one of its own type
    bio       B-P I-P      O     B-P     B-P       IOB2
    bioes     B-P E-P      O     S-P     S-P
    bmes      the same with M- for I-

A tag is O, or a letter, a hyphen and a type; a letter by itself has the type "".

Source: Ramshaw and Marcus 1995, "Text Chunking using Transformation-Based Learning" (IOB1); Tjong Kim Sang and Veenstra
1999, "Representing Text Chunks" (IOB2 and its relatives); Ratinov and Roth 2009, "Design Challenges and Misconceptions
in Named Entity Recognition" (first and last tags).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lmobj.data import TagScheme
from lmobj.errors import UserError

__all__ = ["Entity", "Letters", "check_tags", "decode_tags", "encode_tags", "letters_of", "scheme_tags", "split_tag"]


class Entity(NamedTuple):
    """Words start to end - 1 of a sentence, counted from 0, and what they are."""

    type: str
    start: int
    end: int


class Letters(NamedTuple):
    """What a scheme calls the first word of several, those within, the last, and a word that is alone."""

    first: str
    inside: str
    last: str
    alone: str


_LETTERS: dict[TagScheme, Letters] = {
    "bio": Letters("B", "I", "I", "B"),
    "iob1": Letters("I", "I", "I", "I"),
    "bioes": Letters("B", "I", "E", "S"),
    "bmes": Letters("B", "M", "E", "S"),
}


def decode_tags(tags: Sequence[str], scheme: TagScheme = "bio", *, strict: bool = False) -> list[Entity]:
    """The entities of a sentence, in order.

    Every tag but O belongs to one. A new one begins at B and S, after O, E and S, and where the type changes. So
    orphans such as I-PER after O are entities, as conlleval and seqeval's default mode count them. With `strict`, only
    those stay whose tags are what the scheme writes for them: in `bio` B I..., in `bioes` B I... E or S, in `iob1`
    I..., or B I... directly after a tag of the same type.

    Args:
      tags: one for each word.
      scheme: of the tags.
      strict: whether what the scheme cannot write is nothing.

    Raises:
      UserError: a tag that the scheme does not have.

    Source: Tjong Kim Sang and De Meulder 2003, "Introduction to the CoNLL-2003 Shared Task", section 2.4 (entities are
    right if their words and types are).
    """
    letters = letters_of(scheme)
    pairs = [split_tag(tag, scheme, f"tag {index}") for index, tag in enumerate(tags)]
    found: list[Entity] = []
    before = ("O", "")
    for index, (letter, kind) in enumerate(pairs):
        if letter != "O":
            if _begins(before, (letter, kind), letters):
                found.append(Entity(kind, index, index + 1))
            else:
                found[-1] = found[-1]._replace(end=index + 1)
        before = (letter, kind)
    if not strict:
        return found
    return [entity for entity in found if _well_formed(entity, pairs, scheme)]


def encode_tags(entities: Iterable[Entity], length: int, scheme: TagScheme = "bio") -> list[str]:
    """The tags of a sentence of `length` words with these entities, in any order.

    Raises:
      UserError: an entity that is empty, beyond the sentence, or overlaps another.

    Source: as for the module.
    """
    letters = letters_of(scheme)
    tags = ["O"] * length
    reached, kind = 0, None
    for entity in sorted(entities, key=lambda e: (e.start, e.end)):
        if not reached <= entity.start < entity.end <= length:
            raise UserError(
                f"{entity} in a sentence of {length} words is empty, beyond its ends or overlaps another; accepted: "
                "stretches of words apart from one another."
            )
        inside = [*[letters.inside] * (entity.end - entity.start - 2), letters.last]
        first = letters.alone if entity.end - entity.start == 1 else letters.first
        if scheme == "iob1" and kind == entity.type and reached == entity.start:
            first = "B"
        for index, letter in zip(range(entity.start, entity.end), [first, *inside], strict=False):
            tags[index] = f"{letter}-{entity.type}" if entity.type else letter
        reached, kind = entity.end, entity.type
    return tags


def check_tags(sentences: Iterable[Sequence[str]], scheme: TagScheme = "bio") -> None:
    """Refuses tags that are not exactly what the scheme writes.

    Raises:
      UserError: the first such tag; it names the sentence and the position in it, both counted from 0.
    """
    letters = letters_of(scheme)
    for number, tags in enumerate(sentences):
        before = ("O", "")
        for index, tag in enumerate([*tags, "O"]):
            where = f"sentence {number}, position {index}"
            current = ("O", "") if index == len(tags) else split_tag(tag, scheme, where)
            if not _may_follow(before, current, letters, scheme):
                after = f"after {tags[index - 1]}" if index else "at the beginning"
                shown = tag if index < len(tags) else "the end"
                raise UserError(f"{where}: {shown} {after}; accepted: the scheme {scheme}, {_RULE[scheme]}.")
            before = current


_RULE: dict[TagScheme, str] = {
    "bio": "every entity begins with B-",
    "iob1": "B- only for an entity directly after one of the same type",
    "bioes": "B- to E- for several words, S- for one",
    "bmes": "B- to E- for several words, S- for one",
}


def scheme_tags(kind: str, scheme: TagScheme = "bio") -> list[str]:
    """The tags that a scheme has for a type of entity, each once: B-X, I-X."""
    letters = dict.fromkeys(("B", *letters_of(scheme)))
    return [f"{letter}-{kind}" if kind else letter for letter in letters]


def letters_of(scheme: TagScheme) -> Letters:
    """The letters of a scheme. UserError if there is none of this name."""
    if scheme not in _LETTERS:
        raise UserError(f"scheme is {scheme!r}; accepted: {', '.join(_LETTERS)}.")
    return _LETTERS[scheme]


def split_tag(tag: str, scheme: TagScheme, where: str) -> tuple[str, str]:
    """Letter and type of a tag. UserError, naming `where`, if the scheme has no such tag."""
    letter, hyphen, kind = tag.partition("-")
    known = {"B", "O", *letters_of(scheme)} - ({"O"} if hyphen else set())
    if letter not in known or (hyphen and not kind):
        raise UserError(f"{where}: {tag!r} is no tag of the scheme {scheme}; accepted: O, {_shown(scheme)}.")
    return letter, kind


def _shown(scheme: TagScheme) -> str:
    return ", ".join(f"{letter}-TYPE" for letter in sorted({"B", *letters_of(scheme)}))


def _begins(before: tuple[str, str], current: tuple[str, str], letters: Letters) -> bool:
    """Whether an entity begins at `current`, which is not O."""
    return current[0] in "BS" or before[0] in "OES" or before[1] != current[1]


def _well_formed(entity: Entity, pairs: Sequence[tuple[str, str]], scheme: TagScheme) -> bool:
    """Whether the scheme writes these letters for this entity in this place."""
    letters = letters_of(scheme)
    written = [letter for letter, _ in pairs[entity.start : entity.end]]
    inner = len(written) - 2
    expected = [letters.alone] if inner < 0 else [letters.first, *[letters.inside] * inner, letters.last]
    if scheme == "iob1" and entity.start:
        letter, kind = pairs[entity.start - 1]
        expected[0] = "B" if letter != "O" and kind == entity.type else "I"
    return written == expected


def _may_follow(before: tuple[str, str], current: tuple[str, str], letters: Letters, scheme: TagScheme) -> bool:
    """Whether the scheme ever writes `current` directly after `before`."""
    same = before[0] != "O" and before[1] == current[1]
    if scheme == "iob1":
        return current[0] != "B" or same
    if scheme == "bio":
        return current[0] != "I" or same
    is_open = before[0] in (letters.first, letters.inside)
    if current[0] in (letters.inside, letters.last):
        return is_open and same
    return not is_open
