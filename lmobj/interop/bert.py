"""BERT: Transformers' `BertForMaskedLM` <-> `lmobj.models.Encoder`.

Hugging Face keeps BERT's linear maps as [out, in] (PyTorch's Linear) and lmobj as [in, out]. Files of the original
release call the parameters of norms `gamma` and `beta`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import _files
from lmobj.interop._files import Checkpoint, must_be, one_of, setting
from lmobj.interop._names import Name, Tensors, check_copies, read, renamed, write
from lmobj.models import EncoderConfig

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "to_lmobj"]


def _linear(theirs: str, ours: str) -> tuple[Name, Name]:
    return Name(f"{theirs}.weight", f"{ours}/kernel", transposed=True), Name(f"{theirs}.bias", f"{ours}/bias")


def _norm(theirs: str, ours: str) -> tuple[Name, Name]:
    return Name(f"{theirs}.weight", f"{ours}/scale"), Name(f"{theirs}.bias", f"{ours}/bias")


TABLE = (
    Name("bert.embeddings.word_embeddings.weight", "tokens/table", vocab=True),
    Name("bert.embeddings.position_embeddings.weight", "positions/table"),
    Name("bert.embeddings.token_type_embeddings.weight", "token_types/table"),
    *_norm("bert.embeddings.LayerNorm", "norm"),
    *_linear("bert.encoder.layer.{}.attention.self.query", "stack/blocks/attention/query"),
    *_linear("bert.encoder.layer.{}.attention.self.key", "stack/blocks/attention/key"),
    *_linear("bert.encoder.layer.{}.attention.self.value", "stack/blocks/attention/value"),
    *_linear("bert.encoder.layer.{}.attention.output.dense", "stack/blocks/attention/out"),
    *_norm("bert.encoder.layer.{}.attention.output.LayerNorm", "stack/blocks/attention_norm"),
    *_linear("bert.encoder.layer.{}.intermediate.dense", "stack/blocks/mlp/up"),
    *_linear("bert.encoder.layer.{}.output.dense", "stack/blocks/mlp/down"),
    *_norm("bert.encoder.layer.{}.output.LayerNorm", "stack/blocks/mlp_norm"),
    *_linear("cls.predictions.transform.dense", "head_dense"),
    *_norm("cls.predictions.transform.LayerNorm", "head_norm"),
    Name("cls.predictions.bias", "head_bias", vocab=True),
)
POOLER = _linear("bert.pooler.dense", "pooler")
"""Added to the table where the encoder has a pooler."""

_COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_POSITIONS = "bert.embeddings.position_ids"
"""0, 1, 2, ..., which older versions of Transformers stored beside the parameters."""

_Activation = Literal["gelu", "gelu_exact"]
_ACTIVATIONS: dict[str, _Activation] = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}


def config_from_hf(settings: Mapping[str, Any], *, pooler: bool = False) -> EncoderConfig:
    """The encoder that a BERT's config.json describes. Absent keys have the defaults of Transformers' `BertConfig`.

    `pooler` is asked for because config.json does not say whether the model has one.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's encoder does not have.
    """
    must_be(settings, "position_embedding_type", "absolute", "lmobj's encoder has no relative positions")
    must_be(settings, "is_decoder", False, "lmobj's encoder reads in both directions")
    must_be(settings, "add_cross_attention", False, "lmobj's encoder has no cross attention")
    must_be(settings, "tie_word_embeddings", True, "lmobj's encoder ties its output table to the embedding")
    return EncoderConfig(
        layers=setting(settings, "num_hidden_layers", 12),
        width=setting(settings, "hidden_size", 768),
        heads=setting(settings, "num_attention_heads", 12),
        mlp_width=setting(settings, "intermediate_size", 3072),
        max_length=setting(settings, "max_position_embeddings", 512),
        token_types=setting(settings, "type_vocab_size", 2),
        norm_eps=setting(settings, "layer_norm_eps", 1e-12),
        activation=one_of(settings, "hidden_act", "gelu", _ACTIVATIONS),
        dropout=setting(settings, "hidden_dropout_prob", 0.1),
        embedding_dropout=setting(settings, "hidden_dropout_prob", 0.1),
        attention_dropout=setting(settings, "attention_probs_dropout_prob", 0.1),
        init_std=setting(settings, "initializer_range", 0.02),
        pooler=pooler,
    )


def config_to_hf(config: EncoderConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The config.json of an encoder.

    Raises:
      UserError: settings that BERT does not have.
    """
    if config.embedding_dropout != config.dropout:
        raise UserError(
            f"model.embedding_dropout is {config.embedding_dropout}; Hugging Face's BERT has one rate for it and for "
            f"model.dropout, so the only one accepted is {config.dropout}."
        )
    for name, accepted in (("positions", "learned"), ("pre_norm", False)):
        if getattr(config, name) != accepted:
            raise UserError(
                f"model.{name} is {getattr(config, name)!r}; in BERT the only one accepted is {accepted!r}."
            )
    return {
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "vocab_size": vocab.size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width or 4 * config.width,
        "max_position_embeddings": config.max_length,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": "gelu" if config.activation == "gelu_exact" else "gelu_new",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        "pad_token_id": vocab.pad,
        "bos_token_id": vocab.bos,
        "eos_token_id": vocab.eos,
    }


def to_lmobj(
    tensors: Tensors, config: EncoderConfig, *, vocab_size: int | None = None, ignore: Sequence[str] = ()
) -> dict[str, Any]:
    """Hugging Face's tensors as the encoder's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

    Args:
      tensors: name -> tensor, as `BertForMaskedLM` names them.
      config: the encoder's settings (`config_from_hf`).
      vocab_size: rows of the embedding; None: as many as the tensor has.
      ignore: prefixes of names to leave behind, such as `cls.seq_relationship` of the original release.

    Raises:
      UserError: tensors that are missing, unknown or of another shape.
    """
    tensors = renamed(tensors, _modern)
    tensors.pop(_POSITIONS, None)
    tensors = check_copies(tensors, _COPIES)
    if vocab_size is None:
        embedding = tensors.get("bert.embeddings.word_embeddings.weight")
        vocab_size = embedding.shape[0] if embedding is not None and embedding.ndim else 1  # absent: an error in `read`
    return read(_table(config), tensors, config, vocab_size, ignore)


def from_lmobj(params: Mapping[str, Any], config: EncoderConfig, vocab_size: int) -> dict[str, np.ndarray]:
    """The encoder's parameters as Hugging Face's tensors: undoes `to_lmobj` bit for bit.

    The padded rows of the vocabulary are left out. The tied output table is not written twice.

    Raises:
      UserError: parameters that are not the model's.
    """
    return write(_table(config), params, config, vocab_size)


def load(folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
    """A BERT from a folder with config.json and safetensors; it has a pooler if the tensors have one.

    Args:
      folder: as Transformers' `save_pretrained` writes it.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `EncoderConfig` to set beside those that config.json gives (dtype, dropout, remat, ...).

    Raises:
      UserError: files that are missing or malformed, or a model that does not fit.
    """
    values, tensors = _files.read_folder(folder, "bert")
    pooler = any(name.startswith("bert.pooler.") for name in tensors) and not "bert.pooler.".startswith(tuple(ignore))
    config = dataclasses.replace(config_from_hf(values, pooler=pooler), **settings)
    vocab = _files.vocabulary(values, setting(values, "vocab_size", 30522))
    return Checkpoint(config, vocab, to_lmobj(tensors, config, vocab_size=vocab.size, ignore=ignore))


def save(folder: str | os.PathLike[str], params: Mapping[str, Any], config: EncoderConfig, vocab: Vocabulary) -> None:
    """Writes an encoder so that Transformers' `BertForMaskedLM.from_pretrained` reads it.

    Raises:
      UserError: settings that BERT does not have, or a folder that already holds a model.
    """
    _files.write_folder(folder, config_to_hf(config, vocab), from_lmobj(params, config, vocab.size))


def _table(config: EncoderConfig) -> tuple[Name, ...]:
    return (*TABLE, *POOLER) if config.pooler else TABLE


def _modern(name: str) -> str:
    """The name as it is today."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name
