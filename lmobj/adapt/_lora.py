"""LoRA: the change of a weight matrix is a product of two thin ones.

    y = x W + b + s (x A) B        A in R^{in x r}, B in R^{r x out}, B = 0 at first

with s = alpha / r (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", eq. 3, where A and B have each
other's names for PyTorch's [out, in]) or s = alpha / sqrt(r), with which the size of the change does not depend on the
rank (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", theorem 3.2).

Training never forms A B, which is as large as W. Deviations: A begins uniform within 1 / sqrt(in), as in the authors'
code; the paper has Gaussian values. There is no dropout of x, because layers are not told the seeds of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import AdaptedLinear, at_least, axes_of, positive, precise, product, replace_linears, trained
from lmobj.models._layers import Linear, uniform

__all__ = ["LoRA", "LoRALinear"]


@dataclass(frozen=True)
class LoRA:
    """Thin matrices beside the model's; by default beside those of queries and values, as in the paper."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["lora"] = "lora"
    """Low-rank adapters (LoRA, rsLoRA)."""
    rank: int = 8
    """r, at least 1."""
    alpha: float = 16.0
    """Numerator of the scale, above 0."""
    scaling: Literal["rank", "root_rank"] = "rank"
    """The scale is alpha / r (`rank`, LoRA) or alpha / sqrt(r) (`root_rank`, rsLoRA)."""
    targets: tuple[str, ...] = ("query", "value")
    """Linear maps to adapt, by name: query, key, value, out, gate, up, down, ...; `attention/out` is none but that."""

    def __post_init__(self) -> None:
        at_least(self, 1, "rank")
        positive(self, "alpha")

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts the adapters into a model, in place."""
        replace_linears(model, self.targets, lambda _, linear: LoRALinear(linear, self, rngs))


class LoRALinear(AdaptedLinear):
    """y = x W + b + s (x A) B."""

    def __init__(self, base: Linear, config: LoRA, rngs: nnx.Rngs) -> None:
        super().__init__(base)
        *stacked, into, out = self.kernel.shape
        axis_in, axis_out = axes_of(self)
        dtype = self.kernel.dtype
        a = uniform(1 / math.sqrt(into))(rngs.params(), (*stacked, into, config.rank), dtype)
        self.lora_a = trained(a, (axis_in, None))
        self.lora_b = trained(jnp.zeros((*stacked, config.rank, out), dtype), (None, axis_out))
        self.scale = config.scale

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        return super().__call__(x) + self.scale * product(x, self.lora_a, self.lora_b)

    def merged(self) -> Linear:
        """The linear map with the kernel W + s A B."""
        kernel, a, b = precise(self.kernel, self.lora_a, self.lora_b)
        return self.linear(kernel + self.scale * (a @ b), None if self.bias is None else self.bias[...])
