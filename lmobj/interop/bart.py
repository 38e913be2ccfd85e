"""BART: Transformers' `BartForConditionalGeneration` <-> `lmobj.models.EncoderDecoder`.

Hugging Face's tables of positions begin with two rows that no token reads; they are left out here, and written as
zeros. PyTorch keeps copies of the embedding under the encoder's, the decoder's and the output's names. The bias of the
output, `final_logits_bias`, is not trained there; files without it mean zeros.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import _files
from lmobj.interop._files import Checkpoint, must_be, one_of, setting
from lmobj.interop._names import Name, Tensors, check_copies, linear, norm, read, refuse_others, vocabulary_rows, write
from lmobj.models import EncoderDecoderConfig
from lmobj.models._layers import Activation

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "table_of", "to_lmobj"]

_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_exact", "gelu_new": "gelu", "relu": "relu"}
_SHARED, _BIAS = "model.shared.weight", "final_logits_bias"
_COPIES = dict.fromkeys(
    ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"), _SHARED
)
_POSITIONS = tuple(f"model.{side}.embed_positions.weight" for side in ("encoder", "decoder"))
_UNREAD = 2
"""Rows of a table of positions before the first position's."""


def config_from_hf(settings: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a BART's config.json describes. Absent keys have the defaults of Transformers' `BartConfig`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj does not have.
    """
    must_be(settings, "tie_word_embeddings", True, "lmobj's BART has one table for all")
    heads, inner = setting(settings, "encoder_attention_heads", 16), setting(settings, "encoder_ffn_dim", 4096)
    for key, value, default in (("decoder_attention_heads", heads, 16), ("decoder_ffn_dim", inner, 4096)):
        found = setting(settings, key, default)
        if found != value:
            raise UserError(f"config.json has {key}: {found}, and {value} in the encoder; accepted: the same in both.")
    return EncoderDecoderConfig(
        layers=setting(settings, "encoder_layers", 12),
        decoder_layers=setting(settings, "decoder_layers", 12),
        width=setting(settings, "d_model", 1024),
        heads=heads,
        head_width=None,
        mlp_width=inner,
        max_length=setting(settings, "max_position_embeddings", 1024),
        positions="learned",
        norm="layernorm",
        norm_eps=1e-5,
        pre_norm=False,
        embedding_norm=True,
        activation=one_of(settings, "activation_function", "gelu", _ACTIVATIONS),
        bias=True,
        tie_embeddings=True,
        output_bias=True,
        scale_attention=True,
        scale_embeddings=setting(settings, "scale_embedding", False),
        dropout=setting(settings, "dropout", 0.1),
        attention_dropout=setting(settings, "attention_dropout", 0.0),
        embedding_dropout=setting(settings, "dropout", 0.1),
        init_std=setting(settings, "init_std", 0.02),
    )


def config_to_hf(config: EncoderDecoderConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The config.json of an encoder-decoder.

    Raises:
      UserError: settings that BART does not have (other positions, norms and so on).
    """
    _check(config)
    inner = config._block_spec(decoder=False).mlp_width
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    return {
        "model_type": "bart",
        "architectures": ["BartForConditionalGeneration"],
        "vocab_size": vocab.size,
        "d_model": config.width,
        "encoder_layers": config.layers,
        "decoder_layers": config.decoder_layers or config.layers,
        "encoder_attention_heads": config.heads,
        "decoder_attention_heads": config.heads,
        "encoder_ffn_dim": inner,
        "decoder_ffn_dim": inner,
        "max_position_embeddings": config.max_length,
        "activation_function": names[config.activation],
        "scale_embedding": config.scale_embeddings,
        "dropout": config.dropout,
        "attention_dropout": config.attention_dropout,
        "activation_dropout": 0.0,
        "init_std": 0.02 if config.init_std is None else config.init_std,
        "tie_word_embeddings": True,
        "is_encoder_decoder": True,
        "pad_token_id": vocab.pad,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
        "decoder_start_token_id": vocab.eos,
        "forced_eos_token_id": vocab.eos,
    }


def to_lmobj(
    tensors: Tensors, config: EncoderDecoderConfig, *, vocab_size: int | None = None, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Hugging Face's tensors as the model's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

    Args:
      tensors: name -> tensor.
      config: the model's settings (`config_from_hf`).
      vocab_size: rows of the embedding; None: as many as the tensor has.
      ignore: prefixes of names to leave behind.

    Raises:
      UserError: settings that BART does not have, or tensors that are missing, unknown or of another shape.
    """
    table = table_of(config)
    tensors = check_copies(tensors, _COPIES)
    vocab_size = vocab_size or vocabulary_rows(tensors, _SHARED)
    for name in _POSITIONS:
        if name in tensors:
            tensors[name] = tensors[name][_UNREAD:]
    bias = tensors.get(_BIAS, np.zeros((1, vocab_size), np.float32))
    tensors[_BIAS] = bias[0] if bias.ndim == 2 and len(bias) == 1 else bias
    return read(table, tensors, config, vocab_size, ignore)


def from_lmobj(params: Mapping[str, Any], config: EncoderDecoderConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """The model's parameters as Hugging Face's tensors: undoes `to_lmobj` but for the rows that no position reads.

    The padded rows of the vocabulary are left out, and so are copies of the embedding.

    Raises:
      UserError: settings that BART does not have, or parameters that are not the model's.
    """
    tensors = write(table_of(config), params, config, vocab_size)
    for name in _POSITIONS:
        tensors[name] = np.pad(tensors[name], [(_UNREAD, 0), (0, 0)])
    tensors[_BIAS] = tensors[_BIAS][None]
    return tensors


def load(folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
    """A BART from a folder with config.json and safetensors.

    Args:
      folder: as Transformers' `save_pretrained` writes it.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `EncoderDecoderConfig` to set beside those that config.json gives (dtype, dropout, ...).

    Raises:
      UserError: files that are missing or malformed, or a model that does not fit.
    """
    values, tensors = _files.read_folder(folder, "bart")
    config = dataclasses.replace(config_from_hf(values), **settings)
    vocab = _files.vocabulary(values, setting(values, "vocab_size", 50265))
    return Checkpoint(config, vocab, to_lmobj(tensors, config, vocab_size=vocab.size, ignore=ignore))


def save(
    folder: str | os.PathLike[str], params: Mapping[str, Any], config: EncoderDecoderConfig, vocab: Vocabulary
) -> None:
    """Writes an encoder-decoder so that Transformers' `BartForConditionalGeneration.from_pretrained` reads it.

    Raises:
      UserError: settings that BART does not have, or a folder that already holds a model.
    """
    _files.write_folder(folder, config_to_hf(config, vocab), from_lmobj(params, config, vocab.size))


def table_of(config: EncoderDecoderConfig) -> tuple[Name, ...]:
    """The names of every tensor of a model with these settings.

    Raises:
      UserError: settings that BART does not have.
    """
    _check(config)
    shared = Name(_SHARED, "tokens/table", vocab=True), Name(_BIAS, "output_bias", vocab=True)
    return (*shared, *_side("encoder"), *_side("decoder"))


def _side(side: str) -> tuple[Name, ...]:
    blocks, theirs = f"{side}/stack/blocks", f"model.{side}.layers.{{}}"
    parts = {"attention": "self_attn"} | ({"cross_attention": "encoder_attn"} if side == "decoder" else {})
    names = [
        Name(f"model.{side}.embed_positions.weight", f"{side}/positions/table"),
        *norm(f"model.{side}.layernorm_embedding", f"{side}/embedding_norm"),
        *linear(f"{theirs}.fc1", f"{blocks}/mlp/up"),
        *linear(f"{theirs}.fc2", f"{blocks}/mlp/down"),
        *norm(f"{theirs}.final_layer_norm", f"{blocks}/mlp_norm"),
    ]
    for ours, part in parts.items():
        names += norm(f"{theirs}.{part}_layer_norm", f"{blocks}/{ours}_norm")
        for tensor, path in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}.items():
            names += linear(f"{theirs}.{part}.{tensor}", f"{blocks}/{ours}/{path}")
    return tuple(names)


def _check(config: EncoderDecoderConfig) -> None:
    """Refuses what BART does not have."""
    accepted = {
        "positions": ("learned",),
        "norm": ("layernorm",),
        "norm_eps": (1e-5,),
        "pre_norm": (False,),
        "embedding_norm": (True,),
        "activation": tuple(_ACTIVATIONS.values()),
        "bias": (True,),
        "head_width": (None, config.width // config.heads),
        "tie_embeddings": (True,),
        "output_bias": (True,),
        "scale_attention": (True,),
        "scale_output": (False,),
    }
    refuse_others(config, "BART", accepted)
