"""Losses that want one candidate of many to be the most similar."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError
from lmobj.losses._logit_stats import LogitStats, below_largest, check_classes, logit_stats, nll

__all__ = ["info_nce", "similarity_stats"]


def info_nce(
    similarity: Float[Array, "*N M"],
    targets: Int[Array, "*N"],
    *,
    temperature: float = 1.0,
    candidates: Bool[Array, "*N M"] | None = None,
) -> Float[Array, "*N"]:
    """Negative log-likelihood in nats of the candidate that belongs, among those at hand, unreduced.

        -log( exp(s_t / temperature) / sum_{m in candidates} exp(s_m / temperature) )

    Computed in `promote_types(similarity, float32)`. With a row for each query and the positives of all queries as
    candidates, `targets` is arange(N): in-batch negatives. For the symmetric loss take the mean of this and of the same
    on the transposed similarity.

    Args:
      similarity: [..., M] of each query to each candidate.
      targets: [...] index of the one that belongs; one out of range has a loss of +inf.
      temperature: above 0; for cosine similarity often 0.05, for products of vectors 1.
      candidates: [..., M] True for those that count, by default all. The target counts in any case.

    Raises:
      UserError: shapes or types that do not fit, or a temperature out of range.

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding", eq. 4; with
    negatives from the batch Karpukhin et al. 2020, "Dense Passage Retrieval for Open-Domain Question Answering", eq. 2;
    with a temperature Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations", eq. 1.
    """
    return nll(similarity_stats(similarity, targets, temperature=temperature, candidates=candidates))


def similarity_stats(
    similarity: Float[Array, "*N M"],
    targets: Int[Array, "*N"],
    *,
    temperature: float = 1.0,
    candidates: Bool[Array, "*N M"] | None = None,
) -> LogitStats:
    """The statistics that `info_nce` is made of, with the same arguments.

        info_nce = logsumexp - target_logit,  of the logits (s - max s) / temperature

    Logits count from the highest, a constant to differentiation: it is their differences that mean something. `correct`
    tells whether no other candidate is more similar than the target.

    Args:
      similarity, targets, temperature, candidates: as for `info_nce`.

    Returns:
      `LogitStats` over the candidates.

    Raises:
      UserError: shapes or types that do not fit, or a temperature out of range.

    Source: as for `info_nce`.
    """
    if isinstance(temperature, int | float) and not 0 < temperature < math.inf:
        raise UserError(f"info_nce: temperature is {temperature}; it must be a finite number above 0.")
    check_classes("info_nce", similarity, targets)
    if candidates is not None:
        candidates = candidates | (jnp.arange(similarity.shape[-1]) == targets[..., None])
        similarity = jnp.where(candidates, similarity, -jnp.inf)
    return logit_stats(below_largest(similarity) / temperature, targets, vocab_mask=candidates)
