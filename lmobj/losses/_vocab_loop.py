"""The loop over blocks of the vocabulary behind `linear_logit_stats`, and its VJP, and behind `linear_gumbel_sample`.

Forward, each block updates a running maximum and a sum of exponentials (online softmax; Milakov and Gimelshein 2018,
https://arxiv.org/abs/1805.02867, alg. 3). Backward, each block's logits are computed again; with p = softmax(logits)

    d logits[v] = d logsumexp * p[v] + d target_logit * [v = target] + d sum_logits

Blocks stride over the vocabulary: of n blocks, block b holds rows b, b + n, b + 2n, ... of the table. A table that is
cut into runs of rows over devices is then local in every block.

Dimensions inside, where g, x and t are cuts over devices (see `_layout`) and 1 without a mesh. Tokens: [g, x, ..., D];
the whole table: [g, t, V/gt, D]; a block of it: [g, t, v, D]; the block's logits: [g, x, ..., t, v].
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lmobj import compat
from lmobj.losses._blocks import Blocks
from lmobj.losses._layout import Layout
from lmobj.losses._logit_stats import LogitStats
from lmobj.noise import gumbel

__all__ = ["Plan", "blockwise_logit_stats", "blockwise_sample"]

C = TypeVar("C")
M = TypeVar("M")
Y = TypeVar("Y")

_Dims = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Plan:
    """Everything that is fixed when the function is traced."""

    layout: Layout
    blocks: Blocks
    vocab_size: int | None
    """Number of real classes; None: all are."""
    soft_cap: float | None

    @property
    def keeps_logits(self) -> bool:
        """Whether the only block's logits are kept for the backward pass."""
        return self.blocks.count == 1 and self.layout.ring_size == 1


class _Vocab(NamedTuple):
    """The vocabulary's arrays: whole, as `Blocks.view` gives them, or one block [g, t, v, ...]."""

    table: Array
    bias: Array | None
    mask: Array | None


class _Sums(NamedTuple):
    """Running statistics [g, x, ..., t]; `exps` is the sum of exp(logits - top)."""

    top: Array
    exps: Array
    target: Array
    total: Array


class _Found(NamedTuple):
    """What stays on the device in the forward loop."""

    sums: _Sums
    logits: Array | None
    """The only block's, where they are kept."""


class _Tokens(NamedTuple):
    """What the backward loop reads of the tokens, each [g, x, ...]."""

    hidden: Array
    targets: Array
    logsumexp: Array
    cotangents: LogitStats
    logits: Array | None
    """[g, x, ..., t, v] of the only block, where they were kept."""


class _Local(NamedTuple):
    """What stays on the device in the backward loop."""

    d_hidden: Array
    """[g, t, x, ..., D]."""
    d_bias: Array | None
    """[g, x, t, owner, v], of one block."""


class _Moving(NamedTuple):
    """What goes round the ring in the backward loop."""

    block: _Vocab
    d_rows: Array
    """[g, x, t, v, D]: the gradient of the block's rows of the table, so far."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_logit_stats(
    plan: Plan, hidden: Array, table: Array, bias: Array | None, mask: Array | None, targets: Array
) -> LogitStats:
    """`LogitStats` of hidden [B, ..., D] and table [V, D]; see `linear_logit_stats`."""
    return _forward(plan, hidden, table, bias, mask, targets)[0]


def _forward(
    plan: Plan, hidden: Array, table: Array, bias: Array | None, mask: Array | None, targets: Array
) -> tuple[LogitStats, tuple[Array | None, ...]]:
    hidden_, targets_ = plan.layout.split_tokens(hidden), plan.layout.split_tokens(targets)
    vocab = _view(plan, table, bias, mask)

    def step(b: Array, carry: _Found, block: _Vocab, owner: Array) -> tuple[_Found, _Vocab]:
        logits = _logits(plan, hidden_, block)
        classes = _classes(plan, b, owner)
        sums = _add_block(carry.sums, logits, classes, _existing(plan, b, block.mask, classes), targets_)
        return _Found(sums, logits if plan.keeps_logits else None), block

    def body(carry: _Found, b: Array) -> tuple[_Found, None]:
        return _round_the_ring(plan, functools.partial(step, b), carry, _take(plan, vocab, b))[0], None

    zeros = jnp.zeros((*targets_.shape, vocab.table.shape[1]), _accumulator(hidden, table))
    zeros = compat.cast_varying(plan.layout.place(zeros, "gx"), compat.varying_axes(hidden))
    lowest = jnp.full_like(zeros, -jnp.inf)
    (sums, logits), _ = _over_blocks(plan, body, _Found(_Sums(lowest, zeros, lowest, zeros), None))
    stats = jax.tree.map(plan.layout.merge_tokens, _over_columns(sums))
    return stats, (hidden, table, bias, mask, targets, stats.logsumexp, logits)


def _add_block(sums: _Sums, logits: Array, classes: Array, exists: Array | None, targets: Array) -> _Sums:
    """`sums` with one more block of logits."""
    inside = logits if exists is None else jnp.where(_beside(exists, logits), logits, -jnp.inf)
    counted = logits if exists is None else jnp.where(_beside(exists, logits), logits, 0)
    hit = targets[..., None, None] == _beside(classes, logits)
    top = jnp.maximum(sums.top, jnp.max(inside, axis=-1))
    base = _finite(top)
    return _Sums(
        top=top,
        exps=sums.exps * jnp.exp(sums.top - base) + jnp.sum(jnp.exp(inside - base[..., None]), axis=-1),
        target=jnp.maximum(sums.target, jnp.max(jnp.where(hit, inside, -jnp.inf), axis=-1)),
        total=sums.total + jnp.sum(counted, axis=-1),
    )


def _over_columns(sums: _Sums) -> LogitStats:
    """Adds up what the parts of the vocabulary (the last axis) found."""
    top = jnp.max(sums.top, axis=-1)
    base = _finite(top)
    exps = jnp.sum(sums.exps * jnp.exp(sums.top - base[..., None]), axis=-1)
    return LogitStats(
        target_logit=jnp.max(sums.target, axis=-1),
        logsumexp=base + jnp.log(exps),
        sum_logits=jnp.sum(sums.total, axis=-1),
        max_logit=top,
    )


def _backward(
    plan: Plan, saved: tuple[Array, ...], cotangents: LogitStats
) -> tuple[Array, Array, Array | None, None, None]:
    hidden, table, bias, mask, targets, logsumexp, kept = saved
    layout, blocks = plan.layout, plan.blocks
    tokens = jax.tree.map(layout.split_tokens, _Tokens(hidden, targets, logsumexp, cotangents, logits=None))
    tokens = tokens._replace(logits=kept)
    vocab = _view(plan, table, bias, mask)
    wide, axes = _accumulator(hidden, table), compat.varying_axes(hidden)
    cuts = {"g": vocab.table.shape[0], "t": vocab.table.shape[1], "x": tokens.hidden.shape[1]}

    def zeros(dims: str, *shape: int) -> Array:
        """Zeros [cuts in `dims`, *shape], for each device to add its own to."""
        x = jnp.zeros((*(cuts[dim] for dim in dims), *shape), wide)
        return compat.cast_varying(layout.place(x, dims), axes)

    def body(carry: tuple[Array, Array], b: Array) -> tuple[tuple[Array, Array], Array | None]:
        d_hidden, d_table = carry
        local = _Local(d_hidden, None if bias is None else zeros("gxt", cuts["g"], blocks.width))
        moving = _Moving(_take(plan, vocab, b), zeros("gxt", blocks.width, table.shape[1]))
        local, moving = _round_the_ring(plan, functools.partial(_add_gradients, plan, tokens, b), local, moving)
        d_rows = layout.store(jnp.sum(moving.d_rows, axis=1).astype(table.dtype), width=True)
        return (local.d_hidden, blocks.put(d_table, b, d_rows)), local.d_bias

    d_table = jnp.zeros((cuts["g"], cuts["t"], blocks.size, table.shape[1]), table.dtype)
    d_table = blocks.view(compat.cast_varying(layout.store(d_table, width=True), axes))
    (d_hidden, d_table), d_bias = _over_blocks(plan, body, (zeros("gtx", *tokens.hidden.shape[2:]), d_table))
    d_hidden = layout.merge_tokens(jnp.sum(d_hidden, axis=1)).astype(hidden.dtype)
    d_table = layout.merge_vocab(blocks.unview(d_table))
    if d_bias is not None:
        d_bias = blocks.join(jnp.sum(d_bias, axis=(1, 2)))  # [t, owner, V/gt]: whole along the ring
        d_bias = layout.merge_vocab(jnp.swapaxes(d_bias, 0, 1)).astype(bias.dtype)
    return d_hidden, d_table, d_bias, None, None


def _add_gradients(
    plan: Plan, tokens: _Tokens, b: Array, local: _Local, moving: _Moving, owner: Array
) -> tuple[_Local, _Moving]:
    """Adds what block b of `owner`'s part gives to the gradients of hidden states, of the bias and of its own rows."""
    hidden, block = tokens.hidden, moving.block
    last = hidden.ndim - 1
    over = tuple(range(2, last))
    logits = _logits(plan, hidden, block) if tokens.logits is None else tokens.logits
    d_logits = _d_logits(plan, tokens, logits, block.mask, b, owner)
    d_bias = local.d_bias
    if d_bias is not None:
        # The bias's gradient does not travel: each device adds to it under the owner's index.
        mine = (owner[:, None] == jnp.arange(d_bias.shape[3]))[:, None, None, :, None]
        d_bias += jnp.where(mine, jnp.sum(d_logits, axis=over)[:, :, :, None], 0)
    d_logits = d_logits.astype(jnp.promote_types(hidden.dtype, block.table.dtype))
    d_hidden = local.d_hidden + _contract(d_logits, block.table, ((last + 1,), (2,)), ((0, last), (0, 1)))
    # Hidden states first: XLA's CPU backend copies a first factor that it has to transpose.
    d_rows = jnp.moveaxis(_contract(hidden, d_logits, (over, over), ((0, 1), (0, 1))), 2, -1)
    return _Local(d_hidden, d_bias), moving._replace(d_rows=moving.d_rows + d_rows)


def _d_logits(plan: Plan, tokens: _Tokens, logits: Array, mask: Array | None, b: Array, owner: Array) -> Array:
    """Gradient with respect to the logits before the cap; `max_logit` passes none back."""
    d_target, d_logsumexp, d_sum = (x[..., None, None] for x in tokens.cotangents[:3])
    classes = _classes(plan, b, owner)
    hit = tokens.targets[..., None, None] == _beside(classes, logits)
    p = jnp.exp(logits - _finite(tokens.logsumexp)[..., None, None])
    grad = d_logsumexp * p + d_sum + jnp.where(hit, d_target, 0)
    if plan.soft_cap is not None:
        grad *= 1 - jnp.square(logits / plan.soft_cap)
    exists = _existing(plan, b, mask, classes)
    return grad if exists is None else jnp.where(_beside(exists, logits), grad, 0)


blockwise_logit_stats.defvjp(_forward, _backward)


class _Best(NamedTuple):
    """The highest noisy logit so far and its class, [g, x, ..., t]."""

    value: Array
    choice: Array


def blockwise_sample(
    plan: Plan,
    temperature: float,
    hidden: Array,
    table: Array,
    bias: Array | None,
    mask: Array | None,
    seeds: Array,
    excluded: Array | None,
) -> Array:
    """A class for each of hidden [B, ..., D], by the Gumbel-max trick; see `linear_gumbel_sample`."""
    hidden_, seeds_ = plan.layout.split_tokens(hidden), plan.layout.split_tokens(seeds)
    excluded_ = None if excluded is None else plan.layout.split_tokens(excluded)
    vocab = _view(plan, table, bias, mask)

    def step(b: Array, best: _Best, block: _Vocab, owner: Array) -> tuple[_Best, _Vocab]:
        logits = _logits(plan, hidden_, block)
        classes = _classes(plan, b, owner)
        exists = _existing(plan, b, block.mask, classes)
        classes = _beside(classes, logits)
        noisy = logits / temperature + gumbel(seeds_[..., None, None], classes).astype(logits.dtype)
        if exists is not None:
            noisy = jnp.where(_beside(exists, logits), noisy, -jnp.inf)
        if excluded_ is not None:
            noisy = jnp.where(classes == excluded_[..., None, None], -jnp.inf, noisy)
        return _better(best, _best_of(noisy, classes)), block

    def body(best: _Best, b: Array) -> tuple[_Best, None]:
        return _round_the_ring(plan, functools.partial(step, b), best, _take(plan, vocab, b))[0], None

    shape = (*seeds_.shape, vocab.table.shape[1])
    start = _Best(jnp.full(shape, -jnp.inf, _accumulator(hidden, table)), jnp.zeros(shape, jnp.int32))
    start = compat.cast_varying(jax.tree.map(lambda x: plan.layout.place(x, "gx"), start), compat.varying_axes(hidden))
    best, _ = _over_blocks(plan, body, start)
    return plan.layout.merge_tokens(_best_of(best.value, best.choice).choice)


def _best_of(values: Array, choices: Array) -> _Best:
    """The highest value along the last axis and its choice, the lowest choice where values are equal."""
    top = jnp.max(values, axis=-1)
    return _Best(top, jnp.min(jnp.where(values == top[..., None], choices, jnp.iinfo(jnp.int32).max), axis=-1))


def _better(a: _Best, b: _Best) -> _Best:
    """The higher of two, or the one of the lower choice."""
    wins = (b.value > a.value) | ((b.value == a.value) & (b.choice < a.choice))
    return _Best(jnp.where(wins, b.value, a.value), jnp.where(wins, b.choice, a.choice))


def _view(plan: Plan, table: Array, bias: Array | None, mask: Array | None) -> _Vocab:
    return jax.tree.map(lambda x: plan.blocks.view(plan.layout.split_vocab(x)), _Vocab(table, bias, mask))


def _take(plan: Plan, vocab: _Vocab, b: Array) -> _Vocab:
    """Block b of every part of the vocabulary, each on the device that has the part."""
    return jax.tree.map(lambda x: plan.layout.place(plan.blocks.take(x, b), "gt"), vocab)


def _over_blocks(plan: Plan, body: Callable[[C, Array], tuple[C, Y]], carry: C) -> tuple[C, Y]:
    """Scans `body` over the blocks; a single block needs no loop, and may change the form of its carry."""
    if plan.blocks.count > 1:
        return jax.lax.scan(body, carry, jnp.arange(plan.blocks.count, dtype=jnp.int32))
    carry, y = body(carry, jnp.zeros((), jnp.int32))
    return carry, jax.tree.map(lambda x: x[None], y)


def _round_the_ring(plan: Plan, step: Callable[[C, M, Array], tuple[C, M]], carry: C, moving: M) -> tuple[C, M]:
    """Calls step(carry, moving, owner) once per device of the ring, and passes `moving` on by one device after each.

    owner [g]: the device that `moving` came from. At the end it is home again.
    """
    layout = plan.layout
    home = jnp.arange(layout.ring_size, dtype=jnp.int32)
    if layout.ring_size == 1:
        return step(carry, moving, home)

    def body(state: tuple[C, M], steps: Array) -> tuple[tuple[C, M], None]:
        owner = layout.place((home - steps) % layout.ring_size, "g")
        carry, moving = step(*state, owner)
        return (carry, jax.tree.map(lambda x: layout.place(jnp.roll(x, 1, axis=0), "g"), moving)), None

    return jax.lax.scan(body, (carry, moving), home)[0]


def _classes(plan: Plan, b: Array, owner: Array) -> Array:
    """[g, t, v]: the class ids of block b of the parts that belong to `owner`."""
    first = jnp.asarray(plan.layout.part_numbers() * plan.blocks.size, jnp.int32)[owner]
    return plan.layout.place(first[..., None] + plan.blocks.rows(b), "gt")


def _existing(plan: Plan, b: Array, mask: Array | None, classes: Array) -> Array | None:
    """[g, t, v]: which classes of block b exist and are in no earlier block; None where all are."""
    rules = [] if mask is None else [mask]
    if plan.vocab_size is not None:
        rules.append(classes < plan.vocab_size)
    if not plan.blocks.strided:
        rules.append(jnp.broadcast_to(plan.blocks.fresh(b), classes.shape))
    return functools.reduce(jnp.logical_and, rules) if rules else None


def _logits(plan: Plan, hidden: Array, block: _Vocab) -> Array:
    """[g, x, ..., t, v], capped; classes that do not exist still have a value here."""
    last = hidden.ndim - 1
    logits = _contract(hidden, block.table, ((last,), (3,)), ((0,), (0,)))
    if block.bias is not None:
        logits += _beside(block.bias.astype(logits.dtype), logits)
    if plan.soft_cap is not None:
        logits = plan.soft_cap * jnp.tanh(logits / plan.soft_cap)
    return logits


def _beside(x: Array, logits: Array) -> Array:
    """[g, t, v] -> [g, 1, ..., t, v]."""
    return x.reshape(x.shape[0], *[1] * (logits.ndim - 3), *x.shape[1:])


def _finite(x: Array) -> Array:
    """0 for -inf, so that exp(logits - x) of a token without any class is exp(-inf) and not NaN."""
    return jnp.where(jnp.isneginf(x), 0, x)


def _accumulator(hidden: Array, table: Array) -> jnp.dtype:
    return jnp.promote_types(jnp.promote_types(hidden.dtype, table.dtype), jnp.float32)


def _contract(x: Array, y: Array, over: _Dims, batch: _Dims) -> Array:
    """Product of x and y, summed over the dimensions `over` of each; the result has the dimensions `batch` first."""
    kind = jnp.promote_types(x.dtype, y.dtype)
    dims = ((tuple(over[0]), tuple(over[1])), (tuple(batch[0]), tuple(batch[1])))
    return jax.lax.dot_general(
        x.astype(kind), y.astype(kind), dims, preferred_element_type=jnp.promote_types(kind, jnp.float32)
    )
