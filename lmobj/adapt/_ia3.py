"""(IA)^3: activations are rescaled by learnt vectors.

    k -> l_k * k        v -> l_v * v        down(l_ff * act(up(x)))        l = 1 at first

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", section 3.3.
Keys and values are scaled with their biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import AdaptedLinear, axes_of, is_named, precise, replace_linears, trained, vector_axes
from lmobj.errors import UserError
from lmobj.models._layers import Linear

__all__ = ["IA3", "IA3Linear"]


@dataclass(frozen=True)
class IA3:
    """A vector for each of the chosen linear maps."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["ia3"] = "ia3"
    """Rescaled activations ((IA)^3)."""
    targets: tuple[str, ...] = ("key", "value", "down")
    """Linear maps to adapt, by name."""
    inputs: tuple[str, ...] = ("down",)
    """Those of `targets` whose input is rescaled; of the others it is the output."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.inputs if name not in self.targets]
        if unknown:
            raise UserError(f"adapter.inputs has {unknown[0]!r}; accepted: some of adapter.targets, {self.targets}.")

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts the vectors into a model, in place."""

        def rescaled(path: str, linear: Linear) -> IA3Linear:
            return IA3Linear(linear, on_input=any(is_named(path, name) for name in self.inputs))

        replace_linears(model, self.targets, rescaled)


class IA3Linear(AdaptedLinear):
    """y = l * (x W + b), or (l * x) W + b."""

    def __init__(self, base: Linear, *, on_input: bool) -> None:
        super().__init__(base)
        *stacked, into, out = self.kernel.shape
        axis = axes_of(self)[0 if on_input else 1]
        self.on_input = on_input
        self.scale = trained(jnp.ones((*stacked, into if on_input else out), self.kernel.dtype), vector_axes(axis))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        scale = self.scale[...].astype(x.dtype)
        return super().__call__(x * scale) if self.on_input else super().__call__(x) * scale

    def merged(self) -> Linear:
        """The linear map with rescaled rows, or with rescaled columns and bias."""
        kernel, scale = precise(self.kernel, self.scale)
        if self.on_input:
            return self.linear(kernel * scale[..., :, None], None if self.bias is None else self.bias[...])
        return self.linear(kernel * scale[..., None, :], None if self.bias is None else self.bias[...] * scale)
