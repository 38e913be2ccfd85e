"""Heads that predict tokens further ahead than the next one: blocks like the model's own, one for each token.

Head k of n predicts the token k + 1 places ahead, and what it puts out is scored against the model's output table. The
model itself predicts the next one. Like the model's blocks those of the heads are stacked, and run by one scan.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lmobj.models._block import HIDDEN_AXES, Block, BlockStates, BlockStyle, Call, make_norm, rematerialised
from lmobj.models._layers import Linear, RMSNorm
from lmobj.models._protocol import BlockModel
from lmobj.partition import constrain

__all__ = ["ParallelHeads", "SequentialHeads"]


class ParallelHeads(nnx.Module):
    """Heads side by side, each a block in the place of the model's last: norm(block_k(the last block's input)).

    Gloeckle et al. 2024, section 2. The norm is the model's own, as in the code that was published with the paper.
    """

    def __init__(self, blocks: BlockStyle, count: int, rngs: nnx.Rngs) -> None:
        self.stack = blocks.further(count).stack(rngs)
        self.stack.first = blocks.spec.layers  # dropout draws apart from the model's layers

    def __call__(self, model: BlockModel, states: BlockStates) -> Float[Array, "n B L D"]:
        """What the heads put out."""
        return model.finish(self.stack.side_by_side(states.before_last, states.call))


class SequentialHeads(nnx.Module):
    """Heads one after the other, each of which reads one more token than the one before (`SequentialHead`).

    DeepSeek-AI 2024, section 2.2. The first reads the model's final hidden states.
    """

    def __init__(self, blocks: BlockStyle, count: int, rngs: nnx.Rngs) -> None:
        def head(key: Array) -> SequentialHead:
            return SequentialHead(further, nnx.Rngs(params=key))

        further = blocks.further(count)
        self.spec = further.spec
        self.first = blocks.spec.layers
        self.heads = nnx.vmap(head)(jax.random.split(rngs.params(), count))

    def __call__(self, model: BlockModel, states: BlockStates) -> Float[Array, "n B L D"]:
        """What the heads put out."""
        graphdef, heads = nnx.split(self.heads)

        def body(carry: tuple[Array, Array], head: Any) -> tuple[tuple[Array, Array], Array]:
            hidden, tokens = carry
            tokens = _next(tokens)
            hidden = constrain(nnx.merge(graphdef, head[0])(hidden, tokens, head[1], states.call), HIDDEN_AXES)
            return (hidden, tokens), hidden

        indices = self.first + jnp.arange(self.spec.layers)
        start = states.hidden, states.embedded
        return jax.lax.scan(rematerialised(body, self.spec.remat), start, (heads, indices))[1]


class SequentialHead(nnx.Module):
    """norm(block(M [RMSNorm(h_t); RMSNorm(e_{t+k})])), of the states h before it and the embedded tokens e.

    The block sees the earlier positions that the model's blocks see, by the positions t: those of the tokens e differ
    from them by k throughout. Nothing of a document's positions before its last k comes from another document, or from
    beyond the row.
    """

    def __init__(self, blocks: BlockStyle, rngs: nnx.Rngs) -> None:
        spec, init = blocks.spec, blocks.init

        def norm() -> RMSNorm:
            return RMSNorm(spec.width, eps=spec.norm_eps, param_dtype=spec.param_dtype)

        self.hidden_norm = norm()
        self.token_norm = norm()
        self.join = Linear(
            2 * spec.width,
            spec.width,
            axes=("embed", "embed"),
            init=init,
            bias=False,
            param_dtype=spec.param_dtype,
            rngs=rngs,
        )
        self.block = Block(spec, init=init, out_init=blocks.out_init, rngs=rngs)
        self.norm = None if spec.post_norm else make_norm(spec)

    def __call__(
        self, hidden: Float[Array, "B L D"], tokens: Float[Array, "B L D"], layer: Int[Array, ""], call: Call
    ) -> Float[Array, "B L D"]:
        """What the head puts out, which is also what the next one reads."""
        joined = jnp.concatenate([self.hidden_norm(hidden), self.token_norm(tokens)], axis=-1)
        y = self.block(constrain(self.join(joined), HIDDEN_AXES), layer, call)[0]
        return y if self.norm is None else self.norm(y)


def _next(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """x_{t+1} at t; zeros at the end."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1), (0, 0)))
