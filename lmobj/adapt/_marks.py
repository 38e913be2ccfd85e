"""What is trained and what is not: a mark on every parameter, and parameters parted by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

__all__ = ["is_marked", "join", "mark", "split", "trainable", "unmark", "variables"]

_MARK = "trainable"
"""Key in the metadata of a parameter."""


def mark(module: nnx.Module, value: bool) -> None:
    """Marks every parameter of the module as trained, or as not."""
    for _, variable in variables(module):
        variable.set_metadata(_MARK, value)


def unmark(module: nnx.Module) -> None:
    """Takes the marks off."""
    for _, variable in variables(module):
        if variable.has_metadata(_MARK):
            variable.del_metadata(_MARK)


def is_marked(module: nnx.Module) -> bool:
    """Whether any parameter has a mark."""
    return any(variable.has_metadata(_MARK) for _, variable in variables(module))


def trainable(model: nnx.Module | nnx.State) -> dict[str, Any]:
    """Nested dicts like `nnx.to_pure_dict` of the parameters, True where one is trained.

    A model without adapters is trained whole. The model may be abstract (`nnx.eval_shape`), and so may its state.
    """
    state = model if isinstance(model, nnx.State) else nnx.state(model)
    marks: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(state):
        node = marks
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = variable.get_metadata().get(_MARK, True)
    return marks


def split(params: Mapping[str, Any], marks: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trainable, frozen): nested dicts parted by the marks of `trainable`. A dict that would be empty is left out.

    The leaves may be anything: arrays, shapes, shardings, logical axes. A pytree of several models, {role: params},
    is parted by {role: marks}.
    """
    chosen: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in params.items():
        if not isinstance(marks[key], Mapping):
            (chosen if marks[key] else rest)[key] = value
            continue
        for part, below in zip((chosen, rest), split(value, marks[key]), strict=True):
            if below:
                part[key] = below
    return chosen, rest


def join(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `split`.

    Raises:
      ValueError: both hold the same parameter.
    """
    joined = {**frozen, **trainable}
    for key in trainable.keys() & frozen.keys():
        ours, theirs = trainable[key], frozen[key]
        if not (isinstance(ours, Mapping) and isinstance(theirs, Mapping)):
            raise ValueError(f"join: both parts hold the parameter {key!r}; expected parts of one `split`.")
        joined[key] = join(ours, theirs)
    return joined


def variables(module: nnx.Module) -> Iterator[tuple[str, nnx.Variable]]:
    """(path, parameter) of every parameter."""
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        yield "/".join(map(str, path)), variable
