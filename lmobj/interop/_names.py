"""Tables of names: which Hugging Face tensor is which lmobj parameter, and how the two are laid out.

A family's file holds its table; this one reads it in both directions. There is nothing to an entry but renaming,
transposing, splitting what is fused, stacking the layers, and padding the vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import ModelBuilder

__all__ = [
    "Name",
    "Tensors",
    "check_copies",
    "linear",
    "listed",
    "norm",
    "read",
    "read_parts",
    "refuse_others",
    "renamed",
    "vocabulary_rows",
    "write",
]

Tensors = Mapping[str, np.ndarray]
"""Hugging Face's name -> tensor."""

LAYER = "{}"
_SHOWN = 20


@dataclass(frozen=True)
class Name:
    """One line of a table.

    theirs: name of the tensor; `{}` is the index of the layer, and lmobj's parameter is then stacked over layers.
    ours: path of the parameter; several where Hugging Face fuses them along the last axis, in this order.
    transposed: theirs is [out, in] (PyTorch's Linear) and ours [in, out].
    vocab: the first axis is the vocabulary, which lmobj pads.
    """

    theirs: str
    ours: str | tuple[str, ...]
    transposed: bool = False
    vocab: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """`ours`, always as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def stacked(self) -> bool:
        """Whether there is one tensor per layer, and lmobj's parameter is stacked over them."""
        return LAYER in self.theirs

    def tensors(self, layers: int) -> tuple[str, ...]:
        """The tensors' names, one per layer where layers are stacked."""
        return tuple(self.theirs.format(i) for i in range(layers)) if self.stacked else (self.theirs,)


def linear(theirs: str, ours: str) -> tuple[Name, Name]:
    """PyTorch's Linear."""
    return Name(f"{theirs}.weight", f"{ours}/kernel", transposed=True), Name(f"{theirs}.bias", f"{ours}/bias")


def norm(theirs: str, ours: str) -> tuple[Name, Name]:
    """PyTorch's LayerNorm."""
    return Name(f"{theirs}.weight", f"{ours}/scale"), Name(f"{theirs}.bias", f"{ours}/bias")


def read(
    table: Sequence[Name], tensors: Tensors, builder: ModelBuilder, vocab_size: int, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """Tensors -> parameters as nested dicts of NumPy arrays, in the dtype of the model's parameters.

    Padded rows of the vocabulary are zero. `ignore` holds prefixes of names to leave behind.

    Raises:
      UserError: tensors that are missing, that the table does not know, or that have another shape or no real numbers.
    """
    return read_parts([(table, tensors)], builder, vocab_size, ignore)


def read_parts(
    parts: Iterable[tuple[Sequence[Name], Tensors]], builder: ModelBuilder, vocab_size: int, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """As `read`, for a model whose tensors are in several files, each with a table of its own.

    Raises:
      UserError: as `read`; or tensors of two files for one parameter differ.
    """
    abstract = _abstract(builder, vocab_size)
    params: dict[str, np.ndarray] = {}
    for table, tensors in parts:
        for path, array in _read(table, tensors, abstract, vocab_size, ignore).items():
            if path in params and not np.array_equal(params[path], array):
                raise UserError(f"The parameter {path} is shared, and the tensors for it differ; accepted: equal ones.")
            params[path] = array
    _check_paths(params, abstract)
    return _nested(params)


def write(
    table: Sequence[Name], params: Mapping[str, Any], builder: ModelBuilder, vocab_size: int
) -> dict[str, np.ndarray]:
    """Parameters -> tensors: undoes `read`, without the padded rows of the vocabulary.

    Raises:
      UserError: parameters that are missing, that do not belong to the model, or that have another shape.
    """
    abstract = _abstract(builder, vocab_size)
    flat = _flat(params)
    _check_paths(flat, abstract)
    for path, array in flat.items():
        if array.shape != abstract[path].shape:
            raise UserError(
                f"The parameter {path} has the shape {list(array.shape)}; the model's has {list(abstract[path].shape)}."
            )
    tensors: dict[str, np.ndarray] = {}
    for entry in table:
        arrays = [np.asarray(flat[path]) for path in entry.paths]
        for i, name in enumerate(entry.tensors(len(arrays[0]))):
            tensor = np.concatenate([x[i] if entry.stacked else x for x in arrays], axis=-1)
            tensor = tensor[:vocab_size] if entry.vocab else tensor
            # safetensors writes an array's memory as it lies, so a transposed view would be written wrongly.
            tensors[name] = np.ascontiguousarray(tensor.T if entry.transposed else tensor)
    return tensors


def renamed(tensors: Tensors, rename: Callable[[str], str]) -> dict[str, np.ndarray]:
    """The tensors under other names.

    Raises:
      UserError: two tensors get the same name.
    """
    result: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if rename(name) in result:
            raise UserError(f"The tensor {name} is there twice, under two of its names; accepted: one of them.")
        result[rename(name)] = tensor
    return result


def check_copies(tensors: Tensors, copies: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensors without the copies {name: original} that PyTorch keeps of tied ones.

    Raises:
      UserError: a copy that differs from its original, so that the model is not tied.
    """
    for copy, original in copies.items():
        if copy in tensors and original in tensors and not np.array_equal(tensors[copy], tensors[original]):
            raise UserError(
                f"The tensors {copy} and {original} differ, and the model that config.json describes ties them; "
                "accepted: equal ones, or the first left out."
            )
    return {name: tensor for name, tensor in tensors.items() if name not in copies}


def refuse_others(config: Any, peer: str, accepted: Mapping[str, Sequence[Any]]) -> None:
    """Refuses settings that Hugging Face's `peer` does not have: all but those accepted."""
    for key, values in accepted.items():
        if getattr(config, key) not in values:
            raise UserError(
                f"model.{key} is {getattr(config, key)!r}, which Hugging Face's {peer} does not have; accepted: "
                f"{' or '.join(map(repr, values))}."
            )


def vocabulary_rows(tensors: Tensors, name: str) -> int:
    """Rows of the embedding called `name`; 1 where it is absent, which `read` refuses."""
    embedding = tensors.get(name)
    return embedding.shape[0] if embedding is not None and embedding.ndim else 1


def listed(names: Sequence[str]) -> str:
    """Names for an error, the first twenty of them written out."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _abstract(builder: ModelBuilder, vocab_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each parameter of the model by path."""
    model = nnx.eval_shape(lambda: builder.build(Vocabulary(size=vocab_size), nnx.Rngs(params=0)))
    return _flat(nnx.to_pure_dict(nnx.state(model)))


def _read(
    table: Sequence[Name],
    tensors: Tensors,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    vocab_size: int,
    ignore: Iterable[str],
) -> dict[str, np.ndarray]:
    """The parameters of one table by path."""
    names = {entry: entry.tensors(abstract[entry.paths[0]].shape[0]) for entry in table}
    wanted = [name for of_entry in names.values() for name in of_entry]
    unknown = sorted(name for name in set(tensors) - set(wanted) if not name.startswith(tuple(ignore)))
    missing = [name for name in wanted if name not in tensors]
    if unknown or missing:
        raise UserError(_mismatch(missing, unknown))

    params: dict[str, np.ndarray] = {}
    for entry, of_entry in names.items():
        target = abstract[entry.paths[0]]
        shape = target.shape[1:] if entry.stacked else target.shape
        split_per_tensor = []
        for name in of_entry:
            tensor = _checked(name, tensors[name], _their_shape(entry, shape, vocab_size))
            tensor = (tensor.T if entry.transposed else tensor).astype(target.dtype)
            if entry.vocab:
                tensor = np.pad(tensor, [(0, shape[0] - vocab_size)] + [(0, 0)] * (tensor.ndim - 1))
            split_per_tensor.append(np.split(tensor, len(entry.paths), axis=-1))
        for path, arrays in zip(entry.paths, zip(*split_per_tensor, strict=True), strict=True):
            params[path] = np.stack(arrays) if entry.stacked else np.ascontiguousarray(arrays[0])
    return params


def _flat(params: Mapping[str, Any]) -> dict[str, Any]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, array in sorted(flat.items()):
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree


def _their_shape(entry: Name, shape: tuple[int, ...], vocab_size: int) -> tuple[int, ...]:
    """The shape of a tensor whose parameter (without the axis of layers) has `shape`."""
    fused = (*shape[:-1], shape[-1] * len(entry.paths))
    fused = (vocab_size, *fused[1:]) if entry.vocab else fused
    return fused[::-1] if entry.transposed else fused


def _checked(name: str, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape != shape:
        raise UserError(
            f"The tensor {name} has the shape {list(tensor.shape)}; the model's settings ask for {list(shape)}."
        )
    if not re.fullmatch(r"b?float\d+", tensor.dtype.name):
        raise UserError(f"The tensor {name} has the dtype {tensor.dtype.name}; accepted: floating point numbers.")
    return tensor


def _check_paths(flat: Mapping[str, Any], abstract: Mapping[str, Any]) -> None:
    if set(flat) != set(abstract):
        missing, unknown = sorted(set(abstract) - set(flat)), sorted(set(flat) - set(abstract))
        raise UserError(
            f"The parameters are not those of the model: missing are {listed(missing) or 'none'}; unknown are "
            f"{listed(unknown) or 'none'}."
        )


def _mismatch(missing: Sequence[str], unknown: Sequence[str]) -> str:
    parts = ["The tensors do not fit the model."]
    if missing:
        parts.append(f"Missing: {listed(missing)}.")
    if unknown:
        parts.append(
            f"Without a place in the model: {listed(unknown)}; if they are not needed, name them, or prefixes of them, "
            "in `ignore`."
        )
    return " ".join(parts)
