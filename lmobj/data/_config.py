"""Settings of the data: where the text comes from, how it is cleaned, the tokenizer, and the shares of the splits."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from lmobj._pieces import DENOISER_MARKS, INFILLING_MARKS, SPELLINGS, sentinel
from lmobj.data._augment_config import Augmentation
from lmobj.data._cleaning_config import CleaningConfig, SegmentationConfig
from lmobj.data._fill_in_middle import DocumentFillInMiddle
from lmobj.data._source_config import MixtureSource, SingleSource, StdlibSource, TfdsSource, check_choice
from lmobj.data._task_source_config import TaskSource
from lmobj.errors import UserError

__all__ = ["DataConfig", "HeldOut", "SentencePieceConfig", "Shares", "Source"]

Source = SingleSource | TaskSource | MixtureSource

_DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class SentencePieceConfig:
    """A SentencePiece model, trained on the training split or loaded from `path`."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    vocab_size: int | None = None
    """Pieces, the 7 special ones, the newline and the 256 single bytes included, but not the sentinels and marks below;
    4096 if absent. With `path`: the size of that model, or absent. Of `char`: at most so many."""
    model: Literal["bpe", "unigram", "char"] = "bpe"
    """Kind of model to train. bpe trains ten times faster; unigram finds few whole words in text that puts a space
    before every punctuation mark, as WikiText does; char has a piece for each character, as Chinese BERT."""
    path: str | None = None
    """An existing SentencePiece `.model` file to load instead of training one."""
    character_coverage: float = 0.9995
    """Share of the characters that get a piece of their own, in (0.98, 1]; the rest is spelled in bytes."""
    sample_bytes: int = 32 * 1024 * 1024
    """Train on at most this many bytes of text, taken evenly over the training split; at least 1."""
    sentinels: int = 0
    """Sentinels <extra_id_0>, <extra_id_1>, ... beside the model's pieces, of which the first gets the last id (T5:
    100), 0 or more. A model that has some needs no others."""
    denoiser_marks: bool = False
    """Whether there are [NLU], [S2S] and [NLG] beside the model's pieces (UL2)."""
    infilling_marks: bool = False
    """Whether there are <fim_prefix>, <fim_suffix> and <fim_middle> beside the model's pieces."""

    def __post_init__(self) -> None:
        check_choice("data.tokenizer.model", self.model, ("bpe", "unigram", "char"))
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"data.tokenizer.vocab_size is {self.vocab_size}; accepted: a positive integer.")
        if not 0.98 < self.character_coverage <= 1:
            raise UserError(
                f"data.tokenizer.character_coverage is {self.character_coverage}; accepted: above 0.98, at most 1."
            )
        if self.sample_bytes < 1:
            raise UserError(f"data.tokenizer.sample_bytes is {self.sample_bytes}; accepted: a positive integer.")
        if self.sentinels < 0:
            raise UserError(f"data.tokenizer.sentinels is {self.sentinels}; accepted: 0 or more.")

    @property
    def trained_size(self) -> int:
        """Pieces of a model that is to be trained, without `control_pieces`."""
        return _DEFAULT_VOCAB_SIZE if self.vocab_size is None else self.vocab_size

    @property
    def control_pieces(self) -> tuple[str, ...]:
        """What is put after the pieces of the model, in this order."""
        marks = DENOISER_MARKS * self.denoiser_marks + INFILLING_MARKS * self.infilling_marks
        return (*(SPELLINGS[name][0] for name in marks), *map(sentinel, reversed(range(self.sentinels))))


class Shares(NamedTuple):
    """The shares of documents that are held out."""

    validation: float
    test: float

    def split(self, text: str) -> str:
        """The split of a document: where the hash of its (first) text falls in [0, 1)."""
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "little") / 2**64
        if place < self.test:
            return "test"
        return "validation" if place < self.test + self.validation else "train"


@dataclass(frozen=True)
class HeldOut:
    """Documents held out in files of their own, which are read as those of `data.source` are.

    They are cleaned like the training text, but none is dropped as a duplicate.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    files: tuple[str, ...] | None = None
    """Paths, glob patterns or URLs, in place of data.source.files."""
    split: str | None = None
    """Of a TFDS data set, the split in place of data.source.split."""

    def source(self, source: Source, key: str) -> SingleSource | TaskSource:
        """Where they come from. `key` names the setting in messages."""
        if isinstance(source, MixtureSource | StdlibSource):
            raise UserError(
                f"{key} has documents of its own, and data.source is {source.name}; accepted: a share of the "
                "documents, or a source that names files or a data set."
            )
        wanted, other = ("split", "files") if isinstance(source, TfdsSource) else ("files", "split")
        if not getattr(self, wanted) or getattr(self, other) is not None:
            raise UserError(f"{key}.{wanted} says what is held out from a source of {source.name}; accepted: it alone.")
        return dataclasses.replace(source, **{wanted: getattr(self, wanted)})


@dataclass(frozen=True)
class DataConfig:
    """Everything that decides which tokens a run sees, except its seed and batch size."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    source: Source = field(default_factory=StdlibSource)
    """Where the text comes from."""
    tokenizer: SentencePieceConfig = field(default_factory=SentencePieceConfig)
    """How text becomes tokens."""
    clean: CleaningConfig = field(default_factory=CleaningConfig)
    """What is done to each document before it is tokenised."""
    segment: SegmentationConfig = field(default_factory=SegmentationConfig)
    """How sentences and words are found."""
    augment: Augmentation | None = None
    """Copies of training documents in other words; null: none."""
    fill_in_middle: DocumentFillInMiddle | None = None
    """Middles of training documents moved to their end, with marks (data.tokenizer.infilling_marks); null: none. For
    causal language models, which then fill in the middle of a text."""
    length: int = 128
    """Tokens in a row of the model's input; at least 2."""
    validation: float | HeldOut = 0.05
    """Share of the documents held out for evaluation during training, in [0, 1); chosen by hash of the text. Or the
    files that are."""
    test: float | HeldOut = 0.05
    """Share of the documents held out for the end, in [0, 1); chosen by hash of the text. Or the files that are."""
    cache: str | None = None
    """Folder for prepared data; if absent $LMOBJ_CACHE, else ~/.cache/lmobj."""
    workers: int | None = None
    """Processes that clean and tokenise a corpus of more than a few megabytes; if absent, one per core. The result does
    not depend on it."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"data.length is {self.length}; accepted: 2 or more tokens.")
        for name, share in self.shares._asdict().items():
            if not 0 <= share < 1:
                raise UserError(f"data.{name} is {share}; accepted: a share of the documents in [0, 1).")
        if sum(self.shares) >= 1:
            raise UserError(
                f"data.validation and data.test are {self.validation} and {self.test}; accepted: shares that leave "
                "documents to train on, so a sum below 1."
            )
        if self.workers is not None and self.workers < 1:
            raise UserError(f"data.workers is {self.workers}; accepted: 1 or more, or absent for one per core.")
        self.held_out  # noqa: B018 - refuses what cannot be
        if self.fill_in_middle is not None:
            self._check_single_texts()

    def _check_single_texts(self) -> None:
        """Refuses documents that data.fill_in_middle could not cut."""
        if isinstance(self.source, TaskSource):
            raise UserError(
                f"data.fill_in_middle moves the middle of texts, and data.source.name is {self.source.name!r}, which "
                f"has {self.source.holds}; accepted: a source of texts, or no data.fill_in_middle."
            )
        sources: dict[str, Any] = {"data.source": self.source}
        if isinstance(self.source, MixtureSource):
            sources = {f"data.source.sources.{name}.source": one.source for name, one in self.source.sources.items()}
        for key, source in sources.items():
            pair = getattr(source, "pair", None)
            if pair is not None:
                raise UserError(
                    f"data.fill_in_middle moves the middle of single texts, and {key}.pair is {pair!r}, which "
                    "makes each document two; accepted: no pair, or no data.fill_in_middle."
                )

    @property
    def shares(self) -> Shares:
        """Of the source's own documents."""
        return Shares(*(0.0 if isinstance(value, HeldOut) else value for value in (self.validation, self.test)))

    @property
    def held_out(self) -> dict[str, SingleSource | TaskSource]:
        """The sources of the splits that have documents of their own."""
        given = {"validation": self.validation, "test": self.test}
        return {
            name: value.source(self.source, f"data.{name}")
            for name, value in given.items()
            if isinstance(value, HeldOut)
        }
