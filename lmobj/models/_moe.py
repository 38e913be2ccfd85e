"""A mixture of experts in place of the feed-forward part: each token is worked on by the k experts its router prefers.

    p = softmax(x W_r)                                   over the experts, in promote_types(x, float32)
    y = sum_{e in top-k of p} g_e FFN_e(x)               g_e = p_e, or p_e / sum of the chosen p

Shazeer et al. 2017, "Outrageously Large Neural Networks"; Lepikhin et al. 2020, "GShard", algorithm 1; Fedus et al.
2021, "Switch Transformers", section 2; Jiang et al. 2024, "Mixtral of Experts", section 2.1.

Every row of a batch routes by itself: an expert has room for C = ceil(k * L * capacity_factor / E) of its L tokens, at
most L. A row's output then depends on no other row, and so neither on microbatches nor on the mesh. Places are given
out in reading order, to all k choices of a token before any of the next: what becomes of a token depends on the tokens
before it alone, as a causal model needs. A choice that finds no place is dropped; it adds nothing, and the token goes
on by the residual (and by its other choices). Padding is not routed and takes no place. Documents that are packed into
one row share its places in reading order; with `capacity_factor: null` nothing is dropped and they are independent.

Deviations: GShard and Switch give places to all first choices before any second one, which lets tokens further on
decide what becomes of earlier ones, and group tokens across rows; GShard drops a second choice at random by its gate.

Tokens are moved by indices, [B, E, C] of them, with no [B, L, E, C] array. Both ways are gathers, forwards and
backwards: the gradient of one is the other, so that nothing is added up in an order that could change.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError
from lmobj.models._layers import GATED, Activation, Axes, FeedForward, Init
from lmobj.models._routing import RouterSums
from lmobj.partition import constrain, constrain_to, mesh_axes

__all__ = ["MoE", "MoEConfig"]

_ROWS = ("batch", None, "activation_embed")
"""Rows whole on each device, since each routes by itself."""


@dataclass(frozen=True)
class MoEConfig:
    """Experts in place of each layer's feed-forward part. The defaults are Mixtral's, but for its capacity."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    experts: int = 8
    """Experts in each layer, at least 2; a multiple of train.mesh.expert."""
    experts_per_token: int = 2
    """Experts that work on each token, at most `experts`."""
    capacity_factor: float | None = 2.0
    """Room in an expert for a row's tokens, above 0, as a multiple of an even share; what finds none is dropped. null:
    room for all of them, at experts / experts_per_token times the work of an even share."""
    normalise: bool = True
    """Whether the gates of a token's experts add up to 1 (Mixtral); false: the router's probabilities (Switch)."""

    def __post_init__(self) -> None:
        if self.experts < 2:
            raise UserError(f"model.moe.experts is {self.experts}; it must be at least 2.")
        if not 1 <= self.experts_per_token <= self.experts:
            raise UserError(
                f"model.moe.experts_per_token is {self.experts_per_token}; it must be from 1 to model.moe.experts, "
                f"{self.experts}."
            )
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            raise UserError(
                f"model.moe.capacity_factor is {self.capacity_factor}; it must be a finite number above 0, or null."
            )
        if self.normalise and self.experts_per_token == 1:
            raise UserError(
                "model.moe.normalise is true and model.moe.experts_per_token is 1: every gate would be 1, and the "
                "router would learn nothing from the model's loss; accepted: normalise=false, or more experts."
            )

    def capacity(self, length: int) -> int:
        """C, the places that an expert has for one row of `length` tokens."""
        if self.capacity_factor is None:
            return length
        even = self.experts_per_token * length / self.experts
        return min(length, math.ceil(even * self.capacity_factor - 1e-9))  # 1.1 * 10 is 11, and a little more in floats


class Places(NamedTuple):
    """Who goes where in a row: the two directions of one matching of choices with places.

    choices: of each place, the number token * k + choice of the pair in it; L * k where it is empty.
    places: of each pair, the number expert * C + place; E * C where it was dropped or its token is padding.
    """

    choices: Int[Array, "B EC"]
    places: Int[Array, "B Lk"]


class Experts(FeedForward):
    """E feed-forward parts side by side, of the kind of `MLP`, with kernels [E, D, F] and [E, F, D]."""

    def __init__(
        self,
        experts: int,
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
        linear = functools.partial(_Linears, experts, bias=bias, param_dtype=param_dtype, rngs=rngs)
        self.activation = activation
        self.gate = linear(width, mlp_width, axes=("embed", "mlp"), init=init) if activation in GATED else None
        self.up = linear(width, mlp_width, axes=("embed", "mlp"), init=init)
        self.down = linear(mlp_width, width, axes=("mlp", "embed"), init=out_init)


class _Linears(nnx.Module):
    """y_e = x_e @ kernel_e + bias_e for each expert e."""

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        init: Init,
        bias: bool,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        kernel = init(rngs.params(), (experts, in_features, out_features), param_dtype)
        self.kernel = nnx.Param(kernel, axes=("experts", *axes))
        bias_axes = ("experts", *(None if axis == "embed" else axis for axis in axes[1:]))
        self.bias = nnx.Param(jnp.zeros((experts, out_features), param_dtype), axes=bias_axes) if bias else None

    def __call__(self, x: Float[Array, "B E C I"]) -> Float[Array, "B E C O"]:
        y = jnp.einsum("beci,eio->beco", x, self.kernel[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)[:, None]


class MoE(nnx.Module):
    """Router and experts of one layer."""

    def __init__(
        self,
        config: MoEConfig,
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
        self.config = config
        # Whole on every device but for FSDP's share of it: it is small, and each token needs all of it.
        kernel = init(rngs.params(), (width, config.experts), param_dtype)
        self.router = nnx.Param(kernel, axes=("embed", None))
        self.experts = Experts(
            config.experts,
            width,
            mlp_width,
            activation=activation,
            bias=bias,
            init=init,
            out_init=out_init,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B L D"], routed: Bool[Array, "B L"], *, dropless: bool = False
    ) -> tuple[Float[Array, "B L D"], RouterSums]:
        """The experts' output, 0 where nothing was routed, and the router's sums without an axis of layers.

        Args:
          x: what the router and the experts read.
          routed: the tokens that are no padding.
          dropless: with room for every choice, whatever the settings.
        """
        config = self.config
        B, L, D = x.shape
        E, k = config.experts, config.experts_per_token
        C = L if dropless else config.capacity(L)
        x = constrain(x, _ROWS)
        logits = _router_logits(x, self.router[...])
        probabilities = jax.nn.softmax(logits)
        chosen = _top_k(jax.lax.stop_gradient(logits), k)
        gates = jnp.take_along_axis(probabilities, chosen, axis=-1)
        if config.normalise:
            gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
        places, counts = _give_places(chosen, routed, experts=E, capacity=C)
        inputs = _to_experts(_dispatch(x, places, k).reshape(B, E, C, D))
        outputs = _to_rows(self.experts(inputs)).reshape(B, E * C, D)
        each = _collect(outputs, places, k).astype(gates.dtype)
        y = jnp.sum(each * gates[..., None], axis=2).astype(x.dtype)
        precise = gates.dtype
        lse = jax.nn.logsumexp(logits, axis=-1)
        kept = jnp.sum(places.places < E * C)
        sums = RouterSums(
            counts=counts.astype(precise),
            probabilities=jnp.sum(probabilities * routed[..., None], axis=(0, 1)),
            squares=jnp.sum(jnp.square(lse) * routed),
            dropped=(k * jnp.sum(routed) - kept).astype(precise),
        )
        return constrain(y, _ROWS), sums


def _router_logits(x: Float[Array, "B L D"], kernel: Float[Array, "D E"]) -> Float[Array, "B L E"]:
    """x W_r in `promote_types(x, float32)`, in full where the device would round float32 products."""
    precise = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.matmul(x.astype(precise), kernel.astype(precise), precision=jax.lax.Precision.HIGHEST)


def _top_k(logits: Float[Array, "B L E"], k: int) -> Int[Array, "B L k"]:
    """The k best experts of each token, best first; of equals the one with the lower number.

    One maximum after another: `jax.lax.top_k` is a call that the partitioner runs on the rows of all devices at once.
    """
    best = []
    for _ in range(k):
        best.append(jnp.argmax(logits, axis=-1))
        logits = jnp.where(jax.nn.one_hot(best[-1], logits.shape[-1], dtype=bool), -jnp.inf, logits)
    return jnp.stack(best, axis=-1).astype(jnp.int32)


def _give_places(
    chosen: Int[Array, "B L k"], routed: Bool[Array, "B L"], *, experts: int, capacity: int
) -> tuple[Places, Int[Array, " E"]]:
    """Gives the places of each row's experts out in reading order, and counts who wanted one, by expert.

    The choices of a token are experts that differ, so that their order among themselves does not matter.
    """
    B, L, k = chosen.shape
    wanted = jax.nn.one_hot(chosen, experts, dtype=jnp.int32).sum(axis=2) * routed[..., None]
    before = jnp.cumsum(wanted, axis=1) - wanted
    place = jnp.take_along_axis(before, chosen, axis=2)
    kept = routed[..., None] & (place < capacity)
    places = jnp.where(kept, chosen * capacity + place, experts * capacity).reshape(B, L * k)
    empty = jnp.full((experts * capacity,), L * k, jnp.int32)
    pairs = jnp.arange(L * k, dtype=jnp.int32)
    choices = jax.vmap(lambda at: empty.at[at].set(pairs, mode="drop"))(places)
    return Places(choices, places), jnp.sum(wanted, axis=(0, 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dispatch(x: Float[Array, "B L D"], places: Places, k: int) -> Float[Array, "B EC D"]:
    """The token in each place; 0 in empty ones."""
    return _taken(x, places.choices // k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _collect(y: Float[Array, "B EC D"], places: Places, k: int) -> Float[Array, "B L k D"]:
    """What came out of each choice's place; 0 for dropped ones. Its transpose summed over choices is `_dispatch`."""
    taken = _taken(y, places.places)
    return taken.reshape(taken.shape[0], -1, k, taken.shape[-1])


def _taken(x: Float[Array, "B N D"], indices: Int[Array, "B M"]) -> Float[Array, "B M D"]:
    """Each row's vectors at `indices`; 0 for the index N."""
    return jnp.take_along_axis(x, indices[..., None], axis=1, mode="fill", fill_value=0)


def _without_gradient(places: Places) -> Any:
    return jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), places)


def _dispatch_forwards(x: Any, places: Places, k: int) -> tuple[Any, Places]:
    return _dispatch(x, places, k), places


def _dispatch_backwards(k: int, places: Places, gradient: Any) -> tuple[Any, Any]:
    return jnp.sum(_collect(gradient, places, k), axis=2), _without_gradient(places)


def _collect_forwards(y: Any, places: Places, k: int) -> tuple[Any, Places]:
    return _collect(y, places, k), places


def _collect_backwards(k: int, places: Places, gradient: Any) -> tuple[Any, Any]:
    B, L, _, D = gradient.shape
    return _taken(gradient.reshape(B, L * k, D), places.choices), _without_gradient(places)


_dispatch.defvjp(_dispatch_forwards, _dispatch_backwards)
_collect.defvjp(_collect_forwards, _collect_backwards)


def _to_experts(x: Float[Array, "B E C D"]) -> Float[Array, "B E C D"]:
    """Spread over experts instead of over rows, on the mesh axes that spread experts: all-to-alls between them."""
    rows, experts = tuple(mesh_axes("batch")), tuple(mesh_axes("experts"))
    if not experts:
        return x
    left = tuple(axis for axis in rows if axis not in experts)
    return constrain_to(constrain_to(x, (rows, (), (), ())), (left, experts, (), ()))


def _to_rows(x: Float[Array, "B E C D"]) -> Float[Array, "B E C D"]:
    """Undoes `_to_experts`."""
    rows, experts = tuple(mesh_axes("batch")), tuple(mesh_axes("experts"))
    if not experts:
        return x
    left = tuple(axis for axis in rows if axis not in experts)
    return constrain_to(constrain_to(x, (left, experts, (), ())), (rows, (), (), ()))
