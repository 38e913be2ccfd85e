"""Evaluation: baselines, decoding, metrics of tasks, and what can be said about generated text."""

from __future__ import annotations

from lmobj.evaluate._answer_report import answer_questions
from lmobj.evaluate._answer_scores import (
    AnswerScores,
    AnswerSummary,
    answer_f1,
    apply_null_threshold,
    best_null_threshold,
    exact_match,
    normalise_answer,
    normalise_chinese_answer,
    score_answers,
    summarise_answers,
)
from lmobj.evaluate._answer_spans import AnswerSpan, FoundAnswers, find_answers
from lmobj.evaluate._answer_task import AnswerSource, AnswerTask
from lmobj.evaluate._beam_search import BeamConfig, beam_search
from lmobj.evaluate._cached import Generated, check_reads_rows, output_logits
from lmobj.evaluate._class_scores import (
    ClassReport,
    ClassScore,
    MultiLabelScores,
    RegressionScores,
    average_precisions,
    confusion_matrix,
    score_classes,
    score_labels,
    score_numbers,
)
from lmobj.evaluate._cloze import Cloze, cloze_hits
from lmobj.evaluate._decoding import DecodingConfig, FilledMasks, fill_masks, generate
from lmobj.evaluate._diffusion_bound import DiffusionBounds, diffusion_bounds
from lmobj.evaluate._entity_scores import EntityReport, EntityScore, score_entities
from lmobj.evaluate._few_shot import Answers, FewShot, Shot, answer_queries, choose_shots
from lmobj.evaluate._filled_spans import fill_spans, sentinel_tokens
from lmobj.evaluate._generation import (
    GenerationConfig,
    TextFigures,
    compare_decodings,
    passages,
    text_figures,
)
from lmobj.evaluate._likelihood import (
    Normalisation,
    ScoredText,
    answer_scores,
    continuation_log_probs,
    same_start,
    scored_text,
)
from lmobj.evaluate._logit_filters import min_p_filter, repetition_penalty, top_k_filter, top_p_filter
from lmobj.evaluate._ngram import NGram, bits_per_byte, unigram_top_k
from lmobj.evaluate._pictures import (
    ConfusionPicture,
    Picture,
    ScatterPicture,
    draw_confusion,
    read_picture,
    save_picture,
)
from lmobj.evaluate._prompt_template import AnsweredText, PromptTemplate
from lmobj.evaluate._resampling import (
    PairedBootstrap,
    SeedDifference,
    SeedSpread,
    paired_bootstrap,
    seed_difference,
    seed_spread,
)
from lmobj.evaluate._retrieval import RetrievalScores, cosine_scores, relevant_ranks, score_retrieval
from lmobj.evaluate._sampling import SamplingConfig, sample
from lmobj.evaluate._similarity import SimilarityScores, score_similarity, uniformity, word_overlap
from lmobj.evaluate._task_metrics import TASK_METRICS, TASKS, task_metrics, task_report
from lmobj.evaluate._task_report import ExampleScores, TaskKind, TaskReport
from lmobj.evaluate._text import (
    Continuation,
    Filling,
    Infilling,
    InfillingOrder,
    continuations,
    continue_text,
    fill_text,
    infill_text,
    infilling_tokens,
    masked_tokens,
)
from lmobj.evaluate._text_statistics import TextStatistics, distinct_share, repeated_share, self_bleu, text_statistics
from lmobj.evaluate._unmasking import UnmaskingConfig, unmask
from lmobj.evaluate._written import WritingConfig, write_targets
from lmobj.evaluate._written_scores import Words, WrittenReference, WrittenScores, check_scores, score_written

__all__ = [
    "TASKS",
    "TASK_METRICS",
    "AnswerScores",
    "AnswerSource",
    "AnswerSpan",
    "AnswerSummary",
    "AnswerTask",
    "AnsweredText",
    "Answers",
    "BeamConfig",
    "ClassReport",
    "ClassScore",
    "Cloze",
    "ConfusionPicture",
    "Continuation",
    "DecodingConfig",
    "DiffusionBounds",
    "EntityReport",
    "EntityScore",
    "ExampleScores",
    "FewShot",
    "FilledMasks",
    "Filling",
    "FoundAnswers",
    "Generated",
    "GenerationConfig",
    "Infilling",
    "InfillingOrder",
    "MultiLabelScores",
    "NGram",
    "Normalisation",
    "PairedBootstrap",
    "Picture",
    "PromptTemplate",
    "RegressionScores",
    "RetrievalScores",
    "SamplingConfig",
    "ScatterPicture",
    "ScoredText",
    "SeedDifference",
    "SeedSpread",
    "Shot",
    "SimilarityScores",
    "TaskKind",
    "TaskReport",
    "TextFigures",
    "TextStatistics",
    "UnmaskingConfig",
    "Words",
    "WritingConfig",
    "WrittenReference",
    "WrittenScores",
    "answer_f1",
    "answer_queries",
    "answer_questions",
    "answer_scores",
    "apply_null_threshold",
    "average_precisions",
    "beam_search",
    "best_null_threshold",
    "bits_per_byte",
    "check_reads_rows",
    "check_scores",
    "choose_shots",
    "cloze_hits",
    "compare_decodings",
    "confusion_matrix",
    "continuation_log_probs",
    "continuations",
    "continue_text",
    "cosine_scores",
    "diffusion_bounds",
    "distinct_share",
    "draw_confusion",
    "exact_match",
    "fill_masks",
    "fill_spans",
    "fill_text",
    "find_answers",
    "generate",
    "infill_text",
    "infilling_tokens",
    "masked_tokens",
    "min_p_filter",
    "normalise_answer",
    "normalise_chinese_answer",
    "output_logits",
    "paired_bootstrap",
    "passages",
    "read_picture",
    "relevant_ranks",
    "repeated_share",
    "repetition_penalty",
    "same_start",
    "sample",
    "save_picture",
    "score_answers",
    "score_classes",
    "score_entities",
    "score_labels",
    "score_numbers",
    "score_retrieval",
    "score_similarity",
    "score_written",
    "scored_text",
    "seed_difference",
    "seed_spread",
    "self_bleu",
    "sentinel_tokens",
    "summarise_answers",
    "task_metrics",
    "task_report",
    "text_figures",
    "text_statistics",
    "top_k_filter",
    "top_p_filter",
    "uniformity",
    "unigram_top_k",
    "unmask",
    "word_overlap",
    "write_targets",
]
