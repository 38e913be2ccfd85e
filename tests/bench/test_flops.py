"""FLOPs counted in compiled programs, against counts by hand: loops, blocks, recomputation, branches, whole steps."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import experiment

from lmobj.bench import matmul_flops, step_flops
from lmobj.errors import UserError
from lmobj.losses import linear_token_nll
from lmobj.train.assemble import Design, design
from lmobj.train.plan import planned_vocabulary
from lmobj.train.sharding import MeshConfig


def counted(function: Callable[..., Any], *arguments: Any) -> int:
    return matmul_flops(jax.jit(function).lower(*arguments).compile().as_text())


def _ones(*shape: int) -> jax.Array:
    return jnp.ones(shape)


def test_a_product_is_two_operations_for_each_multiplication() -> None:
    assert counted(jnp.matmul, _ones(5, 7), _ones(7, 11)) == 2 * 5 * 7 * 11
    # Batch axes multiply: 3 products of [5, 7] and [7, 11].
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), _ones(3, 5, 7), _ones(3, 7, 11)) == 3 * 770
    assert counted(lambda x: jnp.tanh(x) + 1, _ones(5, 7)) == 0


def test_what_a_loop_holds_counts_as_often_as_it_turns() -> None:
    def scanned(weights: Any, x: Any) -> Any:
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, weights)[0]

    weights, x = _ones(4, 16, 16), _ones(8, 16)
    one = 2 * 8 * 16 * 16
    assert counted(scanned, weights, x) == 4 * one
    # Backwards each layer has two products, for the weights and for what came in.
    assert counted(jax.grad(lambda w, x: scanned(w, x).sum(), argnums=(0, 1)), weights, x) == 3 * 4 * one
    # XLA's own figure has the body once, which is why we count ourselves. Should it change, this may go.
    own = jax.jit(scanned).lower(weights, x).compile().cost_analysis()["flops"]
    assert one <= own < 2 * one


def test_loops_in_loops_multiply() -> None:
    def nested(weights: Any, x: Any) -> Any:
        def outer(c: Any, ws: Any) -> Any:
            return jax.lax.scan(lambda d, w: (jnp.sin(d @ w), None), c, ws)[0], None

        return jax.lax.scan(outer, x, weights)[0]

    assert counted(nested, _ones(3, 5, 16, 16), _ones(8, 16)) == 3 * 5 * 2 * 8 * 16 * 16


def test_recomputation_counts_as_what_runs() -> None:
    def loss(weights: Any, x: Any, remat: bool) -> Any:
        def body(c: Any, w: Any) -> Any:
            return jnp.tanh(jnp.tanh(c @ w[0]) @ w[1])

        step = jax.checkpoint(body) if remat else body
        return jax.lax.scan(lambda c, w: (step(c, w), None), x, weights)[0].sum()

    one = 2 * 8 * 16 * 16
    weights, x = _ones(4, 2, 16, 16), _ones(8, 16)
    # Two products per layer forwards, four backwards; and both again where they are recomputed, the second for the
    # derivative of the outer tanh.
    assert counted(jax.grad(lambda w, x: loss(w, x, False), argnums=(0, 1)), weights, x) == 4 * 6 * one
    assert counted(jax.grad(lambda w, x: loss(w, x, True), argnums=(0, 1)), weights, x) == 4 * 8 * one


def test_the_blockwise_loss_computes_its_logits_twice() -> None:
    hidden, table, targets = _ones(32, 8), _ones(512, 8), jnp.zeros(32, int)
    one = 2 * 32 * 8 * 512

    def gradient(block: int | None) -> int:
        def loss(hidden: Any, table: Any) -> Any:
            return linear_token_nll(hidden, table, targets, block_size=block).sum()

        return counted(jax.grad(loss, argnums=(0, 1)), hidden, table)

    assert gradient(None) == 3 * one, "one block: logits, and the gradients of hidden states and table"
    assert gradient(128) == 4 * one, "four blocks: the logits once more, backwards"


def test_of_branches_the_dearest_counts() -> None:
    def branch(flag: Any, a: Any, b: Any) -> Any:
        return jax.lax.cond(flag, lambda: (a @ b) @ b, lambda: a @ b)

    assert counted(branch, True, _ones(8, 16), _ones(16, 16)) == 2 * 2 * 8 * 16 * 16


def test_loops_without_a_known_end_are_refused_where_they_hold_products() -> None:
    def until(x: Any, w: Any) -> Any:
        return jax.lax.while_loop(lambda c: c.sum() < 1e3, lambda c: c @ w, x)

    with pytest.raises(UserError, match="does not know how often it turns"):
        counted(until, _ones(8, 16), _ones(16, 16))
    assert counted(lambda x: jax.lax.while_loop(lambda c: c.sum() < 1e3, lambda c: c * 2, x), _ones(8)) == 0


# As XLA prints them for other devices: cuBLAS names what it contracts and gives a tuple with its workspace; TPUs write
# products as convolutions without a window.
_ELSEWHERE = """HloModule jit_f, is_scheduled=true

ENTRY %main.5 (Arg_0.1: f32[64,32], Arg_1.2: f32[32,128]) -> f32[64,128] {
  %Arg_0.1 = f32[64,32]{1,0} parameter(0)
  %Arg_1.2 = f32[32,128]{1,0} parameter(1)
  INSTRUCTION
}
"""
_CUBLAS = (
    '%cublas-gemm.1 = (f32[64,128]{1,0}, s8[4194304]{0}) custom-call(%Arg_0.1, %Arg_1.2), custom_call_target="__cublas'
    '$gemm", backend_config={"gemm_backend_config":{"alpha_real":1,"dot_dimension_numbers":{"lhs_contracting_dimensions'
    '":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}'
)
_TPU = "ROOT %convolution.1 = f32[64,128]{1,0} convolution(%Arg_0.1, %Arg_1.2), dim_labels=bf_io->bf"


@pytest.mark.parametrize("instruction", [_CUBLAS, _TPU])
def test_products_as_other_devices_write_them(instruction: str) -> None:
    assert matmul_flops(_ELSEWHERE.replace("INSTRUCTION", instruction)) == 2 * 64 * 32 * 128


@pytest.mark.parametrize(
    ("instruction", "part"),
    [
        ('%c = f32[64] custom-call(%Arg_0.1), custom_call_target="__cudnn$fmhaSoftmax"', "__cudnn$fmhaSoftmax"),
        ("%c = f32[64,128]{1,0} convolution(%Arg_0.1, %Arg_1.2), dim_labels=bf_io->bf, batch_group_count=2", "%c"),
    ],
)
def test_what_cannot_be_counted_is_refused(instruction: str, part: str) -> None:
    with pytest.raises(UserError, match="cannot be counted") as error:
        matmul_flops(_ELSEWHERE.replace("INSTRUCTION", instruction))
    assert part.strip("%") in str(error.value)


# --- whole training steps -----------------------------------------------------------------------------------------

_WIDTH, _LAYERS, _ROWS, _LENGTH, _TABLE = 16, 2, 8, 16, 384
"""Of `tiny_runs.experiment`; the table of 320 pieces is padded to a multiple of 128."""


def _design(remat: str, devices: int = 1) -> Design:
    changes = {"model": {"remat": remat}, "train": {"mesh": MeshConfig(data=devices)}}
    config = experiment(pathlib.Path("unread.txt"), "unwritten", **changes)  # type: ignore[arg-type]
    return design(config, planned_vocabulary(config.data.tokenizer))


@functools.cache
def _step(remat: str, devices: int = 1) -> int:
    parts = _design(remat, devices)
    return step_flops(parts, parts.lower_train_step().compile().as_text() or "")


def test_a_gpt_step_is_what_its_shapes_say() -> None:
    tokens = _ROWS * _LENGTH
    # Query, key, value and output of the attention, and the two matrices of the feed-forward part, 4 * width wide.
    weights = _LAYERS * (4 * _WIDTH * _WIDTH + 2 * _WIDTH * 4 * _WIDTH)
    # Queries with keys, and probabilities with values: each row of every layer has L * L * width multiplications.
    attention = _LAYERS * 2 * (2 * _LENGTH * _WIDTH) * tokens
    forwards = 2 * weights * tokens + attention
    head = 2 * _TABLE * _WIDTH * tokens
    assert _step("none") == 3 * (forwards + head), "backwards there are two products for each one forwards"
    # Everything in the blocks again, but for the last product of each, whose result nothing backwards needs.
    last = _LAYERS * 2 * 4 * _WIDTH * _WIDTH * tokens
    assert _step("block") == 3 * (forwards + head) + forwards - last


def test_devices_share_the_work() -> None:
    assert _step("none", devices=8) == _step("none")
