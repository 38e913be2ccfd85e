"""Words for counting, comparing and stopping: runs of letters, marks and digits, with apostrophes inside them.

An ideograph is a word, and so is a character of the other scripts that put no spaces between words (kana, Thai, Lao,
Khmer, Burmese). This is not the notion of words that masking uses, which has punctuation marks as words too.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from functools import cache, lru_cache

from lmobj.data._cleaning_config import StopWords
from lmobj.data._extras import clean_extra
from lmobj.data._segmentation import IDEOGRAPHS, chinese_words
from lmobj.errors import UserError

__all__ = ["find_words", "has_chinese", "remove_stop_words", "stop_set"]

_UNSPACED = "\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Kana, Thai and Lao, Burmese, Khmer."""
_IDEOGRAPH = re.compile(f"[{IDEOGRAPHS}]")
_NO_WORDS_FOUND = ("ja", "th", "lo", "km", "my")


@cache
def _patterns() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """The pattern of one word; and of one word or stretch of ideographs, with the blanks after it."""
    marks = "".join(chr(code) for code in range(sys.maxunicode) if unicodedata.category(chr(code)).startswith("M"))
    letter = rf"[^\W{IDEOGRAPHS}{_UNSPACED}]"
    word = rf"{letter}+(?:(?:[{marks}]+|['\u2019](?={letter})){letter}*)*"
    one = re.compile(rf"[{IDEOGRAPHS}{_UNSPACED}]|{word}")
    return one, re.compile(rf"([{IDEOGRAPHS}]+|{word})([^\S\n]*)")


def find_words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _patterns()[0].findall(text)


@lru_cache(maxsize=4)
def stop_set(config: StopWords) -> frozenset[str]:
    """The words to remove, case-folded. What is no single word in the packaged lists (phrases, marks) is left out.

    Raises UserError for a language without a list, or one whose words nothing here can find.
    """
    words = set()
    for word in config.words:
        if find_words(word) != [word] and _IDEOGRAPH.sub("", word):
            raise UserError(
                f"data.clean.stop_words.words has {word!r}, which is not one word; accepted: letters and digits, with "
                "apostrophes between them, or ideographs alone."
            )
        words.add(_folded(word))
    if config.languages:
        lists = clean_extra("stopwordsiso", "data.clean.stop_words.languages is set")
        known = sorted(set(lists.langs()) - set(_NO_WORDS_FOUND))
        for language in config.languages:
            if language not in known:
                raise UserError(
                    f"data.clean.stop_words.languages has {language!r}; accepted: {', '.join(known)} (stopwordsiso's "
                    "lists, but for languages whose words are not set apart by spaces)."
                )
            words |= {_folded(word) for word in lists.stopwords(language)}
    return frozenset(words)


@lru_cache(maxsize=4)
def has_chinese(words: frozenset[str]) -> bool:
    """Whether there are words of ideographs among them, which only jieba finds."""
    return any(_IDEOGRAPH.match(word) for word in words)


def remove_stop_words(text: str, config: StopWords) -> str:
    """The text without the stop words and the spaces after each. Stretches of ideographs are divided by jieba."""
    stop = stop_set(config)
    chinese = has_chinese(stop)

    def kept(found: re.Match[str]) -> str:
        word, blanks = found.groups()
        if _folded(word) in stop:
            return ""
        if chinese and _IDEOGRAPH.match(word):
            return "".join(part for part in chinese_words(word) if part not in stop) + blanks
        return found[0]

    return _patterns()[1].sub(kept, text)


def _folded(word: str) -> str:
    return word.casefold().replace("\u2019", "'")
