"""Statistics of the logits `hidden @ table.T`, a block of the vocabulary at a time: logits are never stored whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj import compat
from lmobj.errors import UserError
from lmobj.losses._blocks import choose_blocks
from lmobj.losses._layout import Layout, active_layout
from lmobj.losses._logit_stats import LogitStats
from lmobj.losses._vocab_loop import Plan, blockwise_logit_stats

__all__ = ["check_linear", "linear_logit_stats", "plan_blocks"]

_BLOCK_LOGITS = 2**24
"""Most logits in a block where no size is given: 64 MiB in float32."""
_LEAST_BLOCK, _MOST_BLOCK = 1024, 4096
"""Classes in such a block, unless it holds all: fewer make matrix products slow, more no faster."""


def linear_logit_stats(
    hidden: Float[Array, "*N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "*N"],
    *,
    bias: Float[Array, " V"] | None = None,
    vocab_mask: Bool[Array, " V"] | None = None,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    block_size: int | None = None,
) -> LogitStats:
    """What losses need of the logits that an output table gives, without ever storing the logits.

        logits = c tanh((hidden @ table.T + bias) / c),  or without tanh where there is no cap c

    Memory beyond inputs and gradients is two to three blocks of logits. Where one block holds everything, its logits
    are kept for the backward pass; otherwise they are computed again.

    Products take the common type of `hidden` and `table` and add up in float32 (float64 for float64 inputs); the
    statistics have that type. Gradients reach `hidden`, `table` and `bias`, in reverse mode only.

    The table need not have a special size, but one padded to a multiple of 128 (give the real size as `vocab_size`)
    nearly always divides into strided blocks; see `choose_blocks` for what happens otherwise.

    On a mesh, call it under `jax.set_mesh(...)` and `partition.rules(...)`, with the batch as first axis. Then no
    device gathers the table, hidden states or logits, however `vocab`, `embed` and `batch` are laid out, provided that
    the mesh divides each. Inside `jax.shard_map` each shard must hold the whole table; the gradient of a replicated one
    is summed over shards.

    Args:
      hidden: [..., D] final hidden states.
      table: [V, D] output embeddings, one row per class.
      targets: [...] class ids.
      bias: [V] added to the logits.
      vocab_mask: [V], True for the classes that exist; the others have no logit and get no gradient.
      vocab_size: the number of real classes where the table is padded: rows from there on do not exist.
      soft_cap: bound on the absolute value of logits; None for no bound.
      block_size: the most classes in a block on each device, >= 1. None: all of them where that makes at most 2^24
        logits on a device, otherwise 1024 to 4096, for 2^24 logits if possible.

    Returns:
      `LogitStats`, each [...]. A target that is no existing class has a `target_logit` of -inf: its NLL is +inf, and
      weighting it by zero gives NaN, so replace the target at positions that do not count.

    Raises:
      UserError: shapes or types that do not fit, or settings out of range.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", https://arxiv.org/abs/1805.02867,
    alg. 3; the cap Gemma Team 2024, "Gemma 2: Improving Open Language Models at a Practical Size",
    https://arxiv.org/abs/2408.00118, section 2.
    """
    check_linear(
        "linear_logit_stats", hidden, table, {"targets": targets}, bias, vocab_mask, vocab_size, soft_cap, block_size
    )
    scalar = targets.ndim == 0
    if scalar:
        hidden, targets = hidden[None], targets[None]
    # The VJP finds each shard's own gradients: the casts' transposes sum them over shards.
    arrays = compat.vary_together(hidden, table, bias, vocab_mask, targets)
    stats = blockwise_logit_stats(plan_blocks(hidden, table, vocab_size, soft_cap, block_size), *arrays)
    return jax.tree.map(lambda x: x[0], stats) if scalar else stats


def plan_blocks(
    hidden: Float[Array, "B *N D"],
    table: Float[Array, "V D"],
    vocab_size: int | None,
    soft_cap: float | None,
    block_size: int | None,
) -> Plan:
    """How the vocabulary is gone through, under the active mesh and rules."""
    layout = active_layout(hidden.shape[:-1], table.shape)
    if block_size is None:
        block_size = _default_block_size(layout, math.prod(hidden.shape[:-1]), table.shape[0])
    blocks = choose_blocks(table.shape[0] // layout.vocab_parts, block_size)
    limit = vocab_size if vocab_size is not None and vocab_size < table.shape[0] else None
    return Plan(layout, blocks, limit, soft_cap)


def _default_block_size(layout: Layout, tokens: int, vocab: int) -> int:
    """All classes of a part of the vocabulary if that makes at most `_BLOCK_LOGITS` logits on a device, or a few."""
    local = max(tokens // layout.token_parts, 1)
    if local * vocab * layout.ring_size <= _BLOCK_LOGITS * layout.vocab_parts:
        return vocab // layout.vocab_parts
    return min(max(_BLOCK_LOGITS // local, _LEAST_BLOCK), _MOST_BLOCK)


def check_linear(
    name: str,
    hidden: Array,
    table: Array,
    integers: Mapping[str, Array | None],
    bias: Array | None,
    vocab_mask: Array | None,
    vocab_size: int | None,
    soft_cap: float | None,
    block_size: int | None,
) -> None:
    """Raises UserError, for the function `name`, where its arguments do not fit; `integers` are one for each token."""
    problem = None
    wrong = [
        f"{key} must be integers of shape {hidden.shape[:-1]}, not {x.dtype}{list(x.shape)}"
        for key, x in integers.items()
        if x is not None and (x.shape != hidden.shape[:-1] or not jnp.issubdtype(x.dtype, jnp.integer))
    ]
    if table.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != table.shape[1]:
        problem = f"hidden {hidden.shape} and table {table.shape} must be [..., D] and [V, D]"
    elif wrong:
        problem = wrong[0]
    elif bias is not None and bias.shape != table.shape[:1]:
        problem = f"bias must have shape {table.shape[:1]}, not {bias.shape}"
    elif vocab_mask is not None and (vocab_mask.shape != table.shape[:1] or vocab_mask.dtype != bool):
        problem = f"vocab_mask must be bool{list(table.shape[:1])}, not {vocab_mask.dtype}{list(vocab_mask.shape)}"
    elif vocab_size is not None and not 1 <= vocab_size <= table.shape[0]:
        problem = f"vocab_size is {vocab_size}; the table has {table.shape[0]} rows, so it must be 1 to that"
    elif soft_cap is not None and not soft_cap > 0:
        problem = f"soft_cap is {soft_cap}; it must be above 0, or None for no cap"
    elif block_size is not None and block_size < 1:
        problem = f"block_size is {block_size}; it must be at least 1, or None"
    if problem is not None:
        raise UserError(f"{name}: {problem}.")
