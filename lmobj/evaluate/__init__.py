"""Evaluation: baselines, decoding, and what can be said about generated text."""

from __future__ import annotations

from lmobj.evaluate._beam_search import BeamConfig, beam_search
from lmobj.evaluate._cached import Generated, output_logits
from lmobj.evaluate._cloze import Cloze, cloze_hits
from lmobj.evaluate._decoding import DecodingConfig, FilledMasks, fill_masks, generate
from lmobj.evaluate._few_shot import Answers, FewShot, Shot, answer_queries, choose_shots
from lmobj.evaluate._logit_filters import min_p_filter, repetition_penalty, top_k_filter, top_p_filter
from lmobj.evaluate._ngram import NGram, bits_per_byte, unigram_top_k
from lmobj.evaluate._sampling import SamplingConfig, sample
from lmobj.evaluate._text import Continuation, Filling, continue_text, fill_text, masked_tokens
from lmobj.evaluate._text_statistics import TextStatistics, text_statistics

__all__ = [
    "Answers",
    "BeamConfig",
    "Cloze",
    "Continuation",
    "DecodingConfig",
    "FewShot",
    "FilledMasks",
    "Filling",
    "Generated",
    "NGram",
    "SamplingConfig",
    "Shot",
    "TextStatistics",
    "answer_queries",
    "beam_search",
    "bits_per_byte",
    "choose_shots",
    "cloze_hits",
    "continue_text",
    "fill_masks",
    "fill_text",
    "generate",
    "masked_tokens",
    "min_p_filter",
    "output_logits",
    "repetition_penalty",
    "sample",
    "text_statistics",
    "top_k_filter",
    "top_p_filter",
    "unigram_top_k",
]
