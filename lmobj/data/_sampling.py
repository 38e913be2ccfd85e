"""The text that a tokenizer is trained on: an even sample of the lines of several corpora's training splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lmobj.data._config import SentencePieceConfig
from lmobj.data._corpus import Corpus
from lmobj.data._finish import no_training_text
from lmobj.data._tokenizer import Tokenizer, train_tokenizer
from lmobj.data._work import Sample, SampleLines, Selection

__all__ = ["train_on_sample"]

_MARGIN = 2
"""Lines drawn first are up to so many times what is asked for, by the inputs' size; compressed inputs hold more."""


def train_on_sample(
    config: SentencePieceConfig,
    corpora: Sequence[tuple[Corpus, Selection]],
    run: Callable[[Corpus, Any], Iterator[Sample]],
) -> Tokenizer:
    """Trains a tokenizer on at most `config.sample_bytes` of the corpora together; reads each once.

    Raises UserError if they hold no training text, or it does not fit the vocabulary.
    """
    size = sum(corpus.size for corpus, _ in corpora)
    share = min(1.0, _MARGIN * config.sample_bytes / max(size, 1))
    samples = [sample for corpus, selection in corpora for sample in run(corpus, SampleLines(selection, share))]
    if not any(sample.training for sample in samples):
        raise no_training_text(sum(sample.documents for sample in samples))
    return train_tokenizer(config, thinned(samples, config.sample_bytes))


def thinned(samples: list[Sample], most: int) -> Iterator[str]:
    """The lines whose draws are least, in order, such that they hold at most `most` bytes; at least one."""
    draws = np.concatenate([sample.draws for sample in samples])
    order = np.argsort(draws, kind="stable")
    held = np.cumsum(np.concatenate([sample.sizes for sample in samples])[order])
    count = max(1, int(np.searchsorted(held, most, side="right")))
    kept = np.zeros(len(draws), np.bool_)
    kept[order[:count]] = True
    start = 0
    for sample in samples:
        if len(sample.draws):
            for line, keep in zip(sample.lines.split("\n"), kept[start:].tolist(), strict=False):
                if keep:
                    yield line
        start += len(sample.draws)
