"""GPT-2: Transformers' `GPT2LMHeadModel` <-> `lmobj.models.Decoder`.

Hugging Face keeps GPT-2's linear maps as [in, out] (its Conv1D), which is lmobj's layout too, and fuses the three of
attention. Its files name tensors `transformer.h.0...`, or `h.0...` without the head, as the original release does.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmobj.batch import Vocabulary
from lmobj.interop import _files
from lmobj.interop._files import Checkpoint, must_be, one_of, setting
from lmobj.interop._names import Name, Tensors, check_copies, read, refuse_others, renamed, vocabulary_rows, write
from lmobj.models import DecoderConfig
from lmobj.models._layers import Activation

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "to_lmobj"]

_PROJECTIONS = ("query", "key", "value")

TABLE = (
    Name("transformer.wte.weight", "tokens/table", vocab=True),
    Name("transformer.wpe.weight", "positions/table"),
    Name("transformer.h.{}.ln_1.weight", "stack/blocks/attention_norm/scale"),
    Name("transformer.h.{}.ln_1.bias", "stack/blocks/attention_norm/bias"),
    Name("transformer.h.{}.attn.c_attn.weight", tuple(f"stack/blocks/attention/{p}/kernel" for p in _PROJECTIONS)),
    Name("transformer.h.{}.attn.c_attn.bias", tuple(f"stack/blocks/attention/{p}/bias" for p in _PROJECTIONS)),
    Name("transformer.h.{}.attn.c_proj.weight", "stack/blocks/attention/out/kernel"),
    Name("transformer.h.{}.attn.c_proj.bias", "stack/blocks/attention/out/bias"),
    Name("transformer.h.{}.ln_2.weight", "stack/blocks/mlp_norm/scale"),
    Name("transformer.h.{}.ln_2.bias", "stack/blocks/mlp_norm/bias"),
    Name("transformer.h.{}.mlp.c_fc.weight", "stack/blocks/mlp/up/kernel"),
    Name("transformer.h.{}.mlp.c_fc.bias", "stack/blocks/mlp/up/bias"),
    Name("transformer.h.{}.mlp.c_proj.weight", "stack/blocks/mlp/down/kernel"),
    Name("transformer.h.{}.mlp.c_proj.bias", "stack/blocks/mlp/down/bias"),
    Name("transformer.ln_f.weight", "norm/scale"),
    Name("transformer.ln_f.bias", "norm/bias"),
)
UNTIED = (*TABLE, Name("lm_head.weight", "head/table", vocab=True))
"""The table of a model with an output table of its own."""

_MASKS = re.compile(r"transformer\.h\.\d+\.attn\.(masked_)?bias")
"""Causal masks that older versions of Transformers stored beside the parameters."""

_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu": "gelu_exact"}


def config_from_hf(settings: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a GPT-2's config.json describes. Absent keys have the defaults of Transformers' `GPT2Config`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's decoder does not have.
    """
    must_be(settings, "scale_attn_weights", True, "lmobj always scales attention by 1 / sqrt(head width)")
    must_be(settings, "scale_attn_by_inverse_layer_idx", False, "lmobj has no scaling by layer")
    must_be(settings, "add_cross_attention", False, "lmobj's decoder has no cross attention")
    inner = settings.get("n_inner")
    return DecoderConfig(
        layers=setting(settings, "n_layer", 12),
        width=setting(settings, "n_embd", 768),
        heads=setting(settings, "n_head", 12),
        mlp_width=None if inner is None else setting(settings, "n_inner", 0),
        max_length=setting(settings, "n_positions", 1024),
        norm_eps=setting(settings, "layer_norm_epsilon", 1e-5),
        activation=one_of(settings, "activation_function", "gelu_new", _ACTIVATIONS),
        tie_embeddings=setting(settings, "tie_word_embeddings", True),
        dropout=setting(settings, "resid_pdrop", 0.1),
        attention_dropout=setting(settings, "attn_pdrop", 0.1),
        embedding_dropout=setting(settings, "embd_pdrop", 0.1),
        init_std=setting(settings, "initializer_range", 0.02),
    )


def config_to_hf(config: DecoderConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The config.json of a decoder.

    Raises:
      UserError: settings that GPT-2 does not have (rotary positions, RMSNorm, grouped queries and so on).
    """
    _check(config)
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": vocab.size,
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_length,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": "gelu_new" if config.activation == "gelu" else "gelu",
        "tie_word_embeddings": config.tie_embeddings,
        "resid_pdrop": config.dropout,
        "attn_pdrop": config.attention_dropout,
        "embd_pdrop": config.embedding_dropout,
        "initializer_range": config.init_std,
        "pad_token_id": None,  # GPT-2 has none, and generation would hide every token with this id from itself
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
    }


def to_lmobj(
    tensors: Tensors, config: DecoderConfig, *, vocab_size: int | None = None, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Hugging Face's tensors as the decoder's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

    Args:
      tensors: name -> tensor, with or without the prefix `transformer.`.
      config: the decoder's settings (`config_from_hf`).
      vocab_size: rows of the embedding; None: as many as the tensor has.
      ignore: prefixes of names to leave behind.

    Raises:
      UserError: settings that GPT-2 does not have, or tensors that are missing, unknown or of another shape.
    """
    _check(config)
    tensors = renamed(tensors, _with_prefix)
    tensors = {name: tensor for name, tensor in tensors.items() if not _MASKS.fullmatch(name)}
    if config.tie_embeddings:
        tensors = check_copies(tensors, {"lm_head.weight": "transformer.wte.weight"})
    vocab_size = vocab_size or vocabulary_rows(tensors, "transformer.wte.weight")
    return read(_table(config), tensors, config, vocab_size, [_with_prefix(name) for name in ignore])


def from_lmobj(params: Mapping[str, Any], config: DecoderConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """The decoder's parameters as Hugging Face's tensors: undoes `to_lmobj` bit for bit.

    The padded rows of the vocabulary are left out. A tied output table is not written twice.

    Raises:
      UserError: settings that GPT-2 does not have, or parameters that are not the model's.
    """
    _check(config)
    return write(_table(config), params, config, vocab_size)


def load(folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
    """A GPT-2 from a folder with config.json and safetensors.

    Args:
      folder: as Transformers' `save_pretrained` writes it.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `DecoderConfig` to set beside those that config.json gives (dtype, dropout, remat, ...).

    Raises:
      UserError: files that are missing or malformed, or a model that does not fit.
    """
    values, tensors = _files.read_folder(folder, "gpt2")
    config = dataclasses.replace(config_from_hf(values), **settings)
    vocab = _files.vocabulary(values, setting(values, "vocab_size", 50257))
    return Checkpoint(config, vocab, to_lmobj(tensors, config, vocab_size=vocab.size, ignore=ignore))


def save(folder: str | os.PathLike[str], params: Mapping[str, Any], config: DecoderConfig, vocab: Vocabulary) -> None:
    """Writes a decoder so that Transformers' `GPT2LMHeadModel.from_pretrained` reads it.

    Raises:
      UserError: settings that GPT-2 does not have, or a folder that already holds a model.
    """
    _files.write_folder(folder, config_to_hf(config, vocab), from_lmobj(params, config, vocab.size))


def _table(config: DecoderConfig) -> tuple[Name, ...]:
    return TABLE if config.tie_embeddings else UNTIED


def _with_prefix(name: str) -> str:
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def _check(config: DecoderConfig) -> None:
    """Refuses what GPT-2 does not have."""
    accepted = {
        "positions": ("learned",),
        "norm": ("layernorm",),
        "activation": ("gelu", "gelu_exact"),
        "bias": (True,),
        "kv_heads": (None, config.heads),
        "pre_norm": (True,),
        "moe": (None,),
        "window": (None,),
        "soft_cap": (None,),
        "attention_soft_cap": (None,),
    }
    refuse_others(config, "GPT-2", accepted)
