"""What the families that came of BERT have in common in Hugging Face's files: names of layers, keys of config.json."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from flax import nnx

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import _files
from lmobj.interop._files import Checkpoint, must_be, one_of, setting
from lmobj.interop._names import Name, Tensors, check_copies, linear, norm, read, renamed, vocabulary_rows, write
from lmobj.models import EncoderConfig, PairHead

__all__ = ["PairedFamily", "body", "config_from_hf", "config_to_hf", "embeddings", "modern"]

_Activation = Literal["gelu", "gelu_exact"]
_ACTIVATIONS: dict[str, _Activation] = {"gelu": "gelu_exact", "gelu_new": "gelu", "gelu_pytorch_tanh": "gelu"}

_DEFAULTS: Mapping[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
}
"""Of Transformers' `BertConfig`."""


def embeddings(theirs: str, ours: str = "embeddings") -> tuple[Name, ...]:
    """The tables and the norm of embeddings."""
    return (
        Name(f"{theirs}.word_embeddings.weight", f"{ours}/tokens/table", vocab=True),
        Name(f"{theirs}.position_embeddings.weight", f"{ours}/positions/table"),
        Name(f"{theirs}.token_type_embeddings.weight", f"{ours}/token_types/table"),
        *norm(f"{theirs}.LayerNorm", f"{ours}/norm"),
    )


def body(theirs: str, ours: str = "stack") -> tuple[Name, ...]:
    """The blocks, as BERT's layers are named."""
    layer, block = f"{theirs}.encoder.layer.{{}}", f"{ours}/blocks"
    return (
        *linear(f"{layer}.attention.self.query", f"{block}/attention/query"),
        *linear(f"{layer}.attention.self.key", f"{block}/attention/key"),
        *linear(f"{layer}.attention.self.value", f"{block}/attention/value"),
        *linear(f"{layer}.attention.output.dense", f"{block}/attention/out"),
        *norm(f"{layer}.attention.output.LayerNorm", f"{block}/attention_norm"),
        *linear(f"{layer}.intermediate.dense", f"{block}/mlp/up"),
        *linear(f"{layer}.output.dense", f"{block}/mlp/down"),
        *norm(f"{layer}.output.LayerNorm", f"{block}/mlp_norm"),
    )


def config_from_hf(settings: Mapping[str, Any], **defaults: Any) -> EncoderConfig:
    """The encoder that a config.json describes; absent keys have `defaults`, else those of `BertConfig`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's encoder does not have.
    """
    must_be(settings, "position_embedding_type", "absolute", "lmobj's encoder has no relative positions")
    must_be(settings, "is_decoder", False, "lmobj's encoder reads in both directions")
    must_be(settings, "add_cross_attention", False, "lmobj's encoder has no cross attention")
    must_be(settings, "tie_word_embeddings", True, "lmobj's encoder ties its output table to the embedding")
    known = {**_DEFAULTS, **defaults}
    values = {key: setting(settings, key, default) for key, default in known.items()}
    return EncoderConfig(
        layers=values["num_hidden_layers"],
        width=values["hidden_size"],
        heads=values["num_attention_heads"],
        mlp_width=values["intermediate_size"],
        max_length=values["max_position_embeddings"],
        token_types=values["type_vocab_size"],
        norm_eps=values["layer_norm_eps"],
        activation=one_of(settings, "hidden_act", known["hidden_act"], _ACTIVATIONS),
        dropout=values["hidden_dropout_prob"],
        embedding_dropout=values["hidden_dropout_prob"],
        attention_dropout=values["attention_probs_dropout_prob"],
        init_std=values["initializer_range"],
    )


def config_to_hf(
    config: EncoderConfig, vocab: Vocabulary, model_type: str, architecture: str, *, lacks: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of an encoder.

    Args:
      model_type, architecture: Transformers' names of the family and of the model.
      lacks: settings that the family does not have -> the only values that it accepts.

    Raises:
      UserError: settings that the family does not have.
    """
    if config.embedding_dropout != config.dropout:
        raise UserError(
            f"model.embedding_dropout is {config.embedding_dropout}; Hugging Face's {model_type} has one rate for it "
            f"and for model.dropout, so the only one accepted is {config.dropout}."
        )
    for name, accepted in {"positions": "learned", "pre_norm": False, **lacks}.items():
        if getattr(config, name) != accepted:
            raise UserError(
                f"model.{name} is {getattr(config, name)!r}; in {model_type} the only one accepted is {accepted!r}."
            )
    return {
        "model_type": model_type,
        "architectures": [architecture],
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


@dataclass(frozen=True)
class PairedFamily:
    """A family of encoders that may come with a pair head: what differs, and all that is done with it.

    model_type: Transformers' name of the family.
    table, head_table: names of the encoder's tensors, and of the pair head's.
    copies: name of a tied tensor -> the one that it is a copy of.
    config_from_hf, config_to_hf: config.json to settings and back; the latter is told whether there is a pair head.
    vocab_size: of the vocabulary where config.json does not say.
    """

    model_type: str
    table: tuple[Name, ...]
    head_table: tuple[Name, ...]
    copies: Mapping[str, str]
    config_from_hf: Callable[[Mapping[str, Any]], EncoderConfig]
    config_to_hf: Callable[..., dict[str, Any]]
    vocab_size: int

    def to_lmobj(
        self, tensors: Tensors, config: EncoderConfig, *, vocab_size: int | None = None, ignore: Sequence[str] = ()
    ) -> dict[str, Any]:
        """Hugging Face's tensors as the encoder's parameters, nested dicts of NumPy arrays in `config.param_dtype`.

        Args:
          tensors: name -> tensor, as Transformers' model for masked LM names them. Those of a pair head are left to
            `pair_head`.
          config: the encoder's settings (`config_from_hf`).
          vocab_size: rows of the embedding; None: as many as the tensor has.
          ignore: prefixes of names to leave behind.

        Raises:
          UserError: tensors that are missing, unknown or of another shape.
        """
        tensors = modern(tensors)
        # 0, 1, 2, ..., which older versions of Transformers stored beside the parameters.
        tensors.pop(f"{self.model_type}.embeddings.position_ids", None)
        tensors = check_copies(tensors, self.copies)
        vocab_size = vocab_size or vocabulary_rows(tensors, self.table[0].theirs)
        return read(self.table, tensors, config, vocab_size, [*ignore, *(entry.theirs for entry in self.head_table)])

    def pair_head(
        self, tensors: Tensors, config: EncoderConfig, *, ignore: Sequence[str] = ()
    ) -> dict[str, Any] | None:
        """Pooler and classifier as the parameters of a `PairHead`; None where the tensors have neither.

        Class 0 says that the texts are as they were written, as everywhere in lmobj.

        Raises:
          UserError: only one of the two is there, or a tensor has another shape.
        """
        names = [entry.theirs for entry in self.head_table]
        present = {name: tensors[name] for name in names if name in tensors and not name.startswith(tuple(ignore))}
        if not present:
            return None
        if len(present) < len(names):
            raise UserError(
                f"Of the head on pairs of texts the file has {', '.join(present)} and lacks "
                f"{', '.join(name for name in names if name not in present)}; accepted: all of it, or none: name what "
                "is there in `ignore`."
            )
        return read(self.head_table, present, _PairHeads(config), vocab_size=1)

    def from_lmobj(
        self,
        params: Mapping[str, Any],
        config: EncoderConfig,
        vocab_size: int,
        *,
        pair_head: Mapping[str, Any] | None = None,
    ) -> dict[str, np.ndarray]:
        """The parameters of an encoder, and of its pair head if given, as Hugging Face's tensors.

        Undoes `to_lmobj` and `pair_head` bit for bit. The padded rows of the vocabulary are left out. The tied output
        table is not written twice.

        Raises:
          UserError: parameters that are not the model's.
        """
        tensors = write(self.table, params, config, vocab_size)
        return tensors if pair_head is None else tensors | write(self.head_table, pair_head, _PairHeads(config), 1)

    def load(self, folder: str | os.PathLike[str], *, ignore: Sequence[str] = (), **settings: Any) -> Checkpoint:
        """An encoder from a folder with config.json and safetensors, and its pair head if the tensors have one.

        Args:
          folder: as Transformers' `save_pretrained` writes it.
          ignore: prefixes of names of tensors to leave behind.
          settings: fields of `EncoderConfig` to set beside those that config.json gives (dtype, dropout, remat, ...).

        Raises:
          UserError: files that are missing or malformed, or a model that does not fit.
        """
        values, tensors = _files.read_folder(folder, self.model_type)
        config = dataclasses.replace(self.config_from_hf(values), **settings)
        vocab = _files.vocabulary(values, setting(values, "vocab_size", self.vocab_size))
        params = self.to_lmobj(tensors, config, vocab_size=vocab.size, ignore=ignore)
        return Checkpoint(config, vocab, params, self.pair_head(tensors, config, ignore=ignore))

    def save(
        self,
        folder: str | os.PathLike[str],
        params: Mapping[str, Any],
        config: EncoderConfig,
        vocab: Vocabulary,
        *,
        pair_head: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes an encoder so that Transformers' model for masked LM reads it with `from_pretrained`.

        With a pair head, its model for pre-training reads the whole.

        Raises:
          UserError: settings that the family does not have, or a folder that already holds a model.
        """
        described = self.config_to_hf(config, vocab, pair_head=pair_head is not None)
        _files.write_folder(folder, described, self.from_lmobj(params, config, vocab.size, pair_head=pair_head))


@dataclass(frozen=True)
class _PairHeads:
    """Builds the pair head of an encoder."""

    config: EncoderConfig

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> PairHead:
        """A head of two classes."""
        return PairHead(self.config.head_style, 2, rngs)


def modern(tensors: Tensors) -> dict[str, Any]:
    """The tensors with the names that norms have today; the original releases call their parameters gamma and beta."""

    def rename(name: str) -> str:
        for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
            name = name.removesuffix(old) + new if name.endswith(old) else name
        return name

    return renamed(tensors, rename)
