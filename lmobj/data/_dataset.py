"""A prepared data set: one source or a mixture of several, their tokenizer, and rows over them for any RowSpec."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import LABEL_FIELDS, RowSpec, Vocabulary
from lmobj.data._document_rows import DocumentRows, RowSource
from lmobj.data._epochs import Epochs
from lmobj.data._label_sets import LabelSets
from lmobj.data._mixture import PERIOD, InOrder, Mixture
from lmobj.data._plan import ExamplesPlan
from lmobj.data._prepared import SPLITS, Prepared
from lmobj.data._rows import HostBatch, Indices, Rows
from lmobj.data._shards import TokenStore
from lmobj.data._stream_plan import STREAM_LAYOUTS
from lmobj.data._task_source_config import TASK_SOURCES
from lmobj.data._tokenizer import Tokenizer
from lmobj.errors import UserError

__all__ = ["SPLITS", "Dataset"]

_FIELDS = ("word_starts", "sentence_ends", "token_bytes", *LABEL_FIELDS)
_LABEL_KINDS = {"labels": "class", "scores": "number", "label_sets": "classes"}
"""The `label_kind` of each."""


class Dataset:
    """Opens folders that `prepare` wrote. Raises UserError naming what is damaged.

    Args:
      folders: one prepared folder, or those of a mixture by the names of their sources, all with one tokenizer.
      weights: share of each source in the training rows, relative to the others; equal if absent.
      held_out: prepared folders of splits that have documents of their own, which are the training split there.

    Sources are numbered in the order of their names. One source is a mixture of one.
    """

    def __init__(
        self,
        folders: Path | Mapping[str, Path],
        weights: Mapping[str, float] | None = None,
        held_out: Mapping[str, Path] | None = None,
    ):
        named = folders if isinstance(folders, Mapping) else {"": folders}
        self._sources = {name: Prepared(named[name]) for name in sorted(named)}
        self._weights = {name: 1.0 if weights is None else float(weights[name]) for name in self._sources}
        self._first = next(iter(self._sources.values()))
        self._held_out = {split: Prepared(folder) for split, folder in (held_out or {}).items()}
        for split, held in self._held_out.items():
            if unknown := sorted(set(held.classes) - set(self._first.classes)):
                raise UserError(
                    f"data.{split} has the label {unknown[0]!r}, which no document of data.source has; accepted: "
                    f"{', '.join(self._first.classes) or 'documents without labels'}."
                )

    @property
    def fingerprint(self) -> str:
        """Digest of the inputs' content, the settings and the tokenizer, of a mixture the names and weights, and of
        what is held out apart: equal fingerprints, equal batches."""
        if len(self._sources) == 1 and not self._held_out:
            return self._first.fingerprint
        parts: list[list[Any]] = [
            [name, self._weights[name], source.fingerprint] for name, source in self._sources.items()
        ]
        parts += [[split, held.fingerprint] for split, held in self._held_out.items()]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of this data."""
        return self._first.tokenizer

    @property
    def vocab(self) -> Vocabulary:
        """Size of the vocabulary and its special ids."""
        return self.tokenizer.vocabulary

    @property
    def classes(self) -> list[str]:
        """Names of the classes of labelled data, of all sources together; empty where there are none."""
        return self.classes_of(None)

    def classes_of(self, source: str | None) -> list[str]:
        """Names of the classes by their ids, for rows of one source (`RowSpec.source`), or None: of all together."""
        asked = [each for name, each in self._sources.items() if source in (None, name)]
        return sorted({name for each in asked for name in each.classes})

    def summary(self) -> dict[str, Any]:
        """In JSON: `fingerprint`, `vocab_size`, and of all sources together

        - `skipped`: input files or rows that could not be read
        - `splits`: in each the documents, tokens and bytes of text
        - `cleaning`: per step the documents changed and dropped, and the bytes removed; under `tokenizer` those
          that a loaded model normalises to nothing
        - `augmented`: of the training documents the copies with another wording, by what made them, if any
        - `classes`: names of the classes, where documents are labelled with them

        and under `sources` the same of each source by its name (that of a single one is empty), with its `weight`.
        """
        sources = {name: {"weight": self._weights[name], **source.summary()} for name, source in self._sources.items()}
        every = list(sources.values())
        steps = dict.fromkeys(step for source in every for step in source["cleaning"])
        summary = {
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab.size,
            "skipped": sum(source["skipped"] for source in every),
            "splits": {split: _added(source["splits"][split] for source in every) for split in SPLITS}
            | {split: held.summary()["splits"]["train"] for split, held in self._held_out.items()},
            "cleaning": {step: _added(source["cleaning"].get(step, {}) for source in every) for step in steps},
            "sources": sources,
        }
        if augmented := [source["augmented"] for source in every if "augmented" in source]:
            summary["augmented"] = _added(augmented)
        return summary | {"classes": self.classes} if self.classes else summary

    def documents(self, split: str = "train") -> Iterator[NDArray[np.int32]]:
        """Token ids of every document of a split, source after source in the stored order, without special tokens."""
        for name in self._sources:
            yield from self._prepared(name, split)[1].documents()

    def rows(self, spec: RowSpec, *, split: str = "train", seed: int = 0, batch_size: int) -> Rows:
        """Rows of a split: random access to rows and batches, and their number.

        The training split repeats in epochs, each in its own order; in a mixture every source has its own epochs, and
        its rows come evenly spread in proportion to its weight (`lmobj.data._mixture`; of streams a batch has at least
        one of each source). Other splits are read once, source after source in the stored order; their last batch is
        filled with empty rows (segment 0).

        Raises:
          UserError: an empty split, a batch size below 1, a length with no room for text, labels that the data does
            not have, (pairs) no document with two sentences or none to pair it with, or (streams) fewer rows in a batch
            than sources, an odd number of them to be read in both directions, or no room for the two texts of a row.
        """
        self._check(spec, batch_size)
        once = split != "train"
        if spec.source not in (None, *self._sources):
            raise UserError(
                f"RowSpec.source is {spec.source!r}; accepted: a source of the data, "
                f"{', '.join(filter(None, self._sources)) or 'which has a single one, so null'}."
            )
        names = [name for name in self._names(spec) if len(self._prepared(name, split)[1].lengths) > 0]
        if not names:
            raise UserError(
                f"the {split} split holds no documents; accepted: a larger data.{split} share, or more documents."
            )
        streams = spec.layout in STREAM_LAYOUTS and not once
        if streams and batch_size < len(names):
            raise UserError(
                f"train.batch_size is {batch_size}, but data.source.sources has {len(names)} sources "
                f"({', '.join(names)}), and the objective reads streams that stay with one source each; accepted: "
                f"{len(names)} rows or more, or fewer sources."
            )
        order = Mixture.of([self._weights[name] for name in names], batch_size if streams else PERIOD)
        sources = [
            self._row_source(name, spec, split, seed, int(count) if streams else batch_size)
            for name, count in zip(names, order.counts, strict=True)
        ]
        in_order = InOrder([source.epochs.per_epoch for source in sources])
        return DocumentRows(sources, in_order if once else order, self.tokenizer, spec, batch_size=batch_size)

    def reference(self, spec: RowSpec, split: str) -> NDArray:
        """What answers are compared with: the label of every document of a split that rows of `spec` read, [N] or of
        sets of classes [N, C]."""
        found = [self._labels(name, spec, split) for name in self._names(spec)]
        return np.concatenate([labels[np.arange(len(labels))] for labels in found if labels is not None])

    def notes(self, spec: RowSpec, split: str) -> tuple[str, ...]:
        """What the person should know of the rows of a split: how many texts are cut, where both texts of a document
        have lengths of their own."""
        if not spec.second_length:
            return ()
        stores = [self._prepared(name, split)[1] for name in self._names(spec)]
        cut = np.sum([ExamplesPlan(store.lengths, store.pair_starts, spec).cut() for store in stores], axis=0)
        documents = sum(len(store.lengths) for store in stores)
        told = (
            ("sources", spec.length - spec.second_length, "data.length", cut[0]),
            ("targets", spec.second_length, "objective.target_length", cut[1]),
        )
        return tuple(
            f"{split}: {what} that are cut to {length} tokens, their end included ({key}): {count:,} of {documents:,}."
            for what, length, key, count in told
            if count
        )

    def pairs(self, spec: RowSpec, split: str) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """Both texts of every document of a split that rows of `spec` read, whole, as token ids; in the order in which
        a split is read once."""
        for name in self._names(spec):
            store = self._prepared(name, split)[1]
            assert store.pair_starts is not None
            for document, border in zip(store.documents(), store.pair_starts, strict=True):
                yield document[:border], document[border:]

    def batches(
        self,
        spec: RowSpec,
        *,
        split: str = "train",
        seed: int = 0,
        batch_size: int,
        start: int = 0,
        steps: int | None = None,
        local: Indices | None = None,
    ) -> Iterator[HostBatch]:
        """Batches of steps start, start + 1, ..., read ahead by threads.

        Args:
          spec: the rows an objective reads.
          split: train repeats forever; validation and test end after every row was read once.
          seed: of the order of documents and rows.
          batch_size: rows of the global batch, B.
          start: first step. Nothing before it is read.
          steps: number of batches; by default no end (train) or to the end of the split.
          local: places in the batch, each in [0, B), whose rows this process reads; by default all.

        Raises:
          UserError: as `rows`.
        """
        return self.rows(spec, split=split, seed=seed, batch_size=batch_size).batches(start, steps, local)

    def _check(self, spec: RowSpec, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; accepted: 1 or more rows.")
        if wanted := TASK_SOURCES.get(spec.layout):
            raise UserError(
                f"the objective reads {wanted.holds}, and the data of data.source has texts; accepted: "
                f"data.source.name={wanted.name}, or an objective for texts."
            )
        for name in spec.fields:
            if name not in _FIELDS:
                raise UserError(f"RowSpec.fields has {name!r}; accepted: {', '.join(_FIELDS)}.")
            if name in LABEL_FIELDS and spec.layout != "examples":
                raise UserError(
                    f"RowSpec.fields has {name!r}, but the layout is {spec.layout!r}; accepted: the layout 'examples'."
                )

    def _names(self, spec: RowSpec) -> list[str]:
        """The sources that rows come from."""
        return list(self._sources) if spec.source is None else [spec.source]

    def _prepared(self, name: str, split: str) -> tuple[Prepared, TokenStore]:
        """Where the documents of a source's split lie: its folder, and they themselves in it."""
        if split in self._held_out:
            return self._held_out[split], self._held_out[split].store("train")
        return self._sources[name], self._sources[name].store(split)

    def _row_source(self, name: str, spec: RowSpec, split: str, seed: int, streams: int) -> RowSource:
        source, store = self._prepared(name, split)
        if spec.two_texts and store.pair_starts is None:
            raise UserError(
                f"the objective reads pairs of texts, and the documents of {_key(name)} are single texts; accepted: a "
                f"source of records with {_key(name)}.pair: COLUMN."
            )
        try:
            epochs = Epochs(
                store, spec, fingerprint=source.fingerprint, seed=seed, streams=streams, once=split != "train"
            )
        except UserError as error:
            if not name:
                raise
            raise UserError(f"{_key(name)}: {error}") from error
        return RowSource(list(self._sources).index(name), epochs, self._labels(name, spec, split))

    def _labels(self, name: str, spec: RowSpec, split: str) -> NDArray | LabelSets | None:
        """The labels that `spec` asks for. Ids of classes are those of `classes_of` the sources that it reads."""
        source, store = self._prepared(name, split)
        for field, kind in _LABEL_KINDS.items():
            if field not in spec.fields:
                continue
            labels = store.labels
            if labels is None or source.label_kind != kind:
                raise UserError(
                    f"the objective reads {field} of its examples, which the data of {_key(name)} do not have; "
                    f"accepted: a source of records with {_key(name)}.label: COLUMN and .label_kind: "
                    f"{kind}."
                )
            classes = self.classes_of(spec.source)
            if field == "label_sets":
                return LabelSets(labels, source.label_names, classes)
            ids = np.array([classes.index(own) for own in source.classes], np.int32)
            return ids[labels] if field == "labels" else labels
        return None


def _key(name: str) -> str:
    return f"data.source.sources.{name}.source" if name else "data.source"


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of several sources together."""
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(total)
