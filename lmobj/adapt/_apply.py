"""Adapters into a model, and out of it again."""

from __future__ import annotations

from typing import Protocol, TypeVar

from flax import nnx

from lmobj.adapt._adapted import Adapted, children
from lmobj.adapt._marks import is_marked, mark, unmark
from lmobj.errors import UserError

__all__ = ["Adapter", "apply", "merge"]

M = TypeVar("M", bound=nnx.Module)


class Adapter(Protocol):
    """A method's settings."""

    @property
    def name(self) -> str:
        """What tells it from the others."""
        ...

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Changes a model in place, none of whose parameters is marked as trained."""
        ...


def apply(model: M, adapter: Adapter, rngs: nnx.Rngs) -> M:
    """The model with adapters in it, and every parameter marked as trained or frozen (`trainable`).

    The model itself is left as it is, and shares its arrays with the result. Its parameters keep their paths, except
    in layers that `Freeze` parts. Load weights before: DoRA begins from their lengths.

    Args:
      model: any family's, traced or not.
      adapter: settings such as `LoRA()`.
      rngs: draws the initial values of the adapters, from the stream `params`.

    Raises:
      UserError: the model has adapters already, or no place for these.
    """
    if is_marked(model):
        raise UserError(
            f"adapter.name is {adapter.name}, and {type(model).__name__} has an adapter already; accepted: a model "
            "without one, such as lmobj.adapt.merge returns."
        )
    adapted = nnx.clone(model)
    mark(adapted, False)
    adapter.adapt(adapted, rngs)
    return adapted


def merge(model: M) -> M:
    """The model of the classes that it had before `apply`, with what was learnt folded into its weights.

    It computes what the adapted model does, and no parameter is marked. A model without adapters is copied.

    Raises:
      UserError: adapters that the model's own weights cannot take up (bottlenecks, prompts, prefixes).
    """
    merged = nnx.clone(model)
    for path, parent, module in list(children(merged)):
        if isinstance(module, Adapted):
            setattr(parent, path.rsplit("/", 1)[-1], module.merged())
    unmark(merged)
    return merged
