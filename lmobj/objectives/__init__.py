"""Training objectives: each a frozen dataclass of hyper-parameters that is a pure function of (models, batch, keys)."""

from lmobj.objectives._bi_encoder import BiEncoder, Pooling
from lmobj.objectives._causal_lm import CausalLM
from lmobj.objectives._classification import Classification
from lmobj.objectives._denoising_autoencoder import DenoisingAutoencoder
from lmobj.objectives._extractive_qa import ExtractiveQA
from lmobj.objectives._fill_in_middle import FillInMiddle
from lmobj.objectives._functional import denominators, loss_fn, row_ids_of, step_keys, total_loss
from lmobj.objectives._masked_diffusion import MaskedDiffusion
from lmobj.objectives._masked_lm import MaskedLM
from lmobj.objectives._matching import InBatchContrastive, Triplet
from lmobj.objectives._mixture import Member, Mixture, member_models
from lmobj.objectives._mixture_of_denoisers import Denoiser, MixtureOfDenoisers
from lmobj.objectives._multi_label import MultiLabel
from lmobj.objectives._multi_token import MultiTokenPrediction
from lmobj.objectives._multiple_choice import MultipleChoice
from lmobj.objectives._objective import (
    Context,
    Example,
    Judge,
    Metric,
    Models,
    Objective,
    ObjectiveState,
    Role,
    Rows,
    Task,
    TermKind,
    Terms,
    token_metrics,
)
from lmobj.objectives._permutation_lm import PermutationLM
from lmobj.objectives._registry import REGISTRY, ObjectiveConfig
from lmobj.objectives._regression import Regression
from lmobj.objectives._relation import RelationClassification
from lmobj.objectives._replaced_token_detection import ReplacedTokenDetection
from lmobj.objectives._routed import Routed, with_router_losses
from lmobj.objectives._sentence_pairs import NextSentencePrediction, SentenceOrderPrediction
from lmobj.objectives._sequence_to_sequence import SequenceToSequence
from lmobj.objectives._simcse import SimCSE
from lmobj.objectives._span_boundary import SpanBoundary
from lmobj.objectives._span_corruption import PrefixLM, SpanCorruption
from lmobj.objectives._text_to_text import InputsToTargets, TextToText
from lmobj.objectives._token_classification import TokenClassification
from lmobj.objectives._transformer_xl import TransformerXL

__all__ = [
    "REGISTRY",
    "BiEncoder",
    "CausalLM",
    "Classification",
    "Context",
    "Denoiser",
    "DenoisingAutoencoder",
    "Example",
    "ExtractiveQA",
    "FillInMiddle",
    "InBatchContrastive",
    "InputsToTargets",
    "Judge",
    "MaskedDiffusion",
    "MaskedLM",
    "Member",
    "Metric",
    "Mixture",
    "MixtureOfDenoisers",
    "Models",
    "MultiLabel",
    "MultiTokenPrediction",
    "MultipleChoice",
    "NextSentencePrediction",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveState",
    "PermutationLM",
    "Pooling",
    "PrefixLM",
    "Regression",
    "RelationClassification",
    "ReplacedTokenDetection",
    "Role",
    "Routed",
    "Rows",
    "SentenceOrderPrediction",
    "SequenceToSequence",
    "SimCSE",
    "SpanBoundary",
    "SpanCorruption",
    "Task",
    "TermKind",
    "Terms",
    "TextToText",
    "TokenClassification",
    "TransformerXL",
    "Triplet",
    "denominators",
    "loss_fn",
    "member_models",
    "row_ids_of",
    "step_keys",
    "token_metrics",
    "total_loss",
    "with_router_losses",
]
