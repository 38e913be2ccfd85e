"""Data: text sources, the SentencePiece tokenizer, token shards, and batches addressed by step.

    dataset = prepare(DataConfig(source=TextFiles(files=("corpus/*.txt",))))
    for batch in dataset.batches(objective.rows(dataset.vocab, 128), seed=0, batch_size=16, start=step):
        ...

Text is tokenised once and serves every objective: what an objective reads is its RowSpec alone. A batch is a function
of (fingerprint, seed, step).
"""

from lmobj.data._config import DataConfig, SentencePieceConfig, Source, StdlibSource, TextFiles
from lmobj.data._dataset import Dataset
from lmobj.data._prepare import prepare
from lmobj.data._rows import HostBatch, Rows
from lmobj.data._tokenizer import Tokenizer

__all__ = [
    "DataConfig",
    "Dataset",
    "HostBatch",
    "Rows",
    "SentencePieceConfig",
    "Source",
    "StdlibSource",
    "TextFiles",
    "Tokenizer",
    "prepare",
]
