"""Settings of augmentation: training documents said once more in other words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lmobj.errors import UserError

__all__ = ["Augmentation", "Synonyms"]

_MOST_COPIES = 100


@dataclass(frozen=True)
class Synonyms:
    """Copies of every training document in which words are replaced by synonyms (Zhang, Zhao and LeCun 2015,
    "Character-level Convolutional Networks for Text Classification", section 2.4; Wei and Zou 2019, "EDA").

    Words are runs of letters and digits, so that this does nothing to text without spaces between words. A copy is
    decided by its document, its number and the seed.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    file: str = ""
    """The table, a path or URL: lines of a word and its synonyms, apart by tabs, or in a file that ends in .json one
    object {word: [synonyms]}. Capitals do not matter; those of the text are kept."""
    rate: float = 0.1
    """Probability that a word of the table is replaced by one of its synonyms, all alike, in (0, 1]."""
    copies: int = 1
    """Copies of each training document, 1 to 100."""
    seed: int = 0
    """Another one gives other copies."""

    def __post_init__(self) -> None:
        if not self.file.strip():
            raise UserError(f"data.augment.synonyms.file is {self.file!r}; accepted: the path or URL of a table.")
        if not 0 < self.rate <= 1:
            raise UserError(f"data.augment.synonyms.rate is {self.rate}; accepted: above 0, at most 1.")
        if not 1 <= self.copies <= _MOST_COPIES:
            raise UserError(f"data.augment.synonyms.copies is {self.copies}; accepted: 1 to {_MOST_COPIES}.")


@dataclass(frozen=True)
class Augmentation:
    """Documents added to the training split: what it holds in other words, with the same labels.

    They are made once, when the data is prepared, and are a part of its fingerprint; an epoch is longer by them. What
    is held out by share stays as it is, nothing made from it is trained on, and no copy is kept that would fall into
    such a share itself.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    synonyms: Synonyms | None = None
    """Copies with words replaced by synonyms."""
    paraphrases: str | None = None
    """A table like that of synonyms, of whole texts (after data.clean) and what they may be replaced by: back
    translations (Sennrich et al. 2016), say. Texts of the training split get a copy with each; others are passed
    over."""

    def __post_init__(self) -> None:
        if self.paraphrases is not None and not self.paraphrases.strip():
            raise UserError(f"data.augment.paraphrases is {self.paraphrases!r}; accepted: a path or URL, or null.")
        if self.synonyms is None and self.paraphrases is None:
            raise UserError(
                "data.augment has neither synonyms nor paraphrases; accepted: at least one of the two, or no "
                "data.augment."
            )
