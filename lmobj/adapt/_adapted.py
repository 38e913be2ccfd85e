"""What all adapters that live in a model have in common: how they are put in its place, and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.errors import UserError
from lmobj.models._layers import Axes, Linear, zeros
from lmobj.partition import mesh_axes

__all__ = [
    "Adapted",
    "AdaptedLinear",
    "at_least",
    "axes_of",
    "children",
    "positive",
    "precise",
    "product",
    "replace_linears",
    "trained",
    "vector_axes",
]


class Adapted(nnx.Module):
    """A module in place of one of the model's, whose parameters it holds under their own names beside its own."""

    def merged(self) -> nnx.Module:
        """The module that it stands for, with what was learnt folded into its weights.

        Raises:
          UserError: the weights of the model have no place for it.
        """
        raise NotImplementedError


class AdaptedLinear(Adapted, Linear):
    """A linear map with something beside it. Kernels are [in, out], or [n, in, out] where they are stacked."""

    def __init__(self, base: Linear) -> None:
        self.kernel, self.bias = base.kernel, base.bias

    def linear(self, kernel: Float[Array, "... I O"], bias: Float[Array, "... O"] | None) -> Linear:
        """A plain linear map of other values in the places of this one's."""
        dtype = self.kernel.dtype
        plain = Linear(
            1, 1, axes=(None, None), init=zeros(), bias=bias is not None, param_dtype=dtype, rngs=nnx.Rngs(params=0)
        )
        plain.kernel = self.kernel.replace(kernel.astype(dtype))
        if bias is not None:
            assert self.bias is not None
            plain.bias = self.bias.replace(bias.astype(dtype))
        return plain


def trained(value: Array, axes: Axes) -> nnx.Param:
    """A parameter of an adapter: it is marked as trained, and its logical axes say how a mesh cuts it."""
    return nnx.Param(value, axes=axes, trainable=True)


def axes_of(linear: Linear) -> Axes:
    """The logical axes of the kernel, (in, out)."""
    return tuple(linear.kernel.get_metadata()["axes"])


def vector_axes(axis: str | None) -> Axes:
    """The logical axes of a vector along one axis of a kernel: whole where it is as long as the model is wide."""
    return (None if axis == "embed" else axis,)


def product(x: Float[Array, "... I"], *factors: nnx.Param) -> Float[Array, "... O"]:
    """x @ factor @ factor ... from the left, each factor cast to x's dtype, as products of two matrices."""
    flat = x if mesh_axes("length") else x.reshape(-1, x.shape[-1])
    for factor in factors:
        flat = flat @ factor[...].astype(x.dtype)
    return flat.reshape(*x.shape[:-1], -1)


def precise(*params: nnx.Param) -> list[Array]:
    """The values in `promote_types(dtype, float32)`."""
    return [param[...].astype(jnp.promote_types(param.dtype, jnp.float32)) for param in params]


def replace_linears(
    model: nnx.Module, targets: Sequence[str], adapted: Callable[[str, Linear], AdaptedLinear], *, key: str = "targets"
) -> None:
    """Puts adapters in the places of the linear maps that `targets` name, by the last parts of their paths.

    Args:
      model: changed in place.
      targets: names such as `query`, or `attention/out` where one part would not tell it from others.
      adapted: (path, linear map) -> what takes its place.
      key: of the settings, for the error.

    Raises:
      UserError: a target that names no linear map of the model.
    """
    places = [place for place in children(model) if isinstance(place[2], Linear)]
    for target in targets:
        if not any(is_named(path, target) for path, _, _ in places):
            names = sorted({path.rsplit("/", 1)[-1] for path, _, _ in places})
            raise UserError(
                f"adapter.{key} has {target!r}, which {type(model).__name__} lacks; its linear maps are "
                f"{', '.join(names) or 'none'}."
            )
    for path, parent, linear in places:
        if any(is_named(path, target) for target in targets):
            setattr(parent, path.rsplit("/", 1)[-1], adapted(path, linear))


def is_named(path: str, target: str) -> bool:
    """Whether a path ends with the parts of a target."""
    return f"/{path}".endswith(f"/{target}")


def children(model: nnx.Module) -> Iterator[tuple[str, nnx.Module, Any]]:
    """(path, parent, module) of every module below the model, those further down first."""
    modules = dict(nnx.iter_modules(model))
    for path, module in modules.items():
        if path:
            yield "/".join(map(str, path)), modules[path[:-1]], module


def at_least(settings: Any, minimum: int, *names: str) -> None:
    """Refuses counts below `minimum`."""
    for name in names:
        if getattr(settings, name) < minimum:
            raise UserError(f"adapter.{name} is {getattr(settings, name)}; it must be at least {minimum}.")


def positive(settings: Any, *names: str) -> None:
    """Refuses what is not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"adapter.{name} is {getattr(settings, name)}; it must be above 0.")
