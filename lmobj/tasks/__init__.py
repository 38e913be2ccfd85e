"""Tasks: files of examples as small records, and examples as what a model reads and is to answer."""

from __future__ import annotations

from lmobj.tasks._choice_examples import ChoiceExamples, ChoiceReference
from lmobj.tasks._choices import MultipleChoice, read_multiple_choice
from lmobj.tasks._example_dataset import ExampleDataset, ExampleRows, Kind
from lmobj.tasks._prepare import AnyDataset, prepare_any
from lmobj.tasks._qa_windows import QAWindows, qa_windows, token_offsets, window_labels
from lmobj.tasks._question_examples import AskedQuestion, QuestionExamples, QuestionReference
from lmobj.tasks._relation_examples import RelationExamples, RelationReference
from lmobj.tasks._relations import MarkedText, Relation, mark_entities, read_relations
from lmobj.tasks._retrieval_examples import MatchedTexts, RetrievalExamples, RetrievalReference
from lmobj.tasks._squad import GoldAnswer, Question, read_squad
from lmobj.tasks._tag_alignment import align_tags, encode_words, tag_ids, word_tags
from lmobj.tasks._tag_schemes import Entity, check_tags, decode_tags, encode_tags, scheme_tags
from lmobj.tasks._tagged import TaggedSentence, read_conll, read_tagged_lines
from lmobj.tasks._tagged_examples import TaggedExamples, TagReference

__all__ = [
    "AnyDataset",
    "AskedQuestion",
    "ChoiceExamples",
    "ChoiceReference",
    "Entity",
    "ExampleDataset",
    "ExampleRows",
    "GoldAnswer",
    "Kind",
    "MarkedText",
    "MatchedTexts",
    "MultipleChoice",
    "QAWindows",
    "Question",
    "QuestionExamples",
    "QuestionReference",
    "Relation",
    "RelationExamples",
    "RelationReference",
    "RetrievalExamples",
    "RetrievalReference",
    "TagReference",
    "TaggedExamples",
    "TaggedSentence",
    "align_tags",
    "check_tags",
    "decode_tags",
    "encode_tags",
    "encode_words",
    "mark_entities",
    "prepare_any",
    "qa_windows",
    "read_conll",
    "read_multiple_choice",
    "read_relations",
    "read_squad",
    "read_tagged_lines",
    "scheme_tags",
    "tag_ids",
    "token_offsets",
    "window_labels",
    "word_tags",
]
