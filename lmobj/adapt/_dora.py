"""DoRA: LoRA for the directions of a weight matrix's columns, and a vector of its own for their lengths.

    y = m / ||W + s A B||_c * (x W + s (x A) B) + b        m = ||W||_c at first

with ||.||_c the norm of each output's column. Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5.
As in section 4.3 the norm is a constant to the gradient, which saves memory at little cost.

The norm follows A and B, so every forward pass needs it. It is computed without W + s A B, from products that are thin:

    ||W + s A B||_c^2 = ||W||_c^2 + 2 s sum_k (W^T A)_ck B_kc + s^2 sum_kl B_kc (A^T A)_kl B_lc

and since it is a constant, nothing of it is kept for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import axes_of, precise, product, replace_linears, trained, vector_axes
from lmobj.adapt._lora import LoRA, LoRALinear
from lmobj.models._layers import Linear

__all__ = ["DoRA", "DoRALinear"]


@dataclass(frozen=True)
class DoRA(LoRA):
    """LoRA with the lengths of the columns trained by themselves."""

    name: Literal["dora"] = "dora"  # type: ignore[assignment]  # the tag of another method
    """Weight-decomposed low-rank adapters (DoRA)."""

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts the adapters into a model whose weights are those to be adapted, in place."""
        replace_linears(model, self.targets, lambda _, linear: DoRALinear(linear, self, rngs))


class DoRALinear(LoRALinear):
    """y = m / ||W + s A B||_c * (x W + s (x A) B) + b."""

    def __init__(self, base: Linear, config: DoRA, rngs: nnx.Rngs) -> None:
        super().__init__(base, config, rngs)
        lengths = self._column_norms().astype(self.kernel.dtype)
        self.magnitude = trained(lengths, vector_axes(axes_of(self)[1]))

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        norms = jax.lax.stop_gradient(self._column_norms())
        gain = (self.magnitude[...] / norms).astype(x.dtype)
        y = gain * (product(x, self.kernel) + self.scale * product(x, self.lora_a, self.lora_b))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def merged(self) -> Linear:
        """The linear map with the kernel m (W + s A B) / ||W + s A B||_c."""
        kernel, a, b, magnitude = precise(self.kernel, self.lora_a, self.lora_b, self.magnitude)
        kernel = kernel + self.scale * (a @ b)
        kernel = kernel * (magnitude[..., None, :] / jnp.linalg.norm(kernel, axis=-2, keepdims=True))
        return self.linear(kernel, None if self.bias is None else self.bias[...])

    def _column_norms(self) -> Float[Array, "... O"]:
        """||W + s A B||_c in `promote_types(dtype, float32)`, by the module's formula."""
        kernel, a, b = precise(self.kernel, self.lora_a, self.lora_b)
        square = jnp.einsum("...io,...io->...o", kernel, kernel)
        cross = jnp.einsum("...or,...ro->...o", jnp.einsum("...io,...ir->...or", kernel, a), b)
        change = jnp.einsum("...ro,...ro->...o", b, jnp.einsum("...ir,...is->...rs", a, a) @ b)
        return jnp.sqrt(square + 2 * self.scale * cross + self.scale**2 * change)
