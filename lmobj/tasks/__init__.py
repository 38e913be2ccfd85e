"""Tasks: files of examples as small records, and examples as what a model reads and is to answer."""

from __future__ import annotations

from lmobj.tasks._qa_windows import QAWindows, qa_windows, token_offsets, window_labels

__all__ = [
    "QAWindows",
    "qa_windows",
    "token_offsets",
    "window_labels",
]
