"""Cleaning of documents, step by step, with nothing changed or dropped uncounted.

A document is a text, or a text and its pair, which are cleaned alike and judged together. It is dropped by the step
that leaves nothing but blanks of it (or of its pair), or by a filter. Each step's `bytes` are the UTF-8 bytes that it
took away, those of the documents that it dropped included; they are below zero for a step that adds (nfd may). So

    documents in = documents kept + sum of `dropped`        bytes in = bytes kept + sum of `bytes`

Duplicates are found in another pass, over documents that are already clean: `_duplicates.py`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from lmobj.data._cleaning_config import CleaningConfig, LanguageFilter
from lmobj.data._extras import clean_extra
from lmobj.data._html import html_to_text
from lmobj.data._parts import utf8_size
from lmobj.data._words import find_words, has_chinese, remove_stop_words, stop_set
from lmobj.errors import UserError

__all__ = ["Cleaned", "Cleaner", "Counts", "add_counts", "dropped"]

Counts = dict[str, dict[str, int]]
"""Per step: `changed` and `dropped` documents, and `bytes` removed. Steps that did nothing may be absent."""
_JUDGED = 4096
"""Characters from which the language is told: py3langid walks over every byte in Python."""
_LINE_ENDS = re.compile("\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1b\x1f\x7f-\x84\x86-\x9f\xad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]"
)
"""Cc but for tab and line ends; soft hyphen, zero-width space and no-break space, word joiner, directional marks."""
_BLANK_RUNS = re.compile(r"(?:[^\S\n ]| [^\S\n])[^\S\n]*")
_BLANK_LINES = re.compile(r"\n{3,}")


class Cleaned(NamedTuple):
    """What is left of a document."""

    text: str | None
    """None if the document is dropped."""
    pair: str | None
    """The second text, where the document had one and is kept."""
    counts: Counts
    """What each step did to it; steps that did nothing are absent."""


@dataclass(frozen=True)
class Cleaner:
    """Applies the steps of a config, but for duplicates, in the order of `CleaningConfig.steps`. Can be pickled."""

    config: CleaningConfig

    def check(self) -> None:
        """Raises UserError for a package that is missing, or a language that it does not know."""
        config = self.config
        if config.html:
            clean_extra("selectolax.lexbor", "data.clean.html is true")
        if config.language is not None:
            _check_languages(config.language)
        if config.stop_words is not None and has_chinese(stop_set(config.stop_words)):
            clean_extra("rjieba", "data.clean.stop_words has Chinese words")
        if config.near_duplicates is not None:
            clean_extra("datasketch", "data.clean.near_duplicates is set")

    def __call__(self, text: str, pair: str | None = None) -> Cleaned:
        """The cleaned document, or None in its place, with the counts."""
        texts: tuple[str, ...] = (text,) if pair is None else (text, pair)
        counts: Counts = {}
        for step in self.config.steps:
            if step in _CHANGES:
                new = tuple(_CHANGES[step](self.config, part) for part in texts)
                stays = all(part.strip() for part in new)
            elif step in _FILTERS:
                new, stays = texts, _FILTERS[step](self.config, "\n".join(texts))
            else:
                continue
            if not stays:
                counts[step] = dropped(*texts)
                return Cleaned(None, None, counts)
            if new != texts:
                removed = sum(map(utf8_size, texts)) - sum(map(utf8_size, new))
                counts[step] = {"changed": 1, "dropped": 0, "bytes": removed}
                texts = new
        return Cleaned(texts[0], texts[1] if len(texts) == 2 else None, counts)


def dropped(text: str, pair: str | None = None) -> dict[str, int]:
    """What a step counts for a document that it drops."""
    return {"changed": 0, "dropped": 1, "bytes": utf8_size(text) + utf8_size(pair or "")}


def add_counts(total: Counts, more: Mapping[str, Mapping[str, int]]) -> None:
    """Adds counts to `total`, step by step."""
    for step, counts in more.items():
        own = total.setdefault(step, dict.fromkeys(counts, 0))
        for name, count in counts.items():
            own[name] += count


def _html(config: CleaningConfig, text: str) -> str:
    return html_to_text(text)


def _control(config: CleaningConfig, text: str) -> str:
    return _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))


def _unicode(config: CleaningConfig, text: str) -> str:
    forms: dict[str, Literal["NFC", "NFKC", "NFD", "NFKD"]]
    forms = {"nfc": "NFC", "nfkc": "NFKC", "nfd": "NFD", "nfkd": "NFKD"}
    assert config.unicode is not None
    return unicodedata.normalize(forms[config.unicode], text)


def _whitespace(config: CleaningConfig, text: str) -> str:
    text = _BLANK_RUNS.sub(" ", text).replace(" \n", "\n")
    return _BLANK_LINES.sub("\n\n", text).strip()


def _lowercase(config: CleaningConfig, text: str) -> str:
    return text.lower()


def _stop_words(config: CleaningConfig, text: str) -> str:
    assert config.stop_words is not None
    return remove_stop_words(text, config.stop_words)


def _in_language(config: CleaningConfig, text: str) -> bool:
    assert config.language is not None
    language, probability = _identifier().classify(text[:_JUDGED])
    return language in config.language.accepted and probability >= config.language.probability


def _has_length(config: CleaningConfig, text: str) -> bool:
    most = len(text) if config.max_characters is None else config.max_characters
    if not config.min_characters <= len(text) <= most:
        return False
    return config.min_words == 0 or len(find_words(text)) >= config.min_words


_CHANGES: dict[str, Callable[[CleaningConfig, str], str]] = {
    "html": _html,
    "control": _control,
    "unicode": _unicode,
    "whitespace": _whitespace,
    "lowercase": _lowercase,
    "stop_words": _stop_words,
}
_FILTERS: dict[str, Callable[[CleaningConfig, str], bool]] = {"language": _in_language, "length": _has_length}


@cache
def _identifier() -> Any:
    """py3langid's model, loaded once per process (half a second)."""
    langid = clean_extra("py3langid.langid", "data.clean.language is set")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def _check_languages(config: LanguageFilter) -> None:
    known = _identifier().labels
    for language in config.accepted:
        if language not in known:
            raise UserError(
                f"data.clean.language.accepted has {language!r}; accepted: the languages that py3langid knows, "
                f"{', '.join(sorted(known))}."
            )
