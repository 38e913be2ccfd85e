"""Models: one file per family, from shared layers. They know masks; they know no objective."""

from __future__ import annotations

from lmobj.models._decoder import Decoder, DecoderConfig
from lmobj.models._electra import Electra, ElectraConfig
from lmobj.models._encoder import Encoder, EncoderConfig
from lmobj.models._encoder_decoder import EncoderDecoder, EncoderDecoderCache, EncoderDecoderConfig
from lmobj.models._further_tokens import ParallelHeads, SequentialHeads
from lmobj.models._gru import GRUConfig, GRULanguageModel
from lmobj.models._heads import HeadStyle, JoinedHead, PairHead, SpanBoundaryHead, TokenHead, VectorHead
from lmobj.models._layers import GATED
from lmobj.models._moe import MoEConfig
from lmobj.models._protocol import (
    BlockModel,
    Cache,
    CachedModel,
    CountsProducts,
    EncoderDecoderModel,
    GeneratorDiscriminator,
    HeadedModel,
    LanguageModel,
    MemoryModel,
    ModelBuilder,
    OutputHead,
    RowUse,
    TwoStreamModel,
)
from lmobj.models._routing import RoutedModel, RouterSums, RoutingCall, recorded_routing
from lmobj.models._xlnet import Memory, XLNet, XLNetConfig

ModelConfig = DecoderConfig | ElectraConfig | EncoderConfig | EncoderDecoderConfig | GRUConfig | XLNetConfig
"""Every family's settings, told apart by `name`."""

__all__ = [
    "GATED",
    "BlockModel",
    "Cache",
    "CachedModel",
    "CountsProducts",
    "Decoder",
    "DecoderConfig",
    "Electra",
    "ElectraConfig",
    "Encoder",
    "EncoderConfig",
    "EncoderDecoder",
    "EncoderDecoderCache",
    "EncoderDecoderConfig",
    "EncoderDecoderModel",
    "GRUConfig",
    "GRULanguageModel",
    "GeneratorDiscriminator",
    "HeadStyle",
    "HeadedModel",
    "JoinedHead",
    "LanguageModel",
    "Memory",
    "MemoryModel",
    "MoEConfig",
    "ModelBuilder",
    "ModelConfig",
    "OutputHead",
    "PairHead",
    "ParallelHeads",
    "RoutedModel",
    "RouterSums",
    "RoutingCall",
    "RowUse",
    "SequentialHeads",
    "SpanBoundaryHead",
    "TokenHead",
    "TwoStreamModel",
    "VectorHead",
    "XLNet",
    "XLNetConfig",
    "recorded_routing",
]
