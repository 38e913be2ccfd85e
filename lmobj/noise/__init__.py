"""Corruption of token rows: (key, row, ...) -> arrays, with static shapes, for one row at a time.

Callers vmap over rows with one key per row. Nothing here knows a model or an objective.
"""

from __future__ import annotations

from lmobj.noise._dropout import dropout
from lmobj.noise._masking import (
    MaskedTokens,
    mask_tokens,
    mask_tokens_bernoulli,
    mask_tokens_roberta,
    prediction_count,
)
from lmobj.noise._whole_words import mask_whole_words

__all__ = [
    "MaskedTokens",
    "dropout",
    "mask_tokens",
    "mask_tokens_bernoulli",
    "mask_tokens_roberta",
    "mask_whole_words",
    "prediction_count",
]
