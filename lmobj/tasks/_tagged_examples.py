"""Sentences of tagged words as rows: [CLS] subwords [SEP], with the tags of the subwords that have one."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmobj.batch import NO_TAG, RowSpec
from lmobj.data import ConllFiles, TaggedSubwords, TagScheme, Tokenizer
from lmobj.errors import UserError
from lmobj.tasks._example_dataset import ExampleRows, Kind
from lmobj.tasks._tag_alignment import align_tags, encode_words, tag_ids, word_tags
from lmobj.tasks._tag_schemes import check_tags, scheme_tags, split_tag
from lmobj.tasks._tagged import TaggedSentence, read_conll, read_tagged_lines

__all__ = ["TagReference", "TaggedExamples"]


@dataclass(frozen=True)
class TagReference:
    """What the tags of the rows' tokens are compared with: a sentence for each row."""

    sentences: tuple[TaggedSentence, ...]
    word_ids: NDArray[np.int32]
    """[N, L] the word of each token; -1 where there is none."""
    names: tuple[str, ...]
    """Of the tags, by their ids."""
    scheme: TagScheme
    subwords: TaggedSubwords

    def word_tags(self, ids: ArrayLike) -> list[list[str]]:
        """The tags of the words of the first n sentences, from the ids of their tokens' tags [n, L].

        A word whose tokens were cut off is O.
        """
        found = []
        for row, sentence, words in zip(np.asarray(ids), self.sentences, self.word_ids, strict=False):
            tags = [self.names[index] for index in row]
            found.append(word_tags(tags, words, len(sentence.words), self.scheme, subwords=self.subwords))
        return found


@dataclass(frozen=True)
class TaggedExamples(Kind[TaggedSentence]):
    """Of `ConllFiles`."""

    source: ConllFiles
    fields: ClassVar[tuple[str, ...]] = ("tags",)

    def read(self, file: str) -> Iterator[TaggedSentence | None]:
        """The sentences; those whose tags break the scheme are refused or left out."""
        for sentence in self._sentences(file):
            try:
                check_tags([sentence.tags], self.source.scheme)
            except UserError as error:
                if self.source.errors == "strict":
                    raise UserError(
                        f"data.source: the sentence at {file}:{sentence.line} breaks its scheme ({error}) To leave out "
                        "such sentences: data.source.errors=skip."
                    ) from None
                yield None
            else:
                yield sentence

    def read_unlabelled(self, file: str) -> Iterator[TaggedSentence]:
        """The sentences, all of whose tags are O, whether the file has tags or not."""
        return self._sentences(file, tagged=False)

    def _sentences(self, file: str, *, tagged: bool = True) -> Iterator[TaggedSentence]:
        source = self.source
        if source.lines == "sentences":
            return read_tagged_lines(file, tagged=tagged)
        return read_conll(
            file,
            word_column=source.word_column,
            tag_column=source.tag_column if tagged else None,
            separator=source.separator,
            comment=source.comment,
        )

    def texts(self, examples: Sequence[TaggedSentence]) -> Iterable[str]:
        """The words, with the source's space between."""
        return [self.source.space.join(sentence.words) for sentence in examples]

    def group(self, example: TaggedSentence) -> str:
        """The sentence."""
        return self.source.space.join(example.words)

    def classes(self, examples: Sequence[TaggedSentence]) -> list[str]:
        """O, and for each type of entity in the training sentences all tags that the scheme has for it, by name."""
        tags = {tag for sentence in examples for tag in sentence.tags}
        types = sorted({split_tag(tag, self.source.scheme, "a tag")[1] for tag in tags if tag != "O"})
        return ["O", *(tag for kind in types for tag in scheme_tags(kind, self.source.scheme))]

    def rows(
        self, examples: Sequence[TaggedSentence], classes: Sequence[str], tokenizer: Tokenizer, spec: RowSpec, key: str
    ) -> ExampleRows:
        """A row for each sentence, cut to fit."""
        room = spec.length - len(spec.prefix) - len(spec.suffix)
        if room < 1:
            raise UserError(
                f"data.length is {spec.length}, which leaves no room for words; accepted: {spec.length - room + 1} or "
                "more."
            )
        shape = (len(examples), spec.length)
        tokens = np.full(shape, tokenizer.vocabulary.pad, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        tags, word_ids = np.full(shape, NO_TAG, np.int32), np.full(shape, -1, np.int32)
        encode = functools.cache(tokenizer.encode)
        first = len(spec.prefix)
        lost = []
        for row, sentence in enumerate(examples):
            every = encode_words(sentence.words, encode, space=self.source.space)
            pieces, words = (part[:room] for part in every)
            lost += [len(np.setdiff1d(every[1][room:], words))] * (len(every[1]) > room)
            size, end = first + len(pieces) + len(spec.suffix), first + len(pieces)
            tokens[row, :size] = [*spec.prefix, *pieces, *spec.suffix]
            segments[row, :size], positions[row, :size] = 1, np.arange(size)
            word_ids[row, first:end] = words
            tags[row, first:end] = self._tags(sentence, words, classes, key)
        arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "tags": tags}
        reference = TagReference(tuple(examples), word_ids, tuple(classes), self.source.scheme, self.source.subwords)
        return ExampleRows(arrays, reference, _notes(lost, len(examples), spec))

    def _tags(
        self, sentence: TaggedSentence, words: NDArray[np.int32], classes: Sequence[str], key: str
    ) -> NDArray[np.int32]:
        try:
            aligned = align_tags(sentence.tags, words, self.source.scheme, subwords=self.source.subwords)
            return tag_ids(aligned, classes, no_label=NO_TAG)
        except UserError as error:
            raise UserError(
                f"{key}: the sentence at line {sentence.line} has a tag that no training sentence calls for ({error})"
            ) from None


def _notes(lost: Sequence[int], sentences: int, spec: RowSpec) -> tuple[str, ...]:
    """Of the sentences that were cut, in each of which some words may be lost."""
    if not lost:
        return ()
    return (
        f"sentences that are longer than a row (data.length is {spec.length}): {len(lost):,} of {sentences:,}; words "
        f"at their ends that are not read and count as O: {sum(lost):,}.",
    )
