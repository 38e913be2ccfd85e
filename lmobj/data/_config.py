"""Settings of the data: where the text comes from, how it is cleaned, the tokenizer, and the shares of the splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from lmobj.data._cleaning_config import CleaningConfig, SegmentationConfig
from lmobj.data._source_config import Source, StdlibSource, check_choice
from lmobj.errors import UserError

__all__ = ["DataConfig", "SentencePieceConfig"]

_DEFAULT_VOCAB_SIZE = 4096


@dataclass(frozen=True)
class SentencePieceConfig:
    """A SentencePiece model, trained on the training split or loaded from `path`."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    vocab_size: int | None = None
    """Pieces, the 7 special ones, the newline and the 256 single bytes included; 4096 if absent. With `path`: the size
    of that model, or absent."""
    model: Literal["bpe", "unigram"] = "bpe"
    """Kind of model to train. bpe trains ten times faster; unigram finds few whole words in text that puts a space
    before every punctuation mark, as WikiText does."""
    path: str | None = None
    """An existing SentencePiece `.model` file to load instead of training one."""
    character_coverage: float = 0.9995
    """Share of the characters that get a piece of their own, in (0.98, 1]; the rest is spelled in bytes."""
    sample_bytes: int = 32 * 1024 * 1024
    """Train on at most this many bytes of text, taken evenly over the training split; at least 1."""

    def __post_init__(self) -> None:
        check_choice("data.tokenizer.model", self.model, ("bpe", "unigram"))
        if self.vocab_size is not None and self.vocab_size < 1:
            raise UserError(f"data.tokenizer.vocab_size is {self.vocab_size}; accepted: a positive integer.")
        if not 0.98 < self.character_coverage <= 1:
            raise UserError(
                f"data.tokenizer.character_coverage is {self.character_coverage}; accepted: above 0.98, at most 1."
            )
        if self.sample_bytes < 1:
            raise UserError(f"data.tokenizer.sample_bytes is {self.sample_bytes}; accepted: a positive integer.")

    @property
    def trained_size(self) -> int:
        """Pieces of a model that is to be trained."""
        return _DEFAULT_VOCAB_SIZE if self.vocab_size is None else self.vocab_size


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
    length: int = 128
    """Tokens in a row of the model's input; at least 2."""
    validation: float = 0.05
    """Share of the documents held out for evaluation during training, in [0, 1); chosen by hash of the text."""
    test: float = 0.05
    """Share of the documents held out for the end, in [0, 1); chosen by hash of the text."""
    cache: str | None = None
    """Folder for prepared data; if absent $LMOBJ_CACHE, else ~/.cache/lmobj."""
    workers: int | None = None
    """Processes that clean and tokenise a corpus of more than a few megabytes; if absent, one per core. The result does
    not depend on it."""

    def __post_init__(self) -> None:
        if self.length < 2:
            raise UserError(f"data.length is {self.length}; accepted: 2 or more tokens.")
        for name, share in (("validation", self.validation), ("test", self.test)):
            if not 0 <= share < 1:
                raise UserError(f"data.{name} is {share}; accepted: a share of the documents in [0, 1).")
        if self.validation + self.test >= 1:
            raise UserError(
                f"data.validation and data.test are {self.validation} and {self.test}; accepted: shares that leave "
                "documents to train on, so a sum below 1."
            )
        if self.workers is not None and self.workers < 1:
            raise UserError(f"data.workers is {self.workers}; accepted: 1 or more, or absent for one per core.")
