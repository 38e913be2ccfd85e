"""Data sets of examples that are more than texts with a label, all in memory: the same face as `lmobj.data.Dataset`.

What kind of examples they are is a `Kind`: how one is read, and what rows a model reads of it. The rest is here:
files, splits, tokenizer, fingerprint, batches.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lmobj.batch import NO_TAG, RowSpec, Vocabulary, row_arrays
from lmobj.data import (
    DataConfig,
    HostBatch,
    Indices,
    InputFile,
    MemoryRows,
    MixtureSource,
    StdlibSource,
    TaskSource,
    Tokenizer,
    find_inputs,
    load_tokenizer,
    train_tokenizer,
)
from lmobj.errors import UserError

__all__ = ["ExampleDataset", "ExampleRows", "Kind"]

E = TypeVar("E")
_FORMAT = 1
"""Raised when the same examples and settings would become other rows."""


class ExampleRows(NamedTuple):
    """The rows of a split."""

    arrays: HostBatch
    """Rows first, with the names of `lmobj.batch` but for `row_ids`."""
    reference: Any
    """What the model's answers are compared with, and what turns outputs of rows into answers."""
    notes: tuple[str, ...] = ()
    """What the person should know of them: what did not fit. Sentences."""


class Kind(abc.ABC, Generic[E]):
    """One kind of examples, in the settings of its source."""

    fields: ClassVar[tuple[str, ...]]
    """What rows can be labelled with."""

    @abc.abstractmethod
    def read(self, file: str) -> Iterator[E | None]:
        """The examples of a file; None for each that `errors: skip` leaves out. Raises UserError naming the place."""

    def read_unlabelled(self, file: str) -> Iterator[E]:
        """The same to be predicted: all examples, whose labels need not be there and are not looked at."""
        raise NotImplementedError(f"{type(self).__name__} has nothing to predict of single examples")

    @abc.abstractmethod
    def texts(self, examples: Sequence[E]) -> Iterable[str]:
        """Their texts, each once, for the tokenizer and to be counted."""

    @abc.abstractmethod
    def group(self, example: E) -> str:
        """What decides its split: examples of one group stay together."""

    @abc.abstractmethod
    def rows(
        self, examples: Sequence[E], classes: Sequence[str], tokenizer: Tokenizer, spec: RowSpec, key: str
    ) -> ExampleRows:
        """The rows of a split, in order. `key` names its setting in messages."""

    def classes(self, examples: Sequence[E]) -> list[str]:
        """Names of the classes by their ids, from the training examples; none for most kinds."""
        return []


@dataclass(frozen=True)
class ExampleDataset(Generic[E]):
    """Examples of one kind in their splits. `prepare_any` makes one.

    Rows of the training split repeat in epochs, each in its own order; other splits are read once.
    """

    kind: Kind[E]
    source: TaskSource
    splits: dict[str, list[E]]
    keys: dict[str, str]
    """The setting that each split comes from, for messages."""
    skipped: int
    """Examples left out because of what `errors: skip` passes over."""
    tokenizer: Tokenizer
    fingerprint: str
    """Digest of the inputs' content, the settings and the tokenizer: equal fingerprints, equal batches."""

    @property
    def vocab(self) -> Vocabulary:
        """Size of the vocabulary and its special ids."""
        return self.tokenizer.vocabulary

    @functools.cached_property
    def classes(self) -> list[str]:
        """Names of the classes by their ids; empty where there are none."""
        return self.kind.classes(self.splits["train"])

    def classes_of(self, source: str | None) -> list[str]:
        """The same; there is a single source, None."""
        return self.classes

    def summary(self) -> dict[str, Any]:
        """As `lmobj.data.Dataset.summary`; documents are examples, and tokens and bytes those of each text once."""
        counts = {split: self._count(split) for split in self.splits}
        summary = {"skipped": self.skipped, "splits": counts, "cleaning": {}}
        if self.classes:
            summary["classes"] = self.classes
        single = {"": {"weight": 1.0, **summary}}
        return {"fingerprint": self.fingerprint, "vocab_size": self.vocab.size, **summary, "sources": single}

    def documents(self, split: str = "train") -> Iterator[NDArray[np.int32]]:
        """Token ids of every text of a split, without special tokens."""
        return iter(self._documents(split))

    def rows(self, spec: RowSpec, *, split: str = "train", seed: int = 0, batch_size: int) -> MemoryRows:
        """Rows of a split: random access to rows and batches, and their number.

        Raises:
          UserError: an empty split, a batch size below 1, rows of another kind, or a length without room for them.
        """
        if batch_size < 1:
            raise UserError(f"the batch size is {batch_size}; accepted: 1 or more rows.")
        return MemoryRows(
            self._built(spec, split).arrays,
            spec,
            batch_size=batch_size,
            once=split != "train",
            fingerprint=self.fingerprint,
            seed=seed,
            empty=_empty_row(spec, self.vocab),
        )

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
        """Batches of steps start, start + 1, ...; see `lmobj.data.Dataset.batches`."""
        return self.rows(spec, split=split, seed=seed, batch_size=batch_size).batches(start, steps, local)

    def reference(self, spec: RowSpec, split: str) -> Any:
        """What the answers of a split are compared with; its rows are in the order of `rows`."""
        return self._built(spec, split).reference

    def notes(self, spec: RowSpec, split: str) -> tuple[str, ...]:
        """What the person should know of the rows of a split: what did not fit. Sentences that name the split."""
        return tuple(f"{split}: {note}" for note in self._built(spec, split).notes)

    @functools.cached_property
    def _built(self) -> Callable[[RowSpec, str], ExampleRows]:
        return functools.cache(self._build)

    def _build(self, spec: RowSpec, split: str) -> ExampleRows:
        if spec.layout != self.source.layout or not set(spec.fields) <= set(self.kind.fields):
            raise UserError(
                f"the objective reads rows of the layout {spec.layout!r}"
                f"{' with ' + ', '.join(spec.fields) if spec.fields else ''}, and data.source.name is "
                f"{self.source.name!r}, which has {self.source.holds}; accepted: an objective for them, or another "
                "source."
            )
        if spec.source is not None:
            raise UserError(f"RowSpec.source is {spec.source!r}; accepted: null, as the data has a single source.")
        if split not in self.splits:
            raise UserError(f"the split is {split!r}; accepted: {', '.join(self.splits)}.")
        if not self.splits[split]:
            raise UserError(
                f"the {split} split holds no examples; accepted: a larger data.{split} share, or more examples."
            )
        return self.kind.rows(self.splits[split], self.classes, self.tokenizer, spec, self.keys[split])

    @functools.cached_property
    def _documents(self) -> Callable[[str], list[NDArray[np.int32]]]:
        return functools.cache(lambda split: self.tokenizer.encode_batch(list(self.kind.texts(self.splits[split]))))

    def _count(self, split: str) -> dict[str, int]:
        texts = self.kind.texts(self.splits[split])
        return {
            "documents": len(self.splits[split]),
            "tokens": sum(len(tokens) for tokens in self._documents(split)),
            "bytes": sum(len(text.encode()) for text in texts),
        }


def read_examples(config: DataConfig, kind: Kind[E], source: TaskSource) -> ExampleDataset[E]:
    """Reads the examples of `config.source`, and puts each in its split.

    Raises:
      UserError: a file that cannot be read or is not of this kind, no training examples, or cleaning, which would move
        what labels point to.
    """
    _check_untouched(config)
    splits: dict[str, list[E]] = {"train": [], "validation": [], "test": []}
    keys = dict.fromkeys(splits, "data.source")
    inputs = {"train": _inputs(config.source, "data.source")}
    found, skipped = _read(kind, inputs["train"])
    for example in found:
        splits[config.shares.split(kind.group(example))].append(example)
    for split, held_out in config.held_out.items():
        inputs[split], keys[split] = _inputs(held_out, f"data.{split}"), f"data.{split}"
        splits[split], more = _read(kind, inputs[split])
        skipped += more
    if not splits["train"]:
        raise UserError(
            f"data.source has no training examples, of {len(found)} examples in all and {skipped} left out; accepted: "
            "more examples, or smaller data.validation and data.test."
        )
    if config.shares.validation > 0 and not splits["validation"]:
        raise UserError(
            f"data.validation is {config.validation}, but none of the {len(found)} examples fell into that share; "
            "accepted: more examples, a larger share, files of its own, 0."
        )
    tokenizer = _tokenizer(config, list(kind.texts(splits["train"])))
    identity = {
        "format": _FORMAT,
        "source": {name: value for name, value in dataclasses.asdict(source).items() if name != "files"},
        "inputs": {split: [file.digest for file in files] for split, files in inputs.items()},
        "shares": list(config.shares),
        "tokenizer": tokenizer.fingerprint,
    }
    fingerprint = hashlib.blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()
    return ExampleDataset(kind, source, splits, keys, skipped, tokenizer, fingerprint)


def _check_untouched(config: DataConfig) -> None:
    fresh = DataConfig()
    for name in ("clean", "segment", "augment"):
        if getattr(config, name) != getattr(fresh, name):
            raise UserError(
                f"data.{name} changes or divides texts, and data.source.name is {config.source.name!r}, whose labels "
                f"belong to places in them; accepted: no data.{name}."
            )


def _inputs(source: Any, key: str) -> list[InputFile]:
    assert not isinstance(source, MixtureSource | StdlibSource)
    return find_inputs(f"{key}.files", source.files, workers=2)


def _read(kind: Kind[E], files: Sequence[InputFile]) -> tuple[list[E], int]:
    """The examples, and how many were left out."""
    every = [example for file in files for example in kind.read(file.name)]
    found = [example for example in every if example is not None]
    return found, len(every) - len(found)


def _tokenizer(config: DataConfig, texts: Sequence[str]) -> Tokenizer:
    """The tokenizer that is loaded, or trained on an even share of the training texts."""
    if config.tokenizer.path is not None:
        return load_tokenizer(config)
    size = sum(len(text.encode()) for text in texts)
    every = -(-size // config.tokenizer.sample_bytes)
    return train_tokenizer(config.tokenizer, texts[:: max(1, every)])


def _empty_row(spec: RowSpec, vocab: Vocabulary) -> HostBatch:
    """A row that stands for none, of each array."""
    row = {name: np.zeros(array.shape, array.dtype) for name, array in row_arrays(spec).items() if name != "row_ids"}
    row["tokens"] += vocab.pad
    if "tags" in row:
        row["tags"] += NO_TAG
    return row
