"""T5 and T5 1.1: Transformers' `T5ForConditionalGeneration` <-> `lmobj.models.EncoderDecoder`.

T5 ties its output table to the embedding and divides hidden states by the root of the width before it; T5 1.1 has a
table of its own, and a gated feed-forward part. PyTorch keeps copies of the embedding under the encoder's and the
decoder's names. In a config.json, `tie_word_embeddings: false` says that hidden states are not divided; Transformers 5
writes true in any case, with `scale_decoder_outputs` beside it, and whether tables are tied is seen from the tensors.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmobj.batch import Vocabulary
from lmobj.interop import _files
from lmobj.interop._files import Checkpoint, one_of, setting
from lmobj.interop._names import Name, Tensors, check_copies, linear, read, refuse_others, vocabulary_rows, write
from lmobj.models import EncoderDecoderConfig
from lmobj.models._layers import Activation

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "table_of", "to_lmobj"]

_ACTIVATIONS: dict[str, Activation] = {"relu": "relu", "gated-gelu": "geglu"}
_COPIES = {f"{side}.embed_tokens.weight": "shared.weight" for side in ("encoder", "decoder")}


def config_from_hf(settings: Mapping[str, Any]) -> EncoderDecoderConfig:
    """The model that a T5's config.json describes. Absent keys have the defaults of Transformers' `T5Config`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj does not have.
    """
    layers, rate = setting(settings, "num_layers", 6), setting(settings, "dropout_rate", 0.1)
    tied = setting(settings, "tie_word_embeddings", True)
    decoder = settings.get("num_decoder_layers")
    return EncoderDecoderConfig(
        layers=layers,
        decoder_layers=None if decoder is None else setting(settings, "num_decoder_layers", layers),
        width=setting(settings, "d_model", 512),
        heads=setting(settings, "num_heads", 8),
        head_width=setting(settings, "d_kv", 64),
        mlp_width=setting(settings, "d_ff", 2048),
        max_length=setting(settings, "n_positions", 512),
        relative_buckets=setting(settings, "relative_attention_num_buckets", 32),
        relative_distance=setting(settings, "relative_attention_max_distance", 128),
        norm_eps=setting(settings, "layer_norm_epsilon", 1e-6),
        activation=one_of(settings, "feed_forward_proj", "relu", _ACTIVATIONS),
        tie_embeddings=tied,
        scale_output=setting(settings, "scale_decoder_outputs", tied),
        dropout=rate,
        attention_dropout=rate,
        embedding_dropout=rate,
    )


def config_to_hf(config: EncoderDecoderConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The config.json of an encoder-decoder.

    Raises:
      UserError: settings that T5 does not have (other positions, norms, biases and so on).
    """
    _check(config)
    return {
        "model_type": "t5",
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": vocab.size,
        "num_layers": config.layers,
        "num_decoder_layers": config.decoder_layers or config.layers,
        "d_model": config.width,
        "num_heads": config.heads,
        "d_kv": config.head_width or config.width // config.heads,
        "d_ff": config._block_spec(decoder=False).mlp_width,
        "n_positions": config.max_length,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": "relu" if config.activation == "relu" else "gated-gelu",
        "tie_word_embeddings": config.scale_output,
        "scale_decoder_outputs": config.scale_output,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": True,
        "pad_token_id": vocab.pad,
        "decoder_start_token_id": vocab.pad,
        "eos_token_id": vocab.eos,
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
      UserError: settings that T5 does not have, or tensors that are missing, unknown or of another shape.
    """
    table = table_of(config)
    copies = _COPIES | ({"lm_head.weight": "shared.weight"} if config.tie_embeddings else {})
    tensors = check_copies(tensors, copies)
    vocab_size = vocab_size or vocabulary_rows(tensors, "shared.weight")
    return read(table, tensors, config, vocab_size, ignore)


def from_lmobj(params: Mapping[str, Any], config: EncoderDecoderConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """The model's parameters as Hugging Face's tensors: undoes `to_lmobj` bit for bit.

    The padded rows of the vocabulary are left out, and so are copies of the embedding.

    Raises:
      UserError: settings that T5 does not have, or parameters that are not the model's.
    """
    return write(table_of(config), params, config, vocab_size)


def load(folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
    """A T5 from a folder with config.json and safetensors.

    Args:
      folder: as Transformers' `save_pretrained` writes it.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `EncoderDecoderConfig` to set beside those that config.json gives (dtype, dropout, ...).

    Raises:
      UserError: files that are missing or malformed, or a model that does not fit.
    """
    values, tensors = _files.read_folder(folder, "t5")
    output = tensors.get("lm_head.weight")
    tied = output is None or np.array_equal(output, tensors.get("shared.weight", output))
    config = dataclasses.replace(config_from_hf(values), **{"tie_embeddings": tied, **settings})
    vocab = _files.vocabulary(values, setting(values, "vocab_size", 32128))
    return Checkpoint(config, vocab, to_lmobj(tensors, config, vocab_size=vocab.size, ignore=ignore))


def save(
    folder: str | os.PathLike[str], params: Mapping[str, Any], config: EncoderDecoderConfig, vocab: Vocabulary
) -> None:
    """Writes an encoder-decoder so that Transformers' `T5ForConditionalGeneration.from_pretrained` reads it.

    Raises:
      UserError: settings that T5 does not have, or a folder that already holds a model.
    """
    _files.write_folder(folder, config_to_hf(config, vocab), from_lmobj(params, config, vocab.size))


def table_of(config: EncoderDecoderConfig) -> tuple[Name, ...]:
    """The names of every tensor of a model with these settings.

    Raises:
      UserError: settings that T5 does not have.
    """
    _check(config)
    output = () if config.tie_embeddings else (Name("lm_head.weight", "head/table", vocab=True),)
    embedding = Name("shared.weight", "tokens/table", vocab=True)
    return (embedding, *_side(config, "encoder"), *_side(config, "decoder"), *output)


def _side(config: EncoderDecoderConfig, side: str) -> tuple[Name, ...]:
    """The tensors of a stack. Its layers' parts are numbered; attention over the encoder stands second."""
    blocks, theirs = f"{side}/stack/blocks", f"{side}.block.{{}}.layer"
    parts = [("attention", "SelfAttention"), ("mlp", "DenseReluDense")]
    if side == "decoder":
        parts.insert(1, ("cross_attention", "EncDecAttention"))
    attention = {"q": "query", "k": "key", "v": "value", "o": "out"}
    mlp = {"wi": "up", "wo": "down"} if config.activation == "relu" else {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    names = [
        Name(f"{side}.final_layer_norm.weight", f"{side}/norm/scale"),
        Name(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", f"{side}/relative/table/table"),
    ]
    for i, (ours, part) in enumerate(parts):
        names.append(Name(f"{theirs}.{i}.layer_norm.weight", f"{blocks}/{ours}_norm/scale"))
        for tensor, path in (mlp if ours == "mlp" else attention).items():
            names.append(linear(f"{theirs}.{i}.{part}.{tensor}", f"{blocks}/{ours}/{path}")[0])
    return tuple(names)


def _check(config: EncoderDecoderConfig) -> None:
    """Refuses what T5 does not have."""
    accepted = {
        "positions": ("relative",),
        "norm": ("rmsnorm",),
        "pre_norm": (True,),
        "embedding_norm": (False,),
        "activation": ("relu", "geglu"),
        "bias": (False,),
        "output_bias": (False,),
        "scale_attention": (False,),
        "scale_embeddings": (False,),
        "scale_output": (True, False) if config.tie_embeddings else (False,),
    }
    refuse_others(config, "T5", accepted)
