"""Settings of what happens to text before it is tokenised, and of the sentences and words that are marked in it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from lmobj.data._source_config import check_choice
from lmobj.errors import UserError

__all__ = ["CleaningConfig", "LanguageFilter", "NearDuplicates", "SegmentationConfig", "StopWords"]


@dataclass(frozen=True)
class StopWords:
    """Words that are removed wherever they stand as whole words, in any case."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    languages: tuple[str, ...] = ()
    """ISO 639-1 codes whose lists (of the package stopwordsiso) are removed. Chinese words are found by jieba; other
    languages written without spaces are refused."""
    words: tuple[str, ...] = ()
    """Words of your own, removed as well."""

    def __post_init__(self) -> None:
        _check_codes("data.clean.stop_words.languages", self.languages)
        for word in self.words:
            if not word or word.split() != [word]:
                raise UserError(
                    f"data.clean.stop_words.words has {word!r}; accepted: single words, without spaces in them."
                )
        if not self.languages and not self.words:
            raise UserError(
                "data.clean.stop_words names neither languages nor words; accepted: at least one of the two, or null."
            )


@dataclass(frozen=True)
class LanguageFilter:
    """Keeps documents that py3langid takes to be in one of some languages."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    accepted: tuple[str, ...] = ()
    """ISO 639-1 codes of the languages that stay; at least one."""
    probability: float = 0.5
    """Least probability that the document's likeliest language, which must be one of these, has; in [0, 1]."""

    def __post_init__(self) -> None:
        if not self.accepted:
            raise UserError(
                "data.clean.language.accepted is empty; accepted: one or more ISO 639-1 codes, as en or zh."
            )
        _check_codes("data.clean.language.accepted", self.accepted)
        if not 0 <= self.probability <= 1:
            raise UserError(f"data.clean.language.probability is {self.probability}; accepted: a number in [0, 1].")


@dataclass(frozen=True)
class NearDuplicates:
    """Drops a document that shares most of its runs of words with an earlier one (MinHash)."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    threshold: float = 0.8
    """Jaccard similarity of the sets of word runs, as MinHash estimates it, from which documents are duplicates; in
    [0.1, 1)."""
    permutations: int = 128
    """Values of a MinHash signature, 16 to 1024. The estimate's standard error is at most 0.5 / sqrt(permutations)."""
    shingle: int = 5
    """Words in a run; at least 1. An ideograph counts as a word, as do characters of other scripts without spaces."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.threshold < 1:
            raise UserError(
                f"data.clean.near_duplicates.threshold is {self.threshold}; accepted: a similarity in [0.1, 1)."
            )
        if not 16 <= self.permutations <= 1024:
            raise UserError(f"data.clean.near_duplicates.permutations is {self.permutations}; accepted: 16 to 1024.")
        if self.shingle < 1:
            raise UserError(f"data.clean.near_duplicates.shingle is {self.shingle}; accepted: 1 or more words.")


@dataclass(frozen=True)
class CleaningConfig:
    """What is done to each document before it is tokenised, in the order of the fields; nothing by default."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    html: bool = False
    """Reduce HTML to its text: paragraphs are set off by blank lines, scripts and styles go, entities are decoded."""
    control: bool = False
    """Remove control, zero-width and bidirectional formatting characters and byte order marks. Tab, newline and the
    joiners that scripts and emoji need (U+200C, U+200D) stay; other line ends become newlines."""
    unicode: Literal["nfc", "nfkc", "nfd", "nfkd"] | None = None
    """Unicode normalisation form."""
    whitespace: bool = False
    """Runs of spaces and tabs to one space, no spaces at line ends, at most one blank line, no blanks at the ends."""
    language: LanguageFilter | None = None
    """Drop documents in other languages."""
    lowercase: bool = False
    """Lower-case the text."""
    stop_words: StopWords | None = None
    """Remove stop words."""
    min_characters: int = 0
    """Drop documents with fewer characters."""
    max_characters: int | None = None
    """Drop documents with more characters; absent: no bound."""
    min_words: int = 0
    """Drop documents with fewer words; an ideograph counts as a word, as do characters of other scripts without
    spaces."""
    exact_duplicates: bool = False
    """Drop a document that is, once cleaned, the same as an earlier one."""
    near_duplicates: NearDuplicates | None = None
    """Drop a document that is nearly the same as an earlier one."""

    def __post_init__(self) -> None:
        check_choice("data.clean.unicode", self.unicode, ("nfc", "nfkc", "nfd", "nfkd", None))
        for name, least in (("min_characters", self.min_characters), ("min_words", self.min_words)):
            if least < 0:
                raise UserError(f"data.clean.{name} is {least}; accepted: 0 or more.")
        if self.max_characters is not None and self.max_characters < max(self.min_characters, 1):
            raise UserError(
                f"data.clean.max_characters is {self.max_characters}; accepted: {max(self.min_characters, 1)} or more, "
                "or absent."
            )

    @property
    def steps(self) -> tuple[str, ...]:
        """Names of the steps that are switched on, in the order in which they are applied."""
        asked = {
            "html": self.html,
            "control": self.control,
            "unicode": self.unicode is not None,
            "whitespace": self.whitespace,
            "language": self.language is not None,
            "lowercase": self.lowercase,
            "stop_words": self.stop_words is not None,
            "length": self.min_characters > 0 or self.max_characters is not None or self.min_words > 0,
            "exact_duplicates": self.exact_duplicates,
            "near_duplicates": self.near_duplicates is not None,
        }
        return tuple(step for step, on in asked.items() if on)

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that carry out these steps, so that their versions decide the text."""
        used = {
            "html": ("selectolax",),
            "language": ("py3langid",),
            "stop_words": ("stopwordsiso", "rjieba"),
            "near_duplicates": ("datasketch",),
        }
        return tuple(package for step in self.steps for package in used.get(step, ()))

    @property
    def one_by_one(self) -> CleaningConfig:
        """What is done to each document whatever the others are."""
        return dataclasses.replace(self, exact_duplicates=False, near_duplicates=None)

    @property
    def finds_duplicates(self) -> bool:
        """Whether documents must be compared with each other, which takes a pass of its own."""
        return self.exact_duplicates or self.near_duplicates is not None


@dataclass(frozen=True)
class SegmentationConfig:
    """How sentences and words are found in the text."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    sentences: Literal["rule", "sentencex"] = "rule"
    """rule: a sentence ends at a newline, after . ! ? before a space, after a full-width mark. sentencex: by that
    package, which knows abbreviations of `language`."""
    words: Literal["basic", "jieba"] = "basic"
    """basic: the words of BERT's basic tokenizer, each ideograph its own word. jieba: the same, but stretches of
    ideographs are divided into Chinese words."""
    language: str = "en"
    """ISO 639-1 code of the language whose sentences sentencex finds."""

    def __post_init__(self) -> None:
        check_choice("data.segment.sentences", self.sentences, ("rule", "sentencex"))
        check_choice("data.segment.words", self.words, ("basic", "jieba"))
        _check_codes("data.segment.language", (self.language,))

    @property
    def packages(self) -> tuple[str, ...]:
        """The packages that find the boundaries, so that their versions decide them."""
        asked = {"sentencex": self.sentences == "sentencex", "rjieba": self.words == "jieba"}
        return tuple(package for package, on in asked.items() if on)


def _check_codes(key: str, codes: tuple[str, ...]) -> None:
    for code in codes:
        if not (len(code) in (2, 3) and code.isascii() and code.isalpha() and code.islower()):
            raise UserError(f"{key} has {code!r}; accepted: ISO 639-1 codes in lower case, as en or zh.")
