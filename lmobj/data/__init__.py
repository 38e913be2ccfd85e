"""Data: text sources, the SentencePiece tokenizer, token shards, and batches addressed by step.

    dataset = prepare(DataConfig(source=TextFiles(files=("corpus/*.txt",))))
    for batch in dataset.batches(objective.rows(dataset.vocab, 128), seed=0, batch_size=16, start=step):
        ...

Text is tokenised once and serves every objective: what an objective reads is its RowSpec alone. A batch is a function
of (fingerprint, seed, step).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lmobj.data._augment_config import Augmentation, Synonyms
from lmobj.data._cleaning_config import CleaningConfig, LanguageFilter, NearDuplicates, SegmentationConfig, StopWords
from lmobj.data._config import DataConfig, HeldOut, SentencePieceConfig, Source
from lmobj.data._fill_in_middle import DocumentFillInMiddle
from lmobj.data._inputs import InputFile, Tally, find_inputs, open_bytes
from lmobj.data._source_config import (
    JsonLines,
    MixtureSource,
    ParquetFiles,
    ReplaySource,
    SeparatedValues,
    SingleSource,
    StdlibSource,
    TextFiles,
    TfdsSource,
    WeightedSource,
)
from lmobj.data._task_source_config import (
    ChoiceFiles,
    ConllFiles,
    RelationFiles,
    RetrievalFiles,
    SquadFiles,
    TaggedSubwords,
    TagScheme,
    TaskSource,
)
from lmobj.data._text_rows import TextRows, text_rows
from lmobj.data._tokenizer import Tokenizer, train_tokenizer

if TYPE_CHECKING:
    from lmobj.data._dataset import Dataset
    from lmobj.data._prepare import load_tokenizer, prepare
    from lmobj.data._progress import progress_bar
    from lmobj.data._rows import HostBatch, Indices, MemoryRows, Rows
    from lmobj.data._sources import open_corpus

__all__ = [
    "Augmentation",
    "ChoiceFiles",
    "CleaningConfig",
    "ConllFiles",
    "DataConfig",
    "Dataset",
    "DocumentFillInMiddle",
    "HeldOut",
    "HostBatch",
    "Indices",
    "InputFile",
    "JsonLines",
    "LanguageFilter",
    "MemoryRows",
    "MixtureSource",
    "NearDuplicates",
    "ParquetFiles",
    "RelationFiles",
    "ReplaySource",
    "RetrievalFiles",
    "Rows",
    "SegmentationConfig",
    "SentencePieceConfig",
    "SeparatedValues",
    "SingleSource",
    "Source",
    "SquadFiles",
    "StdlibSource",
    "StopWords",
    "Synonyms",
    "TagScheme",
    "TaggedSubwords",
    "Tally",
    "TaskSource",
    "TextFiles",
    "TextRows",
    "TfdsSource",
    "Tokenizer",
    "WeightedSource",
    "find_inputs",
    "load_tokenizer",
    "open_bytes",
    "open_corpus",
    "prepare",
    "progress_bar",
    "text_rows",
    "train_tokenizer",
]

_LATE = {
    "_dataset": ("Dataset",),
    "_prepare": ("load_tokenizer", "prepare"),
    "_progress": ("progress_bar",),
    "_rows": ("HostBatch", "Indices", "MemoryRows", "Rows"),
    "_sources": ("open_corpus",),
}
"""Modules that import jax or rich, with their names: loaded when asked for, since workers that tokenise do without."""


def __getattr__(name: str) -> Any:
    for module, names in _LATE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
