"""BERT: Transformers' `BertForMaskedLM` and `BertForPreTraining` <-> `lmobj.models.Encoder` and its pair head.

Hugging Face keeps BERT's linear maps as [out, in] (PyTorch's Linear) and lmobj as [in, out]. The pooler and the
next-sentence classifier, which `BertForPreTraining` has besides, are a model of their own here: the `PairHead` of the
objectives that read pairs of texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmobj.batch import Vocabulary
from lmobj.interop import _encoder
from lmobj.interop._encoder import PairedFamily, body, embeddings
from lmobj.interop._names import Name, linear, norm
from lmobj.models import EncoderConfig

__all__ = ["config_from_hf", "config_to_hf", "from_lmobj", "load", "pair_head", "save", "to_lmobj"]

TABLE = (
    *embeddings("bert.embeddings"),
    *body("bert"),
    *linear("cls.predictions.transform.dense", "head/dense"),
    *norm("cls.predictions.transform.LayerNorm", "head/norm"),
    Name("cls.predictions.bias", "head/bias", vocab=True),
)
PAIR_HEAD = (*linear("bert.pooler.dense", "pooler"), *linear("cls.seq_relationship", "classifier"))

_COPIES = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
_LACKS = {"share_layers": False, "embedding_width": None}


def config_from_hf(settings: Mapping[str, Any]) -> EncoderConfig:
    """The encoder that a BERT's config.json describes. Absent keys have the defaults of Transformers' `BertConfig`.

    Raises:
      UserError: a value of the wrong type, or a variant that lmobj's encoder does not have.
    """
    return _encoder.config_from_hf(settings)


def config_to_hf(config: EncoderConfig, vocab: Vocabulary, *, pair_head: bool = False) -> dict[str, Any]:
    """The config.json of an encoder, with or without a pair head.

    Raises:
      UserError: settings that BERT does not have.
    """
    architecture = "BertForPreTraining" if pair_head else "BertForMaskedLM"
    return _encoder.config_to_hf(config, vocab, "bert", architecture, lacks=_LACKS)


_FAMILY = PairedFamily("bert", TABLE, PAIR_HEAD, _COPIES, config_from_hf, config_to_hf, 30522)

to_lmobj, pair_head, from_lmobj = _FAMILY.to_lmobj, _FAMILY.pair_head, _FAMILY.from_lmobj
load, save = _FAMILY.load, _FAMILY.save
