"""ELECTRA: Transformers' `ElectraForMaskedLM` and `ElectraForPreTraining` <-> `lmobj.models.Electra`.

Hugging Face has a folder for the generator and another for the discriminator, each with its own copy of the embeddings
that ELECTRA's training shares. lmobj's model is the pair, so it is read from both folders and written to both.
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
from lmobj.interop._files import Checkpoint, must_be, setting
from lmobj.interop._names import Name, Tensors, check_copies, linear, norm, read_parts, vocabulary_rows, write
from lmobj.models import ElectraConfig, EncoderConfig

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "save", "to_lmobj"]

_WORDS = "electra.embeddings.word_embeddings.weight"
_POSITIONS = "electra.embeddings.position_ids"
"""0, 1, 2, ..., which older versions of Transformers stored beside the parameters."""
_COPIES = {"generator_lm_head.weight": _WORDS}
_DEFAULTS: dict[str, Any] = {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 1024}
"""Of Transformers' `ElectraConfig`, where they are not BERT's."""
_EMBEDDING_SIZE = 128
_OWN = ("layers", "width", "heads", "mlp_width")
"""Settings that differ between generator and discriminator."""


def config_from_hf(generator: Mapping[str, Any], discriminator: Mapping[str, Any]) -> ElectraConfig:
    """The pair that two config.json describe, with shared embeddings.

    Absent keys have the defaults of Transformers' `ElectraConfig`.

    Raises:
      UserError: a value of the wrong type, a variant that lmobj's encoder does not have, or two that are no pair.
    """
    small, large = _encoder_from_hf(generator), _encoder_from_hf(discriminator)
    for field in dataclasses.fields(EncoderConfig):
        ours, theirs = getattr(small, field.name), getattr(large, field.name)
        if field.name not in _OWN and ours != theirs:
            raise UserError(
                f"config.json: the generator's {field.name} is {ours!r} and the discriminator's {theirs!r}; accepted: "
                "the same of both."
            )
    fields = {field.name: getattr(large, field.name) for field in dataclasses.fields(EncoderConfig)}
    return ElectraConfig(
        **fields | {"name": "electra"},
        generator_fraction=small.width / large.width,
        generator_layers=small.layers,
        generator_heads=small.heads,
        generator_mlp_width=small.mlp_width,
    )


def config_to_hf(config: ElectraConfig, vocab: Vocabulary) -> tuple[dict[str, Any], dict[str, Any]]:
    """The config.json of the generator, and the discriminator's.

    Raises:
      UserError: settings that ELECTRA does not have in Transformers.
    """

    def described(encoder: EncoderConfig, architecture: str) -> dict[str, Any]:
        lacks = {"share_layers": False, "activation": "gelu_exact"}
        settings = _encoder.config_to_hf(encoder, vocab, "electra", architecture, lacks=lacks)
        return settings | {"embedding_size": encoder.embedding_width or encoder.width}

    return described(config.generator, "ElectraForMaskedLM"), described(config.discriminator, "ElectraForPreTraining")


def to_lmobj(
    generator: Tensors,
    discriminator: Tensors,
    config: ElectraConfig,
    *,
    vocab_size: int | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, Any]:
    """Hugging Face's tensors as the pair's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

    Args:
      generator: name -> tensor, as `ElectraForMaskedLM` names them.
      discriminator: name -> tensor, as `ElectraForPreTraining` names them.
      config: the pair's settings (`config_from_hf`), with sharing `embeddings` or `none`.
      vocab_size: rows of the embedding; None: as many as the generator's tensor has.
      ignore: prefixes of names to leave behind.

    Raises:
      UserError: tensors that are missing, unknown or of another shape, or embeddings that are shared and differ.
    """
    if config.sharing not in ("embeddings", "none"):
        raise UserError(
            f"model.sharing is {config.sharing}, which two folders cannot say; accepted: embeddings, where their "
            "embeddings are equal, or none."
        )
    generator, discriminator = _prepared(generator), _prepared(discriminator)
    vocab_size = vocab_size or vocabulary_rows(generator, _WORDS)
    parts = [(_generator(config), generator), (_discriminator(config), discriminator)]
    return read_parts(parts, config, vocab_size, ignore)


def from_lmobj(
    params: Mapping[str, Any], config: ElectraConfig, vocab_size: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The pair's parameters as the generator's tensors and the discriminator's: undoes `to_lmobj` bit for bit.

    Each has the embeddings that it reads. The padded rows of the vocabulary are left out, and the tied output table is
    not written twice.

    Raises:
      UserError: parameters that are not the model's.
    """
    params, config = _apart(params, config)
    return (
        write(_generator(config), params, config, vocab_size),
        write(_discriminator(config), params, config, vocab_size),
    )


def load(
    generator: str | os.PathLike[str],
    discriminator: str | os.PathLike[str],
    *,
    ignore: Sequence[str] = (),
    **settings: Any,
) -> Checkpoint:
    """A pair from two folders with config.json and safetensors. Embeddings that are equal in both are shared.

    Args:
      generator: as Transformers' `ElectraForMaskedLM.save_pretrained` writes it.
      discriminator: the same of `ElectraForPreTraining`.
      ignore: prefixes of names of tensors to leave behind.
      settings: fields of `ElectraConfig` to set beside those that config.json gives (dtype, dropout, sharing, ...).

    Raises:
      UserError: files that are missing or malformed, or models that do not fit.
    """
    of_generator, small = _files.read_folder(generator, "electra")
    of_discriminator, large = _files.read_folder(discriminator, "electra")
    small, large = _prepared(small), _prepared(large)
    copied = [entry.theirs for entry in embeddings("electra.embeddings")]
    equal = all(name in small and name in large and np.array_equal(small[name], large[name]) for name in copied)
    config = config_from_hf(of_generator, of_discriminator)
    config = dataclasses.replace(config, **{"sharing": "embeddings" if equal else "none"} | settings)
    vocab = _files.vocabulary(of_discriminator, setting(of_discriminator, "vocab_size", 30522))
    return Checkpoint(config, vocab, to_lmobj(small, large, config, vocab_size=vocab.size, ignore=ignore))


def save(
    generator: str | os.PathLike[str],
    discriminator: str | os.PathLike[str],
    params: Mapping[str, Any],
    config: ElectraConfig,
    vocab: Vocabulary,
) -> None:
    """Writes a pair so that `ElectraForMaskedLM` and `ElectraForPreTraining` read it with `from_pretrained`.

    Raises:
      UserError: settings that ELECTRA does not have in Transformers, or a folder that already holds a model.
    """
    folders, tensors = (generator, discriminator), from_lmobj(params, config, vocab.size)
    for folder, settings, of_folder in zip(folders, config_to_hf(config, vocab), tensors, strict=True):
        _files.write_folder(folder, settings, of_folder)


def _encoder_from_hf(settings: Mapping[str, Any]) -> EncoderConfig:
    must_be(settings, "hidden_act", "gelu", "Transformers' generator has no other activation in its head")
    encoder = _encoder.config_from_hf(settings, **_DEFAULTS)
    return dataclasses.replace(encoder, embedding_width=setting(settings, "embedding_size", _EMBEDDING_SIZE))


def _generator(config: ElectraConfig) -> tuple[Name, ...]:
    return (
        *embeddings("electra.embeddings"),
        *_projection(config.generator, "generator"),
        *body("electra", "generator/stack"),
        *linear("generator_predictions.dense", "generator_head/dense"),
        *norm("generator_predictions.LayerNorm", "generator_head/norm"),
        Name("generator_lm_head.bias", "generator_head/bias", vocab=True),
    )


def _discriminator(config: ElectraConfig) -> tuple[Name, ...]:
    return (
        *embeddings("electra.embeddings", "discriminator_embeddings" if config.sharing == "none" else "embeddings"),
        *_projection(config.discriminator, "discriminator"),
        *body("electra", "discriminator/stack"),
        *linear("discriminator_predictions.dense", "discriminator_head/dense"),
        *linear("discriminator_predictions.dense_prediction", "discriminator_head/out"),
    )


def _projection(encoder: EncoderConfig, ours: str) -> tuple[Name, ...]:
    if encoder.embedding_width in (None, encoder.width):
        return ()
    return linear("electra.embeddings_project", f"{ours}/projection")


def _prepared(tensors: Tensors) -> dict[str, np.ndarray]:
    return check_copies({n: tensor for n, tensor in modern(tensors).items() if n != _POSITIONS}, _COPIES)


def _apart(params: Mapping[str, Any], config: ElectraConfig) -> tuple[Mapping[str, Any], ElectraConfig]:
    """The same two models as a pair whose sharing two folders can say."""
    if config.sharing == "gradient_disentangled":
        shared, added = params["embeddings"], params["discriminator_embeddings"]
        tables = {
            name: {"table": np.asarray(shared[name]["table"]) + np.asarray(part["table"])}
            for name, part in added.items()
            if name != "norm"
        }
        own = {"discriminator_embeddings": tables | {"norm": added["norm"]}}
        return dict(params) | own, dataclasses.replace(config, sharing="none")
    if config.sharing == "all":
        trunk = config.discriminator
        config = dataclasses.replace(
            config, sharing="embeddings", generator_heads=trunk.heads, generator_mlp_width=trunk.mlp_width
        )
        return dict(params) | {"generator": params["discriminator"]}, config
    return params, config
