"""The objectives that are not made of others, as one union. A new one is registered by a line here."""

from __future__ import annotations

from lmobj.objectives._causal_lm import CausalLM
from lmobj.objectives._classification import Classification
from lmobj.objectives._denoising_autoencoder import DenoisingAutoencoder
from lmobj.objectives._extractive_qa import ExtractiveQA
from lmobj.objectives._fill_in_middle import FillInMiddle
from lmobj.objectives._masked_diffusion import MaskedDiffusion
from lmobj.objectives._masked_lm import MaskedLM
from lmobj.objectives._matching import InBatchContrastive, Triplet
from lmobj.objectives._mixture_of_denoisers import MixtureOfDenoisers
from lmobj.objectives._multi_label import MultiLabel
from lmobj.objectives._multi_token import MultiTokenPrediction
from lmobj.objectives._multiple_choice import MultipleChoice
from lmobj.objectives._permutation_lm import PermutationLM
from lmobj.objectives._regression import Regression
from lmobj.objectives._relation import RelationClassification
from lmobj.objectives._replaced_token_detection import ReplacedTokenDetection
from lmobj.objectives._sentence_pairs import NextSentencePrediction, SentenceOrderPrediction
from lmobj.objectives._sequence_to_sequence import SequenceToSequence
from lmobj.objectives._simcse import SimCSE
from lmobj.objectives._span_boundary import SpanBoundary
from lmobj.objectives._span_corruption import PrefixLM, SpanCorruption
from lmobj.objectives._token_classification import TokenClassification
from lmobj.objectives._transformer_xl import TransformerXL

__all__ = ["SingleObjective"]

SingleObjective = (
    CausalLM
    | Classification
    | DenoisingAutoencoder
    | ExtractiveQA
    | FillInMiddle
    | InBatchContrastive
    | MaskedDiffusion
    | MaskedLM
    | MixtureOfDenoisers
    | MultiLabel
    | MultiTokenPrediction
    | MultipleChoice
    | NextSentencePrediction
    | PermutationLM
    | PrefixLM
    | Regression
    | RelationClassification
    | ReplacedTokenDetection
    | SentenceOrderPrediction
    | SequenceToSequence
    | SimCSE
    | SpanBoundary
    | SpanCorruption
    | TokenClassification
    | TransformerXL
    | Triplet
)
