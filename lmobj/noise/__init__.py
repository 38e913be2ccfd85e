"""Corruption of token rows: (key, row, ...) -> arrays, with static shapes, for one row at a time.

Callers vmap over rows with one key per row. Nothing here knows a model or an objective.
"""

from __future__ import annotations

from lmobj.noise._counts import ceil_share
from lmobj.noise._diffusion import DiffusedTokens, diffuse_count, diffuse_tokens
from lmobj.noise._dropout import dropout
from lmobj.noise._fill_in_middle import FilledInMiddle, fill_in_middle, join_middle
from lmobj.noise._hash import fold_index, fold_places, gumbel
from lmobj.noise._masking import (
    MaskedTokens,
    mask_tokens,
    mask_tokens_bernoulli,
    mask_tokens_roberta,
    prediction_count,
)
from lmobj.noise._ngrams import mask_ngrams
from lmobj.noise._permutation import (
    PermutationRanks,
    PermutedTokens,
    check_permutation,
    permutation_ranks,
    permute_tokens,
    span_targets,
)
from lmobj.noise._replaced_tokens import ReplacedTokens, mask_tokens_electra, replace_tokens
from lmobj.noise._row_noise import (
    LONGEST_MEAN,
    NoisedRow,
    infill_spans,
    insert_tokens,
    permute_sentences,
    rotate_row,
    whole_row,
)
from lmobj.noise._sentinels import Denoised, join_spans, prefix_inputs_targets, sentinel_inputs_targets
from lmobj.noise._span_corruption import (
    noise_spans,
    noise_tokens_iid,
    raw_length_for,
    shortest_prefix,
    span_corruption_lengths,
    split_prefix,
)
from lmobj.noise._spans import MaskedSpans, mask_spans, span_budget
from lmobj.noise._token_dropout import drop_tokens
from lmobj.noise._whole_words import mask_whole_words

__all__ = [
    "LONGEST_MEAN",
    "Denoised",
    "DiffusedTokens",
    "FilledInMiddle",
    "MaskedSpans",
    "MaskedTokens",
    "NoisedRow",
    "PermutationRanks",
    "PermutedTokens",
    "ReplacedTokens",
    "ceil_share",
    "check_permutation",
    "diffuse_count",
    "diffuse_tokens",
    "drop_tokens",
    "dropout",
    "fill_in_middle",
    "fold_index",
    "fold_places",
    "gumbel",
    "infill_spans",
    "insert_tokens",
    "join_middle",
    "join_spans",
    "mask_ngrams",
    "mask_spans",
    "mask_tokens",
    "mask_tokens_bernoulli",
    "mask_tokens_electra",
    "mask_tokens_roberta",
    "mask_whole_words",
    "noise_spans",
    "noise_tokens_iid",
    "permutation_ranks",
    "permute_sentences",
    "permute_tokens",
    "prediction_count",
    "prefix_inputs_targets",
    "raw_length_for",
    "replace_tokens",
    "rotate_row",
    "sentinel_inputs_targets",
    "shortest_prefix",
    "span_budget",
    "span_corruption_lengths",
    "span_targets",
    "split_prefix",
    "whole_row",
]
