"""XLNet: Transformers' `XLNetLMHeadModel` <-> `lmobj.models.XLNet`.

Hugging Face keeps the maps of attention as [width, heads, head width], the one back to the model's width too, and those
of the feed-forward part as [out, in] (PyTorch's Linear).

Where Transformers deviates from the original code: its `gelu` is the exact one, where the original has the tanh
approximation (which it calls `gelu_new`, and lmobj `gelu`); one rate of dropout serves attention's probabilities too;
biases of attention are always each layer's own. lmobj does not drop out the sinusoids of distances, as both do.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import _files
from lmobj.interop._files import Checkpoint, must_be, one_of, setting
from lmobj.interop._names import Name, Tensors, check_copies, linear, norm, read, vocabulary_rows, write
from lmobj.models import XLNetConfig

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "to_lmobj"]

_ATTENTION = "transformer.layer.{}.rel_attn"

TABLE = (
    Name("transformer.word_embedding.weight", "tokens/table", vocab=True),
    Name("transformer.mask_emb", "query_start"),
    Name(f"{_ATTENTION}.q", "stack/attention/query/kernel"),
    Name(f"{_ATTENTION}.k", "stack/attention/key/kernel"),
    Name(f"{_ATTENTION}.v", "stack/attention/value/kernel"),
    Name(f"{_ATTENTION}.r", "stack/attention/position/kernel"),
    Name(f"{_ATTENTION}.o", "stack/attention/out/kernel", transposed=True),
    Name(f"{_ATTENTION}.r_w_bias", "stack/attention/biases/content"),
    Name(f"{_ATTENTION}.r_r_bias", "stack/attention/biases/position"),
    Name(f"{_ATTENTION}.r_s_bias", "stack/attention/biases/segment"),
    Name(f"{_ATTENTION}.seg_embed", "stack/attention/segments"),
    *norm(f"{_ATTENTION}.layer_norm", "stack/attention_norm"),
    *linear("transformer.layer.{}.ff.layer_1", "stack/mlp/up"),
    *linear("transformer.layer.{}.ff.layer_2", "stack/mlp/down"),
    *norm("transformer.layer.{}.ff.layer_norm", "stack/mlp_norm"),
    Name("lm_loss.bias", "head_bias", vocab=True),
)

_BY_HEADS = re.compile(r"transformer\.layer\.\d+\.rel_attn\.(?:(?P<map>[qkvro])|(?P<bias>r_[wrs]_bias)|seg_embed)")
"""Tensors whose last two axes are heads and head width, which lmobj has as one."""

_Activation = Literal["gelu", "gelu_exact"]
_Direction = Literal["both", "backward"]
_ACTIVATIONS: dict[str, _Activation] = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}
_DIRECTIONS: dict[str, _Direction] = {"bi": "both", "uni": "backward"}
_IDS = {"pad_token_id": 5, "bos_token_id": 1, "eos_token_id": 2}
"""Of Transformers' `XLNetConfig`, which config.json need not repeat."""


def config_from_hf(settings: Mapping[str, Any]) -> XLNetConfig:
    """The model that an XLNet's config.json describes. Absent keys have the defaults of Transformers' `XLNetConfig`.

    `reuse_len` and `bi_data` are settings of the objective in lmobj.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's XLNet does not have.
    """
    must_be(settings, "bi_data", False, "lmobj is told with each batch which rows read their text backwards")
    must_be(settings, "same_length", False, "in lmobj every query sees all of the memory")
    must_be(settings, "untie_r", True, "in Transformers' XLNet the biases of attention are each layer's own")
    must_be(settings, "tie_word_embeddings", True, "lmobj's XLNet ties its output table to the embedding")
    width, heads = setting(settings, "d_model", 1024), setting(settings, "n_head", 16)
    head_width = settings.get("d_head")
    if head_width is not None and (type(head_width) is not int or head_width * heads != width):
        raise UserError(f"config.json: d_head is {head_width!r}; accepted: d_model / n_head, here {width} / {heads}.")
    memory_length = settings.get("mem_len", 512)
    clamp = setting(settings, "clamp_len", -1)
    return XLNetConfig(
        layers=setting(settings, "n_layer", 24),
        width=width,
        heads=heads,
        mlp_width=setting(settings, "d_inner", 4096),
        memory_length=0 if memory_length is None else setting(settings, "mem_len", 512),
        direction=one_of(settings, "attn_type", "bi", _DIRECTIONS),
        clamp_distance=clamp if clamp > 0 else None,
        norm_eps=setting(settings, "layer_norm_eps", 1e-12),
        activation=one_of(settings, "ff_activation", "gelu", _ACTIVATIONS),
        dropout=setting(settings, "dropout", 0.1),
        attention_dropout=setting(settings, "dropout", 0.1),
        init_std=setting(settings, "initializer_range", 0.02),
    )


def config_to_hf(config: XLNetConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The config.json of a model.

    Raises:
      UserError: settings that Transformers' XLNet does not have.
    """
    _check(config)
    if config.attention_dropout != config.dropout:
        raise UserError(
            f"model.attention_dropout is {config.attention_dropout}; Hugging Face's XLNet has one rate for it and for "
            f"model.dropout, so the only one accepted is {config.dropout}."
        )
    return {
        "model_type": "xlnet",
        "architectures": ["XLNetLMHeadModel"],
        "vocab_size": vocab.size,
        "n_layer": config.layers,
        "d_model": config.width,
        "n_head": config.heads,
        "d_head": config.width // config.heads,
        "d_inner": config.mlp_width or 4 * config.width,
        "mem_len": config.memory_length or None,
        "attn_type": "bi" if config.direction == "both" else "uni",
        "clamp_len": config.clamp_distance or -1,
        "layer_norm_eps": config.norm_eps,
        "ff_activation": "gelu" if config.activation == "gelu_exact" else "gelu_new",
        "dropout": config.dropout,
        "initializer_range": config.init_std,
        "untie_r": True,
        "tie_word_embeddings": True,
        "pad_token_id": vocab.pad,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
    }


def to_lmobj(
    tensors: Tensors, config: XLNetConfig, *, vocab_size: int | None = None, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Hugging Face's tensors as the model's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

    Args:
      tensors: name -> tensor, as `XLNetLMHeadModel` names them.
      config: the model's settings (`config_from_hf`).
      vocab_size: rows of the embedding; None: as many as the tensor has.
      ignore: prefixes of names to leave behind.

    Raises:
      UserError: settings that XLNet does not have, or tensors that are missing, unknown or of another shape.
    """
    _check(config)
    tensors = check_copies(tensors, {"lm_loss.weight": "transformer.word_embedding.weight"})
    tensors = {name: _joined(name, tensor, config) for name, tensor in tensors.items()}
    vocab_size = vocab_size or vocabulary_rows(tensors, "transformer.word_embedding.weight")
    return read(TABLE, tensors, config, vocab_size, ignore)


def from_lmobj(params: Mapping[str, Any], config: XLNetConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """The model's parameters as Hugging Face's tensors: undoes `to_lmobj` bit for bit.

    The padded rows of the vocabulary are left out. The tied output table is not written twice.

    Raises:
      UserError: settings that XLNet does not have, or parameters that are not the model's.
    """
    _check(config)
    tensors = write(TABLE, params, config, vocab_size)
    return {name: tensor.reshape(_shape(name, config) or tensor.shape) for name, tensor in tensors.items()}


def load(folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
    """An XLNet from a folder with config.json and safetensors.

    Args:
      folder: as Transformers' `save_pretrained` writes it.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `XLNetConfig` to set beside those that config.json gives (dtype, dropout, remat, ...).

    Raises:
      UserError: files that are missing or malformed, or a model that does not fit.
    """
    values, tensors = _files.read_folder(folder, "xlnet")
    config = dataclasses.replace(config_from_hf(values), **settings)
    vocab = _files.vocabulary(_IDS | values, setting(values, "vocab_size", 32000))
    return Checkpoint(config, vocab, to_lmobj(tensors, config, vocab_size=vocab.size, ignore=ignore))


def save(folder: str | os.PathLike[str], params: Mapping[str, Any], config: XLNetConfig, vocab: Vocabulary) -> None:
    """Writes a model so that Transformers' `XLNetLMHeadModel.from_pretrained` reads it.

    Raises:
      UserError: settings that XLNet does not have, or a folder that already holds a model.
    """
    _files.write_folder(folder, config_to_hf(config, vocab), from_lmobj(params, config, vocab.size))


def _shape(name: str, config: XLNetConfig) -> tuple[int, ...] | None:
    """The shape of a tensor that lmobj has with fewer axes; None: they have the same."""
    if name == "transformer.mask_emb":
        return 1, 1, config.width
    found = _BY_HEADS.fullmatch(name)
    if found is None:
        return None
    heads = (config.heads, config.width // config.heads)
    return (config.width, *heads) if found["map"] else heads if found["bias"] else (2, *heads)


def _joined(name: str, tensor: np.ndarray, config: XLNetConfig) -> np.ndarray:
    """The tensor with heads and head width as one axis."""
    shape = _shape(name, config)
    if shape is None:
        return tensor
    if tensor.shape != shape:
        raise UserError(
            f"The tensor {name} has the shape {list(tensor.shape)}; the model's settings ask for {list(shape)}."
        )
    return tensor.reshape(-1) if name.endswith(("_bias", "mask_emb")) else tensor.reshape(shape[0], -1)


def _check(config: XLNetConfig) -> None:
    """Refuses what Transformers' XLNet does not have."""
    for name in ("segments", "query_stream", "untie_biases"):
        if not getattr(config, name):
            raise UserError(f"model.{name} is False, and Hugging Face's XLNet always has it; accepted: True.")
