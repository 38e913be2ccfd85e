"""Tasks: files of examples as small records, and examples as what a model reads and is to answer."""

from __future__ import annotations

from lmobj.tasks._qa_windows import QAWindows, qa_windows, token_offsets, window_labels
from lmobj.tasks._tag_alignment import TaggedSubwords, align_tags, encode_words, tag_ids, word_tags
from lmobj.tasks._tag_schemes import Entity, TagScheme, check_tags, decode_tags, encode_tags

__all__ = [
    "Entity",
    "QAWindows",
    "TagScheme",
    "TaggedSubwords",
    "align_tags",
    "check_tags",
    "decode_tags",
    "encode_tags",
    "encode_words",
    "qa_windows",
    "tag_ids",
    "token_offsets",
    "window_labels",
    "word_tags",
]
