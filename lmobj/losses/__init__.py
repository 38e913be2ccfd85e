"""Losses: arrays in, one value per element out. No mean, mask or ignored label inside; jax alone, no flax.

README.md in this folder lists them with their formulas and sources.
"""

from __future__ import annotations

from lmobj.losses._binary import binary_nll
from lmobj.losses._contrastive import info_nce, similarity_stats
from lmobj.losses._distances import cosine_distance, cosine_similarity, euclidean_distance, unit_vectors
from lmobj.losses._divergence import forward_kl, jensen_shannon, reverse_kl, soft_target_nll
from lmobj.losses._focal import binary_focal_loss, focal_loss
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
from lmobj.losses._pairs import (
    cosine_contrastive_loss,
    cosine_embedding_loss,
    euclidean_contrastive_loss,
    margin_ranking_loss,
)
from lmobj.losses._regression import huber_loss, squared_error
from lmobj.losses._triplet import cosine_triplet_loss, euclidean_triplet_loss, squared_euclidean_triplet_loss

__all__ = [
    "LogitStats",
    "binary_focal_loss",
    "binary_nll",
    "cosine_contrastive_loss",
    "cosine_distance",
    "cosine_embedding_loss",
    "cosine_similarity",
    "cosine_triplet_loss",
    "euclidean_contrastive_loss",
    "euclidean_distance",
    "euclidean_triplet_loss",
    "focal_loss",
    "forward_kl",
    "huber_loss",
    "info_nce",
    "jensen_shannon",
    "label_smoothed_nll",
    "linear_gumbel_sample",
    "linear_logit_stats",
    "linear_token_nll",
    "logit_stats",
    "margin_ranking_loss",
    "nll",
    "offtarget_smoothed_nll",
    "offtarget_smoothing_entropy",
    "reverse_kl",
    "similarity_stats",
    "soft_target_nll",
    "squared_error",
    "squared_euclidean_triplet_loss",
    "token_nll",
    "unit_vectors",
    "z_loss",
]
