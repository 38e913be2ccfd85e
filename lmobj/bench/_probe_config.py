"""Settings of a frozen-feature probe: the labelled texts, the features, the classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from lmobj.errors import UserError

__all__ = ["JsonLinesProbe", "Probe", "SwappedWordsProbe", "TsvProbe", "WhichDocumentProbe"]

Features = Literal["mean", "first", "last"]


@dataclass(frozen=True, kw_only=True)
class _Probe:
    """What every probe has."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects this probe."""
    features: Features = "mean"
    """What of the last layer's hidden states describes a text: their mean, or that of its first or last token."""
    length: int | None = None
    """Most tokens of a text that are read, special ones included; null: data.length."""
    batch_size: int = 64
    """Texts in a batch when features are computed."""
    regularisation: float = 1.0
    """C of scikit-learn's LogisticRegression, above 0: smaller is stronger."""
    iterations: int = 1000
    """Most iterations of the regression's solver."""

    def __post_init__(self) -> None:
        for key, least in (("length", 4), ("batch_size", 1), ("iterations", 1)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"probe.{key} is {value}; accepted: {least} or more.")
        if not 0 < self.regularisation < float("inf"):
            raise UserError(f"probe.regularisation is {self.regularisation}; accepted: a finite number above 0.")


@dataclass(frozen=True, kw_only=True)
class _Labelled(_Probe):
    """Probes on labelled files."""

    train: tuple[str, ...] = ()
    """Files of labelled texts to fit the classifier on."""
    test: tuple[str, ...] = ()
    """Files to score it on; empty: a share of the others is set apart."""
    test_share: float = 0.2
    """Share that is set apart where `test` is empty, in (0, 1)."""
    seed: int = 0
    """Of the choice of that share."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise UserError("probe.train is empty; accepted: one or more paths of files.")
        if not 0 < self.test_share < 1:
            raise UserError(f"probe.test_share is {self.test_share}; accepted: above 0 and below 1.")


@dataclass(frozen=True, kw_only=True)
class TsvProbe(_Labelled):
    """Texts and labels in lines of columns between tabs. Quotes are characters like any other, as in GLUE's files."""

    name: Literal["tsv"] = "tsv"
    """Labelled texts in tab-separated files."""
    header: bool = False
    """Whether the first line of each file names the columns."""
    text: int | str = 0
    """Column of the text: its name in the header, or its number from 0."""
    pair: int | str | None = None
    """Column of a second text that is read after the first; null: texts are single."""
    label: int | str = 1
    """Column of the label."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("text", "pair", "label"):
            value = getattr(self, key)
            if isinstance(value, str) and not self.header:
                raise UserError(f'probe.{key} is "{value}" and probe.header is false; accepted: a number from 0.')
            if isinstance(value, int) and value < 0:
                raise UserError(f"probe.{key} is {value}; accepted: the number of a column, from 0.")


@dataclass(frozen=True, kw_only=True)
class JsonLinesProbe(_Labelled):
    """Texts and labels in JSON objects, one per line."""

    name: Literal["jsonl"] = "jsonl"
    """Labelled texts in JSON lines."""
    text: str = "text"
    """Key of the text."""
    pair: str | None = None
    """Key of a second text that is read after the first; null: texts are single."""
    label: str = "label"
    """Key of the label: text, a whole number, true or false."""


@dataclass(frozen=True, kw_only=True)
class SwappedWordsProbe(_Probe):
    """Tell sentences whose neighbouring words were swapped from whole ones (Conneau et al. 2018, "What you can cram
    into a single $&!#* vector", bigram shift).

    The sentences are the run's own held-out text: those of the validation split fit the classifier, those of the test
    split score it. A bag of words says nothing about order, so what is above one half was learnt from context.
    """

    name: Literal["swapped_words"] = "swapped_words"
    """Held-out sentences, half of them with neighbouring words swapped."""
    swaps: int = 1
    """Pairs of neighbours that are swapped in a sentence of the second class, at least 1; no word moves twice."""
    words: tuple[int, int] = (6, 30)
    """Fewest and most words in a sentence that is used."""
    seed: int = 0
    """Of the choice of sentences and words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.swaps < 1:
            raise UserError(f"probe.swaps is {self.swaps}; accepted: 1 or more.")
        if not 2 * self.swaps <= self.words[0] <= self.words[1]:
            raise UserError(
                f"probe.words is {list(self.words)}; accepted: fewest and most words, at least 2 * probe.swaps = "
                f"{2 * self.swaps} and in this order."
            )


@dataclass(frozen=True, kw_only=True)
class WhichDocumentProbe(_Probe):
    """Tell which of some held-out documents a sentence comes from.

    The documents are those of the run's validation and test splits with the most sentences, each a class; half of its
    sentences fit the classifier, the other half score it. Whole words give much away, so that even an untrained model
    does far better than chance: what training added is the difference to it.
    """

    name: Literal["which_document"] = "which_document"
    """Sentences of the longest held-out documents, each document a class."""
    documents: int = 20
    """Documents, at least 2."""
    sentences: int = 100
    """Most sentences that are taken of each, at least 2."""
    words: tuple[int, int] = (5, 40)
    """Fewest and most words in a sentence that is used."""
    seed: int = 0
    """Of the choice of sentences."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("documents", "sentences"):
            if getattr(self, key) < 2:
                raise UserError(f"probe.{key} is {getattr(self, key)}; accepted: 2 or more.")
        if not 1 <= self.words[0] <= self.words[1]:
            raise UserError(f"probe.words is {list(self.words)}; accepted: fewest and most words, in this order.")


Probe = TsvProbe | JsonLinesProbe | WhichDocumentProbe | SwappedWordsProbe
