"""Samples from the softmax of `hidden @ table.T`, a block of the vocabulary at a time, without storing the logits."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmobj import compat
from lmobj.errors import UserError
from lmobj.losses._linear_logit_stats import check_linear, plan_blocks
from lmobj.losses._vocab_loop import blockwise_sample

__all__ = ["linear_gumbel_sample"]


def linear_gumbel_sample(
    hidden: Float[Array, "*N D"],
    table: Float[Array, "V D"],
    seeds: UInt32[Array, "*N"],
    *,
    bias: Float[Array, " V"] | None = None,
    vocab_mask: Bool[Array, " V"] | None = None,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    temperature: float = 1.0,
    excluded: Int[Array, "*N"] | None = None,
    block_size: int | None = None,
) -> Int[Array, "*N"]:
    """One class for each token, drawn from softmax(logits / temperature), without ever storing the logits.

        argmax_v logits[v] / temperature + G(seed, v)

    where the logits are those of `linear_logit_stats` and G is standard Gumbel noise (the Gumbel-max trick). No
    gradient passes.

    The noise is `noise.gumbel`: a hash of the token's seed and the class. So a token draws the same class whatever the
    blocks, the mesh, the padding of the table and the tokens around it (up to the rounding of its logits). A hash and
    not threefry bits, because it is addressed by class at no cost, where threefry would draw whole blocks, whose order
    depends on their size; and it takes one round of integer operations where threefry takes twenty. Two tokens with
    equal seeds draw with equal noise: seeds have 32 bits, so that befalls two of n tokens with probability n^2 / 2^33.

    Args:
      hidden, table, bias, vocab_mask, vocab_size, soft_cap, block_size: see `linear_logit_stats`, as for meshes.
      seeds: [...] one seed for each token; for slot k of a row `noise.fold_index(row_seed, k)`.
      temperature: above 0.
      excluded: [...] a class that each token must not draw (its target, for samples that are always wrong); an id
        that is no class excludes nothing.

    Returns:
      [...] class ids, int32; meaningless where no class is left.

    Raises:
      UserError: shapes or types that do not fit, or settings out of range.

    Source: Maddison et al. 2014, "A* Sampling", https://arxiv.org/abs/1411.0030.
    """
    check_linear(
        "linear_gumbel_sample",
        hidden,
        table,
        {"seeds": seeds, "excluded": excluded},
        bias,
        vocab_mask,
        vocab_size,
        soft_cap,
        block_size,
    )
    if seeds.dtype != jnp.uint32:
        raise UserError(f"linear_gumbel_sample: seeds must be uint32, not {seeds.dtype}.")
    if not temperature > 0:
        raise UserError(f"linear_gumbel_sample: temperature is {temperature}; it must be above 0.")
    scalar = seeds.ndim == 0
    if scalar:
        hidden, seeds, excluded = jax.tree.map(lambda x: x[None], (hidden, seeds, excluded))
    plan = plan_blocks(hidden, table, vocab_size, soft_cap, block_size)
    hidden, table, bias = jax.lax.stop_gradient((hidden, table, bias))
    arrays: tuple[Any, ...] = compat.vary_together(hidden, table, bias, vocab_mask, seeds, excluded)
    sampled = blockwise_sample(plan, temperature, *arrays)
    return sampled[0] if scalar else sampled
