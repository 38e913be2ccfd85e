"""Bottleneck adapters: a small feed-forward part with a residual behind parts of every block.

    z -> z + act(z D + d) U + u        D in R^{width x r}, U in R^{r x width}, U = 0 at first

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1: behind attention, that of a decoder
over an encoder too, and behind the feed-forward part, before each is added to the residual; norms are trained as well.
Pfeiffer et al. 2021, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning": behind the feed-forward
part alone.

Deviations: U begins at zero, so that a fresh adapter is the identity exactly; Houlsby draws D and U from a normal
distribution of standard deviation 0.01, as D is here. An adapter stands before the dropout of the residual, where the
authors' code has it after. Pfeiffer's reads what the feed-forward part puts out, not the norm over its sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import AdaptedLinear, at_least, axes_of, children, product, replace_linears, trained
from lmobj.adapt._marks import mark
from lmobj.errors import UserError
from lmobj.models._attention import CrossAttention
from lmobj.models._layers import ACTIVATIONS, LayerNorm, Linear, RMSNorm, truncated_normal

__all__ = ["BottleneckLinear", "Houlsby", "Pfeiffer"]

_ACTIVATIONS = {"relu": lambda x: jnp.maximum(x, 0), "gelu": ACTIVATIONS["gelu"]}


@dataclass(frozen=True)
class Houlsby:
    """Adapters behind every part of a block; the norms are trained with them."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["houlsby"] = "houlsby"
    """Bottlenecks behind attention and feed-forward part (Houlsby adapters)."""
    bottleneck: int = 64
    """r, at least 1."""
    activation: Literal["gelu", "relu"] = "gelu"
    """`gelu` (tanh approximation) or `relu`."""
    norms: bool = True
    """Whether the model's norms are trained."""

    places: ClassVar[tuple[str, ...]] = ("attention/out", "cross_attention/out", "mlp/down")

    def __post_init__(self) -> None:
        at_least(self, 1, "bottleneck")

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts the adapters into a model, in place."""
        across = any(isinstance(module, CrossAttention) for _, _, module in children(model))
        replace_linears(
            model,
            [place for place in self.places if across or not place.startswith("cross_attention")],
            lambda _, linear: BottleneckLinear(linear, self.bottleneck, self.activation, rngs),
            key="name",
        )
        if self.norms:
            for _, _, module in children(model):
                if isinstance(module, LayerNorm | RMSNorm):
                    mark(module, True)


@dataclass(frozen=True)
class Pfeiffer(Houlsby):
    """Adapters behind the feed-forward part."""

    name: Literal["pfeiffer"] = "pfeiffer"  # type: ignore[assignment]  # the tag of another method
    """Bottlenecks behind the feed-forward part (Pfeiffer adapters)."""
    bottleneck: int = 48
    """r, at least 1 (the paper: a 16th of the width)."""
    activation: Literal["gelu", "relu"] = "relu"
    """`gelu` (tanh approximation) or `relu`."""
    norms: bool = False
    """Whether the model's norms are trained."""

    places: ClassVar[tuple[str, ...]] = ("mlp/down",)


class BottleneckLinear(AdaptedLinear):
    """z + act(z D + d) U + u with z = x W + b."""

    def __init__(self, base: Linear, bottleneck: int, activation: Literal["gelu", "relu"], rngs: nnx.Rngs) -> None:
        super().__init__(base)
        *stacked, _, out = self.kernel.shape
        axis, dtype = axes_of(self)[1], self.kernel.dtype
        down = truncated_normal(0.01)(rngs.params(), (*stacked, out, bottleneck), dtype)
        self.activation = activation
        self.adapter_down = trained(down, (axis, None))
        self.adapter_down_bias = trained(jnp.zeros((*stacked, bottleneck), dtype), (None,))
        self.adapter_up = trained(jnp.zeros((*stacked, bottleneck, out), dtype), (None, axis))
        self.adapter_up_bias = trained(jnp.zeros((*stacked, out), dtype), (None,))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        z = super().__call__(x)
        inner = product(z, self.adapter_down) + self.adapter_down_bias[...].astype(x.dtype)
        inner = _ACTIVATIONS[self.activation](inner)
        return z + product(inner, self.adapter_up) + self.adapter_up_bias[...].astype(x.dtype)

    def merged(self) -> Linear:
        """Refuses: a linear map has no room for what is not linear."""
        raise UserError(
            "adapter.name is houlsby or pfeiffer, whose bottlenecks are not linear: they cannot be folded into the "
            "model's weights; accepted: the adapted model as it is, or lora, dora, adalora or ia3."
        )
