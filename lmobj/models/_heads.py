"""Heads: what objectives put on a model's hidden states beside its vocabulary head.

A head is a module of its own, built in the style of the model it stands on, so any family can carry any head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lmobj.models._block import BlockStyle
from lmobj.models._layers import ACTIVATIONS, Activation, Embedding, Init, LayerNorm, Linear
from lmobj.partition import constrain

__all__ = ["HeadStyle", "JoinedHead", "PairHead", "SpanBoundaryHead", "TokenHead", "VectorHead"]

_ROW_AXES = ("batch", "activation_embed")
"""A vector for each row. Left alone, the partitioner may gather it to meet a matrix that is spread over `embed`."""


class HeadStyle(NamedTuple):
    """What a head takes over from its model: `model.head_style`."""

    width: int
    """Width of the hidden states."""
    activation: Activation
    norm_eps: float
    """Added to the variance in LayerNorm."""
    init: Init
    """Of its weights; biases begin at zero."""
    param_dtype: jnp.dtype
    blocks: BlockStyle | None = None
    """How the model's blocks are made, where others can run beside them (`BlockModel`); None where none can."""

    def dense(self, into: int, out: int, rngs: nnx.Rngs) -> Linear:
        """A linear map with bias, in this style."""
        axes = ("embed", None) if out < into else ("embed", "embed")
        return Linear(into, out, axes=axes, init=self.init, bias=True, param_dtype=self.param_dtype, rngs=rngs)


class PairHead(nnx.Module):
    """Classes of a whole row: dense(tanh(dense(hidden state of the first token))) (Devlin et al. 2019, section 3.1)."""

    def __init__(self, style: HeadStyle, classes: int, rngs: nnx.Rngs) -> None:
        self.pooler = style.dense(style.width, style.width, rngs)
        self.classifier = style.dense(style.width, classes, rngs)

    def pooled(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        """tanh(dense(hidden state of the first token))."""
        return constrain(jnp.tanh(self.pooler(constrain(hidden[:, 0], _ROW_AXES))), _ROW_AXES)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B C"]:
        """Logits of the classes."""
        return constrain(self.classifier(self.pooled(hidden)), ("batch", None))


class SpanBoundaryHead(nnx.Module):
    """A token of a span from the hidden states on both sides of it and its place in it.

    Joshi et al. 2020, section 3.2: y = f(f([h_left; h_right; e_offset])) with f(x) = LayerNorm(activation(dense(x))),
    which is scored against the model's output table, with a bias of this head's own.
    """

    def __init__(
        self, style: HeadStyle, vocab_size: int, rngs: nnx.Rngs, *, max_targets: int = 15, offset_width: int = 200
    ) -> None:
        def norm() -> LayerNorm:
            return LayerNorm(style.width, eps=style.norm_eps, bias=True, param_dtype=style.param_dtype)

        self.activation = style.activation
        self.offsets = Embedding(
            max_targets, offset_width, axes=(None, None), init=style.init, param_dtype=style.param_dtype, rngs=rngs
        )
        self.first = style.dense(2 * style.width + offset_width, style.width, rngs)
        self.first_norm = norm()
        self.second = style.dense(style.width, style.width, rngs)
        self.second_norm = norm()
        self.bias = nnx.Param(jnp.zeros((vocab_size,), style.param_dtype), axes=(None,))

    def __call__(
        self, left: Float[Array, "B K D"], right: Float[Array, "B K D"], offset: Int[Array, "B K"]
    ) -> Float[Array, "B K D"]:
        """The predictions' vectors; offsets count from 0."""
        act = ACTIVATIONS[self.activation]
        x = jnp.concatenate([left, right, self.offsets(offset, left.dtype)], axis=-1)
        x = self.first_norm(act(self.first(x)))
        return self.second_norm(act(self.second(x)))


class TokenHead(nnx.Module):
    """Logits of each token by a linear map of its hidden state: classes, or the ends of a span (Devlin et al. 2019)."""

    def __init__(self, style: HeadStyle, out: int, rngs: nnx.Rngs) -> None:
        self.classifier = style.dense(style.width, out, rngs)

    def __call__(self, hidden: Float[Array, "B L D"]) -> Float[Array, "B L C"]:
        """The logits."""
        return constrain(self.classifier(hidden), ("batch", "length", None))


class VectorHead(nnx.Module):
    """Another vector of a text: tanh(dense(x)), as wide as it was (Gao et al. 2021, section 6.3)."""

    def __init__(self, style: HeadStyle, rngs: nnx.Rngs) -> None:
        self.dense = style.dense(style.width, style.width, rngs)

    def __call__(self, states: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The vectors."""
        axes = ("batch", None, "activation_embed")
        return constrain(jnp.tanh(self.dense(constrain(states, axes))), axes)


class JoinedHead(nnx.Module):
    """Classes by a linear map of several states, side by side (Baldini Soares et al. 2019, section 3.2.2)."""

    def __init__(self, style: HeadStyle, states: int, classes: int, rngs: nnx.Rngs) -> None:
        self.classifier = style.dense(states * style.width, classes, rngs)

    def __call__(self, states: Float[Array, "B N D"]) -> Float[Array, "B C"]:
        """The logits."""
        return constrain(self.classifier(constrain(states.reshape(len(states), -1), _ROW_AXES)), ("batch", None))
