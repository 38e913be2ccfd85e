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

from lmobj.data._cleaning_config import CleaningConfig, LanguageFilter, NearDuplicates, SegmentationConfig, StopWords
from lmobj.data._config import DataConfig, HeldOut, SentencePieceConfig
from lmobj.data._inputs import Tally
from lmobj.data._source_config import (
    JsonLines,
    MixtureSource,
    ParquetFiles,
    SeparatedValues,
    SingleSource,
    Source,
    StdlibSource,
    TextFiles,
    TfdsSource,
    WeightedSource,
)
from lmobj.data._text_rows import TextRows, text_rows
from lmobj.data._tokenizer import Tokenizer

if TYPE_CHECKING:
    from lmobj.data._dataset import Dataset
    from lmobj.data._prepare import prepare
    from lmobj.data._progress import progress_bar
    from lmobj.data._rows import HostBatch, Rows
    from lmobj.data._sources import open_corpus

__all__ = [
    "CleaningConfig",
    "DataConfig",
    "Dataset",
    "HeldOut",
    "HostBatch",
    "JsonLines",
    "LanguageFilter",
    "MixtureSource",
    "NearDuplicates",
    "ParquetFiles",
    "Rows",
    "SegmentationConfig",
    "SentencePieceConfig",
    "SeparatedValues",
    "SingleSource",
    "Source",
    "StdlibSource",
    "StopWords",
    "Tally",
    "TextFiles",
    "TextRows",
    "TfdsSource",
    "Tokenizer",
    "WeightedSource",
    "open_corpus",
    "prepare",
    "progress_bar",
    "text_rows",
]

_LATE = {"Dataset": "_dataset", "HostBatch": "_rows", "Rows": "_rows", "open_corpus": "_sources", "prepare": "_prepare",
         "progress_bar": "_progress"}  # fmt: skip
"""Names whose modules import jax or rich: loaded when asked for, since the processes that tokenise do without."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATE[name]}"), name)
