"""Rows cut out of token shards: the fragments of each, and the tokens they point to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import LABEL_FIELDS, RowSpec, row_arrays
from lmobj.data._epochs import Epochs
from lmobj.data._label_sets import LabelSets
from lmobj.data._mixture import InOrder, Mixture
from lmobj.data._plan import Fragments, Ints, ragged
from lmobj.data._rows import HostBatch, Rows, row_number
from lmobj.data._tokenizer import Tokenizer

__all__ = ["DocumentRows", "RowSource"]


@dataclass(frozen=True)
class RowSource:
    """One source of a batch's rows."""

    number: int
    """The source id in `row_ids`."""
    epochs: Epochs
    """Its rows."""
    labels: NDArray | LabelSets | None = None
    """The label of each document by its number, where the RowSpec asks for it."""


class DocumentRows(Rows):
    """The rows of one split under one RowSpec. See `Dataset.rows`.

    A row belongs to a source and has a number within it: in the training split by the table of the mixture, in the
    others source after source.
    """

    def __init__(
        self,
        sources: Sequence[RowSource],
        order: Mixture | InOrder,
        tokenizer: Tokenizer,
        spec: RowSpec,
        *,
        batch_size: int,
    ):
        """order: which row of which of `sources` stands in each place."""
        per_epoch = sum(source.epochs.per_epoch for source in sources)  # of a mixture, in one of each source
        super().__init__(spec, per_epoch, batch_size=batch_size, once=isinstance(order, InOrder))
        self._sources = sources
        self._order = order
        self._tokenizer = tokenizer

    def _assemble(self, rows: Ints) -> HostBatch:
        source, number = self._order.locate(rows)
        backward = np.zeros(len(rows), np.bool_)
        found: list[tuple[RowSource, Fragments]] = []
        for index in np.unique(source).tolist():
            here = np.flatnonzero(source == index)
            at = self._sources[index].epochs.lookup(number[here])
            found.append((self._sources[index], at._replace(row=here[at.row])))
            backward[here] = self._sources[index].epochs.backward(number[here])
        at = Fragments.joined([part for _, part in found])
        spec, shape = self.spec, (len(rows), self.spec.length)
        tokens = np.full(shape, self._tokenizer.vocabulary.pad, np.int32)
        segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        first, way = _first_places(at, backward, spec.length)
        text = first + way * at.head_count
        tokens.reshape(-1)[_spread(text, at.length, way)] = np.concatenate(
            [source.epochs.store.gather(part.document, part.offset, part.length) for source, part in found]
        )
        _put_specials(tokens, spec.prefix, first, at.head_from, at.head_count, way)
        _put_specials(tokens, spec.suffix, text + way * at.length, at.tail_from, at.tail_count, way)
        fragment, nth = ragged(at.head_count + at.length + at.tail_count)
        where = (at.row * spec.length + at.column)[fragment] + nth
        segments.reshape(-1)[where] = at.segment[fragment]
        positions.reshape(-1)[where] = at.position[fragment] + nth
        ids = np.array([source.number for source in self._sources])
        row_ids = np.stack([ids[source], row_number(number)], axis=1).astype(np.int32)
        batch: HostBatch = {"tokens": tokens, "segment_ids": segments, "positions": positions, "row_ids": row_ids}
        if spec.layout in ("pairs", "examples", "stream_pairs"):
            token_types = np.zeros(shape, np.int32)
            token_types.reshape(-1)[where] = at.token_type[fragment]
            batch["token_types"] = token_types
        if spec.layout in ("pairs", "stream_pairs"):
            batch["pair_labels"] = np.zeros(len(rows), np.int32)
            batch["pair_labels"][at.row] = at.pair_label
        if spec.bidirectional:
            batch["backward"] = backward
        if "word_starts" in spec.fields:
            batch["word_starts"] = self._word_starts(tokens, segments, found, backward)
        if "sentence_ends" in spec.fields:
            batch["sentence_ends"] = self._sentence_ends(shape, found, backward)
        if "token_bytes" in spec.fields:
            batch["token_bytes"] = np.where(segments > 0, self._tokenizer.piece_bytes[tokens], 0).astype(np.int32)
        for name in LABEL_FIELDS:
            if name in spec.fields:
                label = row_arrays(spec)[name]
                batch[name] = _labels(np.zeros((len(rows), *label.shape), label.dtype), found)
        return batch

    def _word_starts(
        self,
        tokens: NDArray[np.int32],
        segments: NDArray[np.int32],
        found: list[tuple[RowSource, Fragments]],
        backward: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """By the tokenizer's rule, but for text whose words were found when it was prepared. The first token of such a
        fragment begins a word too: it comes after a special token, or is the first of its segment.

        Rows that read their text backwards say the same of their tokens: which begin a word of the text.
        """
        starts = self._tokenizer.word_starts(_turned(tokens, backward), _turned(segments, backward))
        starts = _turned(starts, backward)
        for source, at in found:
            store = source.epochs.store
            if store.has_word_starts:
                first, way = _first_places(at, backward, self.spec.length)
                text = first + way * at.head_count
                flat = starts.reshape(-1)
                flat[_spread(text, at.length, way)] = store.word_starts(at.document, at.offset, at.length)
                flat[text[at.length > 0]] = True
        return starts

    def _sentence_ends(
        self, shape: tuple[int, int], found: list[tuple[RowSource, Fragments]], backward: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """As they were found when the text was prepared. The end of a row that cuts a sentence is none."""
        ends = np.zeros(shape, np.bool_)
        for source, at in found:
            fragment, place = source.epochs.sentences.inside(at.document, at.offset, at.length)
            first, way = _first_places(at, backward, self.spec.length)
            ends.reshape(-1)[(first + way * (at.head_count))[fragment] + way[fragment] * place] = True
        return ends


def _labels(values: NDArray, found: list[tuple[RowSource, Fragments]]) -> NDArray:
    """The label of each row's document written into `values`, rows first; empty rows keep theirs."""
    for source, at in found:
        assert source.labels is not None
        values[at.row] = source.labels[at.document]
    return values


def _turned(values: NDArray, backward: NDArray[np.bool_]) -> NDArray:
    """[B, L] values with the columns of backward rows in the reverse order."""
    return np.where(backward[:, None], values[:, ::-1], values)


def _first_places(at: Fragments, backward: NDArray[np.bool_], length: int) -> tuple[Ints, Ints]:
    """The place of each fragment's first token in the flat batch, and the step to the next: -1 in backward rows, which
    have the first token of the text last."""
    begin, size = at.row * length + at.column, at.head_count + at.length + at.tail_count
    return np.where(backward[at.row], begin + size - 1, begin), np.where(backward[at.row], -1, 1)


def _spread(begin: Ints, count: Ints, step: Ints) -> Ints:
    """The indices begin, begin + step, ... of every run, end to end."""
    run, nth = ragged(count)
    return begin[run] + step[run] * nth


def _put_specials(
    tokens: NDArray[np.int32], special: tuple[int, ...], begin: Ints, start: Ints, count: Ints, step: Ints
) -> None:
    """Writes special[start : start + count] from each `begin` of the flat tokens on, in steps of `step`."""
    if special:
        run, nth = ragged(count)
        tokens.reshape(-1)[begin[run] + step[run] * nth] = np.array(special, np.int32)[start[run] + nth]
