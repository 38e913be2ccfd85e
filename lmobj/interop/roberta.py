"""RoBERTa: Transformers' `RobertaForMaskedLM` <-> `lmobj.models.Encoder`.

Transformers counts RoBERTa's positions from the padding's id + 1, so that its table has that many rows more than there
are positions. lmobj counts from 0 and leaves them out: the padding's row, which is zeros, and those before it, which
nothing reads. Written files have zeros there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import _encoder, _files
from lmobj.interop._encoder import body, embeddings, modern
from lmobj.interop._files import Checkpoint, setting
from lmobj.interop._names import Name, Tensors, check_copies, linear, norm, read, vocabulary_rows, write
from lmobj.models import EncoderConfig

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "to_lmobj"]

TABLE = (
    *embeddings("roberta.embeddings"),
    *body("roberta"),
    *linear("lm_head.dense", "head/dense"),
    *norm("lm_head.layer_norm", "head/norm"),
    Name("lm_head.bias", "head/bias", vocab=True),
)

_WORDS = "roberta.embeddings.word_embeddings.weight"
_PLACES = "roberta.embeddings.position_embeddings.weight"
_POSITIONS = "roberta.embeddings.position_ids"
"""0, 1, 2, ..., which older versions of Transformers stored beside the parameters."""
_COPIES = {"lm_head.decoder.weight": _WORDS, "lm_head.decoder.bias": "lm_head.bias"}
_LACKS = {"share_layers": False, "embedding_width": None}
_PAD = 1
"""Of Transformers' `RobertaConfig`."""


def config_from_hf(settings: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that a RoBERTa's config.json describes. Absent keys have the defaults of `RobertaConfig`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's encoder does not have.
    """
    config = _encoder.config_from_hf(settings)
    skipped = _skipped(setting(settings, "pad_token_id", _PAD))
    if config.max_length <= skipped:
        raise UserError(
            f"config.json: max_position_embeddings is {config.max_length}, and the first {skipped} are not for tokens; "
            f"accepted: at least {skipped + 1}."
        )
    return dataclasses.replace(config, max_length=config.max_length - skipped)


def config_to_hf(config: EncoderConfig, vocab: Vocabulary) -> dict[str, Any]:
    """The config.json of an encoder.

    Raises:
      UserError: settings that RoBERTa does not have.
    """
    described = _encoder.config_to_hf(config, vocab, "roberta", "RobertaForMaskedLM", lacks=_LACKS)
    return described | {"max_position_embeddings": config.max_length + _skipped(vocab.pad)}


def to_lmobj(
    tensors: Tensors,
    config: EncoderConfig,
    *,
    pad: int = _PAD,
    vocab_size: int | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Hugging Face's tensors as the encoder's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

    Args:
      tensors: name -> tensor, as `RobertaForMaskedLM` names them.
      config: the encoder's settings (`config_from_hf`).
      pad: id of the padding, after which positions are counted.
      vocab_size: rows of the embedding; None: as many as the tensor has.
      ignore: prefixes of names to leave behind, such as `roberta.pooler` of the original release.

    Raises:
      UserError: tensors that are missing, unknown or of another shape.
    """
    tensors = modern(tensors)
    tensors.pop(_POSITIONS, None)
    tensors = check_copies(tensors, _COPIES)
    if _PLACES in tensors:
        tensors[_PLACES] = tensors[_PLACES][_skipped(pad) :]
    vocab_size = vocab_size or vocabulary_rows(tensors, _WORDS)
    return read(TABLE, tensors, config, vocab_size, ignore)


def from_lmobj(
    params: Mapping[str, Any], config: EncoderConfig, vocab_size: int, *, pad: int = _PAD
) -> dict[str, np.ndarray]:
    """The encoder's parameters as Hugging Face's tensors; `to_lmobj` undoes it bit for bit.

    The padded rows of the vocabulary are left out. The tied output table is not written twice.

    Raises:
      UserError: parameters that are not the model's.
    """
    tensors = write(TABLE, params, config, vocab_size)
    return tensors | {_PLACES: np.pad(tensors[_PLACES], ((_skipped(pad), 0), (0, 0)))}


def load(folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
    """A RoBERTa from a folder with config.json and safetensors.

    Args:
      folder: as Transformers' `save_pretrained` writes it.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `EncoderConfig` to set beside those that config.json gives (dtype, dropout, remat, ...).

    Raises:
      UserError: files that are missing or malformed, or a model that does not fit.
    """
    values, tensors = _files.read_folder(folder, "roberta")
    config = dataclasses.replace(config_from_hf(values), **settings)
    vocab = _files.vocabulary({"pad_token_id": _PAD, **values}, setting(values, "vocab_size", 50265))
    params = to_lmobj(tensors, config, pad=vocab.pad, vocab_size=vocab.size, ignore=ignore)
    return Checkpoint(config, vocab, params)


def save(folder: str | os.PathLike[str], params: Mapping[str, Any], config: EncoderConfig, vocab: Vocabulary) -> None:
    """Writes an encoder so that Transformers' `RobertaForMaskedLM.from_pretrained` reads it.

    Raises:
      UserError: settings that RoBERTa does not have, or a folder that already holds a model.
    """
    tensors = from_lmobj(params, config, vocab.size, pad=vocab.pad)
    _files.write_folder(folder, config_to_hf(config, vocab), tensors)


def _skipped(pad: int) -> int:
    """Rows of the table of positions before that of the first token."""
    return pad + 1
