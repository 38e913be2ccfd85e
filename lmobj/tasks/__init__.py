"""Tasks: files of examples as small records, and examples as what a model reads and is to answer."""

from __future__ import annotations

from lmobj.tasks._choices import MultipleChoice, read_multiple_choice
from lmobj.tasks._qa_windows import QAWindows, qa_windows, token_offsets, window_labels
from lmobj.tasks._relations import MarkedText, Relation, mark_entities, read_relations
from lmobj.tasks._squad import GoldAnswer, Question, read_squad
from lmobj.tasks._tag_alignment import TaggedSubwords, align_tags, encode_words, tag_ids, word_tags
from lmobj.tasks._tag_schemes import Entity, TagScheme, check_tags, decode_tags, encode_tags
from lmobj.tasks._tagged import TaggedSentence, read_conll, read_tagged_lines

__all__ = [
    "Entity",
    "GoldAnswer",
    "MarkedText",
    "MultipleChoice",
    "QAWindows",
    "Question",
    "Relation",
    "TagScheme",
    "TaggedSentence",
    "TaggedSubwords",
    "align_tags",
    "check_tags",
    "decode_tags",
    "encode_tags",
    "encode_words",
    "mark_entities",
    "qa_windows",
    "read_conll",
    "read_multiple_choice",
    "read_relations",
    "read_squad",
    "read_tagged_lines",
    "tag_ids",
    "token_offsets",
    "window_labels",
    "word_tags",
]
