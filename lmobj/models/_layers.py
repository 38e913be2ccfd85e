"""Layers that every family is made of: linear maps, norms, embeddings, rotary positions and the feed-forward part.

Parameters are stored in `param_dtype` and cast to the input's dtype where they are used; the input's dtype is the
compute dtype. Every parameter carries the logical name of each of its axes (see `lmobj.partition`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from lmobj.models._protocol import OutputHead
from lmobj.partition import constrain, constrain_to, mesh_axes

__all__ = [
    "ACTIVATIONS",
    "GATED",
    "MLP",
    "Activation",
    "Axes",
    "DTypeName",
    "Embedding",
    "FeedForward",
    "Init",
    "LayerNorm",
    "Linear",
    "Norm",
    "RMSNorm",
    "apply_rotary",
    "fan_in",
    "glorot_uniform",
    "normal",
    "output_head",
    "pad_vocabulary",
    "rotary_angles",
    "scaled",
    "truncated_normal",
    "uniform",
    "zeros",
]

Axes = tuple[str | None, ...]
DTypeName = Literal["float32", "bfloat16", "float64"]
Activation = Literal["gelu", "gelu_exact", "relu", "swiglu", "geglu"]
Init = Callable[[Key[Array, ""], tuple[int, ...], jnp.dtype], Array]
"""(key, shape, dtype) -> initial values."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,
    "geglu": lambda x: jax.nn.gelu(x, approximate=True),
}
"""Of the feed-forward part: GELU by tanh (GPT-2), GELU itself (BERT), ReLU (the Transformer), and of a gate SiLU, or
GELU by tanh (T5 1.1; Shazeer 2020)."""

GATED = ("swiglu", "geglu")
"""Activations of a gate, which is a third matrix of the feed-forward part."""


def normal(std: float) -> Init:
    """Normal initial values."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def truncated_normal(std: float) -> Init:
    """Normal values of standard deviation `std`, redrawn beyond two of them (TensorFlow's, which BERT uses)."""
    return lambda key, shape, dtype: std * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


def uniform(bound: float) -> Init:
    """Uniform values in [-bound, bound)."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def glorot_uniform() -> Init:
    """Uniform values within sqrt(6 / (inputs + outputs)), TensorFlow's default (Glorot and Bengio 2010, eq. 16)."""

    def init(key: Key[Array, ""], shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        return uniform(math.sqrt(6 / (shape[-2] + shape[-1])))(key, shape, dtype)

    return init


def fan_in() -> Init:
    """Normal values of standard deviation 1 / sqrt(inputs)."""
    return lambda key, shape, dtype: normal(1 / math.sqrt(shape[-2]))(key, shape, dtype)


def scaled(init: Init, factor: float) -> Init:
    """Other initial values times a factor."""
    return lambda key, shape, dtype: factor * init(key, shape, dtype)


def zeros() -> Init:
    """Zeros."""
    return lambda key, shape, dtype: jnp.zeros(shape, dtype)


class Linear(nnx.Module):
    """y = x @ kernel + bias, the kernel stored [in, out]."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        init: Init,
        bias: bool,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = nnx.Param(init(rngs.params(), (in_features, out_features), param_dtype), axes=axes)
        # A bias as long as the model is wide is whole on each device: gathering it would cost more than it saves.
        bias_axes = tuple(None if axis == "embed" else axis for axis in axes[1:])
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype), axes=bias_axes) if bias else None

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        shape = x.shape
        if not mesh_axes("length"):  # rows and length that are both cut over devices cannot be one axis
            # A product of two matrices: with more axes, XLA's CPU backend takes twice as long over the kernel's
            # gradient.
            x = x.reshape(-1, shape[-1])
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y.reshape(*shape[:-1], -1)


class LayerNorm(nnx.Module):
    """Ba et al. 2016: (x - mean) / sqrt(variance + eps) * scale + bias, in `promote_types(x, float32)`."""

    def __init__(self, width: int, *, eps: float, bias: bool, param_dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones((width,), param_dtype), axes=(None,))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype), axes=(None,)) if bias else None
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        centred = precise - jnp.mean(precise, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.eps) * self.scale[...].astype(precise.dtype)
        if self.bias is not None:
            y = y + self.bias[...].astype(precise.dtype)
        return y.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Zhang and Sennrich 2019, eq. 4: x / sqrt(mean(x^2) + eps) * scale, in `promote_types(x, float32)`."""

    def __init__(self, width: int, *, eps: float, param_dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.ones((width,), param_dtype), axes=(None,))
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean_square = jnp.mean(jnp.square(precise), axis=-1, keepdims=True)
        y = precise * jax.lax.rsqrt(mean_square + self.eps) * self.scale[...].astype(precise.dtype)
        return y.astype(x.dtype)


Norm = LayerNorm | RMSNorm


class Embedding(nnx.Module):
    """A table of vectors, read by index. Indices outside the table read its nearest end."""

    def __init__(
        self, size: int, width: int, *, axes: Axes, init: Init, param_dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.table = nnx.Param(init(rngs.params(), (size, width), param_dtype), axes=axes)
        self.axes = axes

    def __call__(self, indices: Int[Array, "*shape"], dtype: jnp.dtype) -> Float[Array, "*shape D"]:
        table = self.table[...].astype(dtype)
        width, rows = mesh_axes(self.axes[-1] or ""), mesh_axes("batch")
        if indices.ndim != 2 or not width.keys() & rows.keys():
            return jnp.take(table, indices, axis=0, mode="clip")
        # Rows and width are cut over the same devices: each looks up its part of the width for the rows of all, and
        # vectors change places. The partitioner on its own would gather the table.
        others = tuple(axis for axis in rows if axis not in width)
        x = jnp.take(table, constrain_to(indices, (others, ())), axis=0, mode="clip")
        return constrain(constrain_to(x, (others, (), tuple(width))), ("batch", "length", "activation_embed"))


class FeedForward(nnx.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) with a gate (Shazeer 2020, eq. 6), of linear maps of any kind."""

    activation: Activation
    gate: Callable[[Array], Array] | None
    up: Callable[[Array], Array]
    down: Callable[[Array], Array]

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        act = ACTIVATIONS[self.activation]
        y = act(self.up(x)) if self.gate is None else act(self.gate(x)) * self.up(x)
        return self.down(y)


class MLP(FeedForward):
    """The feed-forward part of a block."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        *,
        activation: Activation,
        bias: bool,
        init: Init,
        out_init: Init,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        def into() -> Linear:
            return Linear(
                width, mlp_width, axes=("embed", "mlp"), init=init, bias=bias, param_dtype=param_dtype, rngs=rngs
            )

        self.activation = activation
        self.gate = into() if activation in GATED else None
        self.up = into()
        self.down = Linear(
            mlp_width, width, axes=("mlp", "embed"), init=out_init, bias=bias, param_dtype=param_dtype, rngs=rngs
        )


def rotary_angles(
    positions: Int[Array, "B L"], head_dim: int, base: float, dtype: jnp.dtype
) -> tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]:
    """Cosines and sines of position * base^(-2 i / head_dim), i < head_dim / 2, in `promote_types(dtype, float32)`.

    Su et al. 2021, "RoFormer", eq. 15.
    """
    precise = jnp.promote_types(dtype, jnp.float32)
    frequency = base ** (-jnp.arange(0, head_dim, 2, dtype=precise) / head_dim)
    angle = positions[:, :, None, None].astype(precise) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(
    x: Float[Array, "B L H Dh"], angles: tuple[Float[Array, "B L 1 half"], Float[Array, "B L 1 half"]]
) -> Float[Array, "B L H Dh"]:
    """Rotates the pairs (x_i, x_{i + Dh/2}) by their angles.

    The paper pairs neighbours (x_{2i}, x_{2i+1}); halves are the layout of GPT-NeoX and LLaMA checkpoints.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def output_head(
    embedding: Embedding, vocab_size: int, *, bias: Float[Array, " V"] | None = None, soft_cap: float | None = None
) -> OutputHead:
    """The output head that reads an embedding's table, which may be padded."""
    table = embedding.table[...]
    return OutputHead(table, bias, soft_cap, vocab_size if vocab_size < table.shape[0] else None)


def pad_vocabulary(size: int, multiple: int) -> int:
    """The number of table rows: `size` rounded up to a multiple."""
    return -(-size // multiple) * multiple
