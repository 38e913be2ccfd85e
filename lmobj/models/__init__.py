"""Models: one file per family, from shared layers. They know masks; they know no objective."""

from __future__ import annotations

from lmobj.models._decoder import Decoder, DecoderConfig
from lmobj.models._encoder import Encoder, EncoderConfig
from lmobj.models._gru import GRUConfig, GRULanguageModel
from lmobj.models._protocol import Cache, CachedModel, LanguageModel, ModelBuilder, OutputHead

ModelConfig = DecoderConfig | EncoderConfig | GRUConfig
"""Every family's settings, told apart by `name`."""

__all__ = [
    "Cache",
    "CachedModel",
    "Decoder",
    "DecoderConfig",
    "Encoder",
    "EncoderConfig",
    "GRUConfig",
    "GRULanguageModel",
    "LanguageModel",
    "ModelBuilder",
    "ModelConfig",
    "OutputHead",
]
