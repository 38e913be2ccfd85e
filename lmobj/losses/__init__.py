"""Losses: arrays in, one value per element out. No mean, mask or ignored label inside; jax alone, no flax."""

from __future__ import annotations

from lmobj.losses._binary import binary_nll
from lmobj.losses._contrastive import info_nce, similarity_stats
from lmobj.losses._linear_logit_stats import linear_logit_stats
from lmobj.losses._linear_sample import linear_gumbel_sample
from lmobj.losses._linear_token_nll import linear_token_nll
from lmobj.losses._logit_stats import (
    LogitStats,
    label_smoothed_nll,
    logit_stats,
    nll,
    offtarget_smoothed_nll,
    offtarget_smoothing_entropy,
    token_nll,
    z_loss,
)
from lmobj.losses._triplet import (
    cosine_similarity,
    cosine_triplet_loss,
    euclidean_distance,
    euclidean_triplet_loss,
    squared_euclidean_triplet_loss,
    unit_vectors,
)

__all__ = [
    "LogitStats",
    "binary_nll",
    "cosine_similarity",
    "cosine_triplet_loss",
    "euclidean_distance",
    "euclidean_triplet_loss",
    "info_nce",
    "label_smoothed_nll",
    "linear_gumbel_sample",
    "linear_logit_stats",
    "linear_token_nll",
    "logit_stats",
    "nll",
    "offtarget_smoothed_nll",
    "offtarget_smoothing_entropy",
    "similarity_stats",
    "squared_euclidean_triplet_loss",
    "token_nll",
    "unit_vectors",
    "z_loss",
]
