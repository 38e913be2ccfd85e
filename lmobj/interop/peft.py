"""Adapters in the files of Hugging Face's PEFT <-> `lmobj.adapt`: adapter_config.json beside adapter_model.safetensors.

LoRA, rsLoRA, DoRA, AdaLoRA and (IA)^3, on families whose linear maps are one module each in Transformers, and on GPT-2,
which fuses query, key and value. PEFT then has one adapter where lmobj has three. One that is read becomes three with
the same A, and the parts of B. Three that are written become one of the sum of their ranks, with A on top of one
another and B along a diagonal; read again, it is the same function with a higher rank.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from lmobj.adapt import IA3, AdaLoRA, DoRA, LoRA, apply
from lmobj.errors import UserError
from lmobj.interop import _files, albert, bart, bert, gpt2, roberta, t5
from lmobj.interop._files import must_be, one_of, setting
from lmobj.interop._names import Name, listed
from lmobj.models import EncoderDecoderConfig
from lmobj.models._layers import Linear

__all__ = ["Family", "PeftConfig", "load", "save"]

Family = Literal["albert", "bart", "bert", "gpt2", "roberta", "t5"]
PeftConfig = AdaLoRA | DoRA | IA3 | LoRA
M = TypeVar("M", bound=nnx.Module)
Arrays = dict[str, np.ndarray]
"""What adapts one module, with an axis of layers in front; by the ends of PEFT's names, or by ours."""

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_TABLES: Mapping[str, Callable[[Any], Sequence[Name]]] = {
    "albert": lambda config: albert.TABLE,
    "bart": bart.table_of,
    "bert": lambda config: bert.TABLE,
    "gpt2": lambda config: gpt2.TABLE,
    "roberta": lambda config: roberta.TABLE,
    "t5": t5.table_of,
}
"""The tensors of a family's model with some settings."""
_PAIRED = ("bart", "t5")
"""Families of an encoder with a decoder."""


class _Module(NamedTuple):
    """A linear map of theirs, whose name has a `{}` where layers are stacked, and the paths of ours that it fuses."""

    theirs: str
    ours: tuple[str, ...]

    def names(self, linears: Mapping[str, Linear]) -> tuple[str, ...]:
        """Its name in each layer."""
        return Name(self.theirs, self.ours).tensors(linears[self.ours[0]].kernel.shape[0])


def save(folder: str | os.PathLike[str], model: nnx.Module, adapter: PeftConfig, family: Family) -> None:
    """Writes the adapters of a model so that PEFT's `PeftModel.from_pretrained(base, folder)` reads them.

    Args:
      folder: one without adapters in it.
      model: what `adapt.apply(base, adapter, ...)` made, trained or not.
      adapter: the settings.
      family: Transformers' name of the base model's family, which names the modules.

    Raises:
      UserError: adapters that PEFT has no form for, or a folder that already holds some.
    """
    if not isinstance(adapter, PeftConfig):
        raise UserError(f"adapter.name is {adapter.name}; accepted in PEFT's files: lora, dora, adalora or ia3.")
    linears, modules = _linears(model), _modules(model, family)
    adapted = {path for path, linear in linears.items() if _is_adapted(linear)}
    named = {path for module in modules for path in module.ours}
    if not adapted or adapted - named:
        raise UserError(
            f"adapter.targets: {listed(sorted(adapted - named)) or 'none of the linear maps'} cannot be written for "
            f"the family {family}; accepted: some of {listed(sorted(named))}."
        )
    modules = [module for module in modules if adapted & set(module.ours)]
    fused = max(len(adapted & set(module.ours)) for module in modules)
    tensors: Arrays = {}
    inputs: list[str] = []
    for module in modules:
        parts = [linears[path] for path in module.ours]
        arrays = _rescaling(parts) if isinstance(adapter, IA3) else _low_rank(parts, adapter, fused)
        names = module.names(linears)
        for end, array in arrays.items():
            tensors |= {f"{_ROOT}{name}.{end}": np.ascontiguousarray(array[i]) for i, name in enumerate(names)}
        inputs += names if any(getattr(part, "on_input", False) for part in parts) else ()
    targets = [name for module in modules for name in module.names(linears)]
    described = _described(adapter, fused) | ({"feedforward_modules": inputs} if isinstance(adapter, IA3) else {})
    common = {"base_model_name_or_path": None, "task_type": None, "inference_mode": True}
    settings = {**common, **described, "target_modules": targets, "fan_in_fan_out": family == "gpt2"}
    _files.write_folder(folder, settings, tensors, config=_CONFIG, weights=_WEIGHTS)


def load(folder: str | os.PathLike[str], model: M, family: Family) -> tuple[M, PeftConfig]:
    """The model with the adapters of a folder, as PEFT's `save_pretrained` writes it, and their settings.

    Args:
      folder: with adapter_config.json and adapter_model.safetensors.
      model: the base model with its weights.
      family: as in `save`.

    Raises:
      UserError: files that are missing or malformed, or adapters of another kind, or of other modules than the family's
        linear maps.
    """
    settings = _files.read_json(Path(folder) / _CONFIG)
    tensors = _files.read_tensors(Path(folder) / _WEIGHTS)
    base = _linears(model)
    found = {}
    for module in _modules(model, family):
        if all(path in base for path in module.ours):
            layers = [_taken(tensors, name, settings) for name in module.names(base)]
            if any(layers):
                found[module] = _stacked(module, layers)
    if tensors or not found:
        raise UserError(
            f"{folder}: {listed(sorted(tensors)) or 'no tensor'} has a place in the family {family}; accepted: "
            "adapters of its linear maps."
        )
    adapter = _settings(settings, found)
    adapted = apply(model, adapter, nnx.Rngs(params=0))
    linears = _linears(adapted)
    for module, arrays in found.items():
        outs = [base[path].kernel.shape[-1] for path in module.ours]
        for path, end, out in zip(module.ours, np.cumsum(outs), outs, strict=True):
            for name, array in _ours(arrays, slice(int(end) - out, int(end))).items():
                _set(linears[path], name, array, path)
    return adapted, adapter


def _low_rank(parts: Sequence[Linear], adapter: LoRA | DoRA | AdaLoRA, fused: int) -> Arrays:
    """One adapter for all parts, with room for the ranks of `fused` of them."""
    rank = adapter.initial_rank if isinstance(adapter, AdaLoRA) else adapter.rank
    n, into, _ = _stack(parts[0].kernel).shape
    outs = [part.kernel.shape[-1] for part in parts]
    dtype = _stack(parts[0].kernel).dtype
    a = np.zeros((n, fused * rank, into), dtype)
    b = np.zeros((n, sum(outs), fused * rank), dtype)
    e = np.zeros((n, fused * rank, 1), dtype)
    lengths = []
    row = column = 0
    for part, out in zip(parts, outs, strict=True):
        if _is_adapted(part):
            rows, columns = slice(row, row + rank), slice(column, column + out)
            a[:, rows] = _stack(part.lora_a, 3).swapaxes(1, 2)
            b[:, columns, rows] = _stack(part.lora_b, 3).swapaxes(1, 2)
            if isinstance(adapter, AdaLoRA):
                e[:, rows, 0] = _stack(part.lora_e, 2)
            row += rank
        if isinstance(adapter, DoRA):
            own = _is_adapted(part)
            lengths.append(_stack(part.magnitude, 2) if own else np.linalg.norm(_stack(part.kernel), axis=1))
        column += out
    if isinstance(adapter, AdaLoRA):
        return {"lora_A": a, "lora_B": b, "lora_E": e}
    arrays = {"lora_A.weight": a, "lora_B.weight": b}
    return arrays | ({"lora_magnitude_vector": np.concatenate(lengths, axis=1)} if lengths else {})


def _rescaling(parts: Sequence[Linear]) -> Arrays:
    """One vector for all parts."""
    on_input = [part.on_input for part in parts if _is_adapted(part)]
    if not any(on_input):
        ones = [np.ones(_stack(part.kernel).shape[::2], part.kernel.dtype) for part in parts]
        scales = [_stack(p.scale, 2) if _is_adapted(p) else one for p, one in zip(parts, ones, strict=True)]
        return {"ia3_l": np.concatenate(scales, axis=1)[:, :, None]}
    scales = [_stack(part.scale, 2) for part in parts if _is_adapted(part)]
    if len(scales) < len(parts) or not all(on_input) or any((scale != scales[0]).any() for scale in scales):
        raise UserError(
            "adapter.inputs has some of the linear maps that Transformers fuses into one, which has one input; "
            "accepted: none of query, key and value in adapter.inputs."
        )
    return {"ia3_l": scales[0][:, None]}


def _ours(arrays: Arrays, columns: slice) -> Arrays:
    """What adapts our part of a module: the one with these outputs."""
    if "ia3_l" in arrays:
        scale = arrays["ia3_l"]
        return {"scale": scale[:, 0] if _on_input(arrays) else scale[:, columns, 0]}
    names = {end.removesuffix(".weight"): array for end, array in arrays.items()}
    values = {"lora_a": names["lora_A"].swapaxes(1, 2), "lora_b": names["lora_B"][:, columns].swapaxes(1, 2)}
    if "lora_E" in names:
        values["lora_e"] = names["lora_E"][:, :, 0]
    if "lora_magnitude_vector" in names:
        values["magnitude"] = names["lora_magnitude_vector"][:, columns]
    return values


def _described(adapter: PeftConfig, fused: int) -> dict[str, Any]:
    """The settings as PEFT names them. The scale is kept where ranks are those of `fused` parts."""
    if isinstance(adapter, IA3):
        return {"peft_type": "IA3"}
    if isinstance(adapter, AdaLoRA):
        rank = fused * adapter.initial_rank
        return {
            "peft_type": "ADALORA",
            "init_r": rank,
            "target_r": fused * adapter.target_rank,
            "lora_alpha": adapter.scale * (rank + 1e-5),
            "total_step": adapter.total_steps,
            "tinit": adapter.initial_steps,
            "tfinal": adapter.final_steps,
            "deltaT": adapter.interval,
            "beta1": adapter.beta1,
            "beta2": adapter.beta2,
            "orth_reg_weight": adapter.orthogonality,
        }
    rank, rooted = fused * adapter.rank, adapter.scaling == "root_rank"
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": adapter.alpha * (math.sqrt(fused) if rooted else fused),
        "use_rslora": rooted,
        "use_dora": isinstance(adapter, DoRA),
    }


def _settings(values: Mapping[str, Any], found: Mapping[_Module, Arrays]) -> PeftConfig:
    """The settings that adapter_config.json describes. Absent keys have PEFT's defaults."""
    kind = one_of(values, "peft_type", "", {"LORA": LoRA, "ADALORA": AdaLoRA, "IA3": IA3})
    plain = ["modules_to_save", "layers_to_transform", "exclude_modules", "alpha_pattern", "target_parameters"]
    for key in plain if kind is AdaLoRA else [*plain, "rank_pattern"]:
        if values.get(key):
            raise UserError(f"{_CONFIG}: {key} is {values[key]!r}; accepted: none.")
    targets = tuple(path for module in found for path in module.ours)
    if kind is IA3:
        inputs = tuple(path for module, arrays in found.items() if _on_input(arrays) for path in module.ours)
        return IA3(targets=targets, inputs=inputs)
    must_be(values, "bias", "none", "lmobj trains no biases beside adapters")
    must_be(values, "lora_bias", False, "lmobj's adapters have no biases")
    alpha = setting(values, "lora_alpha", 8.0)
    if kind is AdaLoRA:
        return AdaLoRA(
            total_steps=setting(values, "total_step", 0),
            initial_rank=setting(values, "init_r", 12),
            target_rank=setting(values, "target_r", 8),
            alpha=alpha,
            initial_steps=setting(values, "tinit", 0),
            final_steps=setting(values, "tfinal", 0),
            interval=setting(values, "deltaT", 1),
            beta1=setting(values, "beta1", 0.85),
            beta2=setting(values, "beta2", 0.85),
            orthogonality=setting(values, "orth_reg_weight", 0.5),
            targets=targets,
        )
    kind = DoRA if setting(values, "use_dora", False) else LoRA
    scaling: Literal["rank", "root_rank"] = "root_rank" if setting(values, "use_rslora", False) else "rank"
    return kind(rank=setting(values, "r", 8), alpha=alpha, scaling=scaling, targets=targets)


def _taken(tensors: Arrays, name: str, settings: Mapping[str, Any]) -> Arrays:
    """Takes the tensors of a module in one layer away from all. Those of AdaLoRA get the ranks back that were cut."""
    prefix = f"{_ROOT}{name}."
    arrays = {key[len(prefix) :]: tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
    kept = (settings.get("rank_pattern") or {}).get(f"{name}.lora_E")
    if kept is None or not arrays or settings.get("peft_type") != "ADALORA":
        return arrays
    whole = {}
    for end, array in arrays.items():
        axis = 1 if end == "lora_B" else 0
        if array.shape[axis] == len(kept):
            whole[end] = array
            continue
        full = np.zeros([len(kept) if i == axis else size for i, size in enumerate(array.shape)], array.dtype)
        full[(slice(None),) * axis + (np.asarray(kept, bool),)] = array
        whole[end] = full
    return whole


def _stacked(module: _Module, layers: Sequence[Arrays]) -> Arrays:
    """The layers' tensors along a new first axis."""
    shapes = [{end: array.shape for end, array in layer.items()} for layer in layers]
    if any(each != shapes[0] for each in shapes):
        raise UserError(
            f"{_WEIGHTS}: the adapters of {module.theirs} differ from layer to layer: {shapes}; accepted: those of all "
            "layers alike."
        )
    return {end: np.stack([layer[end] for layer in layers]) for end in layers[0]}


def _set(linear: Linear, name: str, array: np.ndarray, path: str) -> None:
    """Gives a parameter its value."""
    variable = getattr(linear, name)
    value = array if array.ndim == variable.ndim else array[0]
    if value.shape != variable.shape:
        raise UserError(
            f"{_WEIGHTS}: {name} of {path} has the shape {list(value.shape)}; the settings and the model ask for "
            f"{list(variable.shape)}."
        )
    setattr(linear, name, variable.replace(jnp.asarray(value, variable.dtype)))


def _modules(model: Any, family: Family) -> list[_Module]:
    """Every linear map of a model as its family has them."""
    if family not in _TABLES:
        raise UserError(f"family is {family!r}; accepted: {', '.join(_TABLES)}.")
    accepted = [name for name in _TABLES if (name in _PAIRED) == isinstance(model.config, EncoderDecoderConfig)]
    if family not in accepted:
        raise UserError(
            f"family is {family!r} and the model is of the family {model.config.name}; accepted: {', '.join(accepted)}."
        )
    kernels = [entry for entry in _TABLES[family](model.config) if entry.paths[0].endswith("/kernel")]
    return [
        _Module(entry.theirs.removesuffix(".weight"), tuple(path.removesuffix("/kernel") for path in entry.paths))
        for entry in kernels
    ]


def _linears(model: nnx.Module) -> dict[str, Linear]:
    """Every linear map of a model by its path."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def _is_adapted(linear: Linear) -> bool:
    return type(linear) is not Linear


def _on_input(arrays: Arrays) -> bool:
    """Whether a vector of (IA)^3 rescales the input: PEFT gives it the shape [1, in], and [out, 1] to others."""
    return arrays["ia3_l"].shape[1] == 1


def _stack(variable: nnx.Variable, rank: int = 3) -> np.ndarray:
    """The values with an axis of layers in front, which a parameter outside the layers lacks."""
    array = np.asarray(variable[...])
    return array if array.ndim == rank else array[None]
