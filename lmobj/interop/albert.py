"""ALBERT: Transformers' `AlbertForMaskedLM` and `AlbertForPreTraining` <-> `lmobj.models.Encoder` and its pair head.

The encoder has `embedding_width` and `share_layers`: one layer in one group, applied in all places. The pooler and the
sentence-order classifier, which `AlbertForPreTraining` has besides, are a model of their own here, the `PairHead`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.interop import _encoder
from lmobj.interop._encoder import PairedFamily, embeddings
from lmobj.interop._files import setting
from lmobj.interop._names import Name, linear, norm
from lmobj.models import EncoderConfig

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "pair_head", "save", "to_lmobj"]

_LAYER = "albert.encoder.albert_layer_groups.{}.albert_layers.0"
"""The index is the group's, of which there is one: the axis that stacks layers has length 1 where they are shared."""

TABLE = (
    *embeddings("albert.embeddings"),
    *linear("albert.encoder.embedding_hidden_mapping_in", "projection"),
    *linear(f"{_LAYER}.attention.query", "stack/blocks/attention/query"),
    *linear(f"{_LAYER}.attention.key", "stack/blocks/attention/key"),
    *linear(f"{_LAYER}.attention.value", "stack/blocks/attention/value"),
    *linear(f"{_LAYER}.attention.dense", "stack/blocks/attention/out"),
    *norm(f"{_LAYER}.attention.LayerNorm", "stack/blocks/attention_norm"),
    *linear(f"{_LAYER}.ffn", "stack/blocks/mlp/up"),
    *linear(f"{_LAYER}.ffn_output", "stack/blocks/mlp/down"),
    *norm(f"{_LAYER}.full_layer_layer_norm", "stack/blocks/mlp_norm"),
    *linear("predictions.dense", "head/dense"),
    *norm("predictions.LayerNorm", "head/norm"),
    Name("predictions.bias", "head/bias", vocab=True),
)
PAIR_HEAD = (*linear("albert.pooler", "pooler"), *linear("sop_classifier.classifier", "classifier"))

_COPIES = {
    "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
    "predictions.decoder.bias": "predictions.bias",
}
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "intermediate_size": 16384,
    "hidden_act": "gelu_new",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
"""Of Transformers' `AlbertConfig`, where they are not BERT's."""


def config_from_hf(settings: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that an ALBERT's config.json describes.

    Absent keys have the defaults of Transformers' `AlbertConfig`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's encoder does not have.
    """
    for key in ("num_hidden_groups", "inner_group_num"):
        if setting(settings, key, 1) != 1:
            raise UserError(f"config.json: {key} is {settings[key]!r}; accepted: 1, because lmobj shares one layer.")
    width = setting(settings, "embedding_size", 128)
    encoder = _encoder.config_from_hf(settings, **_DEFAULTS)
    return dataclasses.replace(encoder, embedding_width=width, share_layers=True)


def config_to_hf(config: EncoderConfig, vocab: Vocabulary, *, pair_head: bool = False) -> dict[str, Any]:
    """The config.json of an encoder, with or without a pair head.

    Raises:
      UserError: settings that ALBERT does not have.
    """
    if config.embedding_width in (None, config.width):
        raise UserError(
            f"model.embedding_width is {config.embedding_width}; in albert the embedding is projected, so the width "
            f"must differ from model.width, {config.width}."
        )
    architecture = "AlbertForPreTraining" if pair_head else "AlbertForMaskedLM"
    described = _encoder.config_to_hf(config, vocab, "albert", architecture, lacks={"share_layers": True})
    return described | {"embedding_size": config.embedding_width, "num_hidden_groups": 1, "inner_group_num": 1}


_FAMILY = PairedFamily("albert", TABLE, PAIR_HEAD, _COPIES, config_from_hf, config_to_hf, 30000)

to_lmobj, pair_head, from_lmobj = _FAMILY.to_lmobj, _FAMILY.pair_head, _FAMILY.from_lmobj
load, save = _FAMILY.load, _FAMILY.save
