"""Folders as Hugging Face lays them out: `config.json` beside `model.safetensors`, or beside its shards.

Only safetensors are read. PyTorch's other files are pickles, which run code when they are opened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import safetensors
import safetensors.numpy

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop._names import Tensors

__all__ = [
    "Checkpoint",
    "must_be",
    "one_of",
    "read_folder",
    "read_json",
    "read_tensors",
    "setting",
    "vocabulary",
    "write_folder",
]

T = TypeVar("T", bool, int, float, str)
V = TypeVar("V")

_CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
"""Kinds of weight files that an error should name."""


class Checkpoint(NamedTuple):
    """A model from a folder: build it with `config.build`, or merge `params` into its graph definition.

    config: the model's settings.
    vocab: its size, and the special ids that config.json names; BERT's names no more than the padding, and the others
      are the tokenizer's to tell.
    params: nested dicts of NumPy arrays.
    pair_head: parameters of the `PairHead` that BERT and ALBERT may have; None where there is none.
    """

    config: Any
    vocab: Vocabulary
    params: dict[str, Any]
    pair_head: dict[str, Any] | None = None


def read_folder(folder: str | os.PathLike[str], model_type: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The contents of config.json, and every tensor.

    Raises:
      UserError: a file that is missing, malformed, not safetensors or of another model type.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; accepted: one with {_CONFIG} and {_WEIGHTS}.")
    settings = read_json(folder / _CONFIG)
    if settings.get("model_type") != model_type:
        raise UserError(
            f"{folder / _CONFIG}: model_type is {settings.get('model_type')!r}; accepted here: {model_type!r}."
        )
    tensors: dict[str, np.ndarray] = {}
    for path in _weight_files(folder):
        tensors.update(read_tensors(path))
    return settings, tensors


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file.

    Raises:
      UserError: the file is missing, or not safetensors.
    """
    try:
        return safetensors.numpy.load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; accepted: a folder with {path.name}.") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}.") from error


def write_folder(
    folder: str | os.PathLike[str],
    settings: Mapping[str, Any],
    tensors: Tensors,
    *,
    config: str = _CONFIG,
    weights: str = _WEIGHTS,
) -> None:
    """Writes `config.json` and `model.safetensors`, each complete or not at all, the config last.

    Raises:
      UserError: the folder already holds a model, or what else has these names.
    """
    folder = Path(folder)
    for name in (config, weights, f"{weights}.index.json"):
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists; accepted: a folder without a model in it.")
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{weights}.partial"
    # Transformers refuses a file whose metadata do not say for which framework the names are.
    safetensors.numpy.save_file(dict(tensors), partial, metadata={"format": "pt"})
    partial.replace(folder / weights)
    partial = folder / f"{config}.partial"
    partial.write_text(json.dumps(dict(settings), indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(folder / config)


def setting(settings: Mapping[str, Any], key: str, default: T) -> T:
    """A value of config.json of the default's type, or the default where the key is absent.

    Raises:
      UserError: a value of another type.
    """
    value = settings.get(key, default)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"config.json: {key} is {value!r}; accepted: a value of type {type(default).__name__}.")
    return value


def must_be(settings: Mapping[str, Any], key: str, value: bool | str, why: str) -> None:
    """Refuses a config.json in which `key` is given and differs from `value`, the only one that lmobj's model has."""
    if settings.get(key, value) != value:
        raise UserError(f"config.json: {key} is {settings[key]!r}; accepted: {value!r}, because {why}.")


def one_of(settings: Mapping[str, Any], key: str, default: str, accepted: Mapping[str, V]) -> V:
    """What `accepted` has for the value of config.json.

    Raises:
      UserError: a value that is not in `accepted`.
    """
    value = setting(settings, key, default)
    if value not in accepted:
        raise UserError(f"config.json: {key} is {value!r}; accepted: {', '.join(map(repr, accepted))}.")
    return accepted[value]


def vocabulary(settings: Mapping[str, Any], size: int) -> Vocabulary:
    """The vocabulary's size with the special ids that config.json names.

    Raises:
      UserError: an id that is no token, or several for one purpose.
    """
    ids: dict[str, int] = {}
    for purpose in ("pad", "bos", "eos"):
        value = settings.get(f"{purpose}_token_id")
        if value is None:
            continue
        if type(value) is not int or not 0 <= value < size:
            raise UserError(
                f"config.json: {purpose}_token_id is {value!r}; accepted: one id from 0 to {size - 1}, or null."
            )
        ids[purpose] = value
    return Vocabulary(size, ids.get("pad", 0), bos=ids.get("bos"), eos=ids.get("eos"))


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        shards = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{folder / _INDEX}: weight_map is missing or malformed; accepted: tensor -> file name.")
        paths = []
        for name in sorted(set(shards.values())):
            if Path(name).name != name or not (folder / name).is_file():
                raise UserError(f"{folder / _INDEX} names the file {name!r}; accepted: files in the same folder.")
            paths.append(folder / name)
        return paths
    others = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in _OTHERS))
    refused = f"It holds {others}, which lmobj does not read, because pickled files run code when opened. "
    raise UserError(
        f"{folder} has no {_WEIGHTS}. {refused if others else ''}Accepted: safetensors, which Transformers' "
        "save_pretrained writes."
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: the file is missing or malformed.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} does not exist; accepted: a folder as Transformers' save_pretrained writes."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a {type(values).__name__}; accepted: a JSON object.")
    return values
