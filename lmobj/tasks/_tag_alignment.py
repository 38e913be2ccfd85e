"""Tags of words laid over the subwords that a model reads, and back.

Source: Devlin et al. 2019, section 5.3 (the first subword of a word stands for it). That all subwords have tags is the
usual other way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.data import TaggedSubwords, TagScheme
from lmobj.errors import UserError
from lmobj.tasks._tag_schemes import Letters, letters_of, split_tag

__all__ = ["align_tags", "encode_words", "tag_ids", "word_tags"]


def encode_words(
    words: Sequence[str], encode: Callable[[str], ArrayLike], *, space: str = " "
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token ids [N] of a sentence given as words, and [N] the number of each token's word.

    Args:
      words: of the sentence.
      encode: text -> token ids, such as `Tokenizer.encode`; called for each word.
      space: stands before every word but the first; "" where the language writes none.
    """
    pieces = [np.asarray(encode(space * (index > 0) + word), np.int32) for index, word in enumerate(words)]
    numbers = np.repeat(np.arange(len(words), dtype=np.int32), [len(piece) for piece in pieces])
    return np.concatenate([np.zeros(0, np.int32), *pieces]), numbers


def align_tags(
    tags: Sequence[str], word_ids: ArrayLike, scheme: TagScheme = "bio", *, subwords: TaggedSubwords = "first"
) -> list[str | None]:
    """The tag of each subword; None where it has none.

    `first`: a word's first subword has its tag, the others have none. `all`: the others go on with what it began, so
    that the subwords are tagged as the scheme would tag them if they were words: B becomes B I I, S becomes B I E, E
    becomes I I E, and in `iob1` B becomes B I I.

    Args:
      tags: [W] of the words.
      word_ids: [N] the word of each subword, in order; -1 for special tokens.
      scheme: of the tags.
      subwords: which have tags.

    Raises:
      UserError: a word without a tag, or a tag that the scheme does not have.
    """
    numbers = _checked(word_ids, len(tags))
    letters = letters_of(scheme)
    first, last = _edges(numbers)
    aligned: list[str | None] = []
    for number, opens, closes in zip(numbers.tolist(), first, last, strict=True):
        if number < 0 or (subwords == "first" and not opens):
            aligned.append(None)
        elif subwords == "first":
            aligned.append(tags[number])
        else:
            aligned.append(_part(tags[number], opens, closes, letters, scheme, number))
    return aligned


def word_tags(
    tags: Sequence[str | None],
    word_ids: ArrayLike,
    count: int,
    scheme: TagScheme = "bio",
    *,
    subwords: TaggedSubwords = "first",
) -> list[str]:
    """The tags of words from those of their subwords: what `align_tags` did, undone.

    `first`: the tag of the first subword. `all`: its type, and the letter that its first and last subword call for
    together (B and E make S); where the last has another type, that of the first alone. A word without any subword, as
    one that was cut off, is O.

    Args:
      tags: [N] of the subwords; only those that are looked at must be there.
      word_ids: [N] as for `align_tags`.
      count: W, words of the sentence.
      scheme: of the tags.
      subwords: which have tags.

    Raises:
      UserError: a number of tags other than N, or a tag that the scheme does not have.
    """
    numbers = _checked(word_ids, count)
    if len(tags) != len(numbers):
        raise UserError(f"there are {len(tags)} tags for {len(numbers)} subwords; accepted: as many.")
    letters = letters_of(scheme)
    first, last = _edges(numbers)
    found = ["O"] * count
    edges = [np.flatnonzero(each).tolist() for each in (first, last)]
    for number, begin, end in zip(numbers[first].tolist(), *edges, strict=True):
        opening = split_tag(tags[begin] or "", scheme, f"subword {begin}")
        closing = split_tag(tags[end] or "", scheme, f"subword {end}") if subwords == "all" else opening
        found[number] = _whole(opening, closing, letters)
    return found


def tag_ids(tags: Sequence[str | None], names: Sequence[str], *, no_label: int = -100) -> NDArray[np.int32]:
    """[N] the place of each tag among the names; `no_label` for None.

    Raises:
      UserError: a tag that is not among the names.
    """
    places: dict[str | None, int] = {name: index for index, name in enumerate(names)}
    for index, tag in enumerate(tags):
        if tag is not None and tag not in places:
            raise UserError(f"position {index} has the tag {tag!r}; accepted: {', '.join(names)}.")
    return np.array([no_label if tag is None else places[tag] for tag in tags], np.int32)


def _checked(word_ids: ArrayLike, count: int) -> NDArray[np.int64]:
    numbers = np.asarray(word_ids, np.int64).reshape(-1)
    words = numbers[numbers >= 0]
    if len(words) and (words.max() >= count or (np.diff(words) < 0).any()):
        raise UserError(
            f"word_ids reach {words.max()} for {count} words, or go back; accepted: 0 to {count - 1} in order, -1 for "
            "special tokens."
        )
    return numbers


def _edges(numbers: NDArray[np.int64]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """[N] each: the subword is the first of its word; the last."""
    first, last = np.zeros(len(numbers), bool), np.zeros(len(numbers), bool)
    places = np.flatnonzero(numbers >= 0)
    changes = np.diff(numbers[places]) != 0
    first[places] = np.append(True, changes)[: len(places)]
    last[places] = np.append(changes, True)[: len(places)]
    return first, last


def _part(tag: str, opens: bool, closes: bool, letters: Letters, scheme: TagScheme, number: int) -> str:
    """The tag of one subword: the word's first keeps what begins there, its last what ends there."""
    letter, kind = split_tag(tag, scheme, f"word {number}")
    if letter == "O":
        return tag
    if letters.last == letters.inside:  # a scheme that does not mark ends
        part = letter if opens else letters.inside
    else:
        begins, ends = (
            opens and letter in (letters.first, letters.alone),
            closes and letter in (letters.last, letters.alone),
        )
        part = _letter(begins, ends, letters)
    return f"{part}-{kind}" if kind else part


def _whole(opening: tuple[str, str], closing: tuple[str, str], letters: Letters) -> str:
    """The tag of a word from its first and last subword's."""
    letter, kind = opening
    agree = "O" not in (letter, closing[0]) and closing[1] == kind
    if agree and letters.last != letters.inside:
        begins, ends = letter in (letters.first, letters.alone), closing[0] in (letters.last, letters.alone)
        letter = _letter(begins, ends, letters)
    return f"{letter}-{kind}" if kind else letter


def _letter(begins: bool, ends: bool, letters: Letters) -> str:
    if begins:
        return letters.alone if ends else letters.first
    return letters.last if ends else letters.inside
