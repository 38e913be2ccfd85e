"""Fill in the middle of whole documents: the parts of a text, cut between characters, with its middle at the end.

    PSM     PRE prefix SUF suffix MID middle
    SPM     PRE SUF suffix MID prefix middle

Both cuts are uniform over 0 .. n for n characters, so any part may be empty; each part is tokenised by itself.

Source: Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", section 3 (document-level
FIM); SPM is its variant 2, as in `permute` of SantaCoder's Megatron-LM. Deviation: a document is cut in the same way in
every epoch, since texts are tokenised once. As in the paper, a row may begin or end within a document, and then has
only some of its parts; the objective fill_in_middle cuts what a row has, but between tokens.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from lmobj._pieces import INFILLING_MARKS
from lmobj.errors import UserError

if TYPE_CHECKING:
    from lmobj.data._tokenizer import Tokenizer

__all__ = ["DocumentFillInMiddle", "Rearrangement", "open_rearrangement"]

_VERSION = 1
"""Raised when the same settings and texts would be cut otherwise."""


@dataclass(frozen=True)
class DocumentFillInMiddle:
    """Training documents whose middle is moved to their end, for a causal language model that learns to fill it in.

    They are cut once, when the data is prepared, each as its text and the seed decide. What is held out stays as it is,
    so that its figures compare with those of runs without this.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    fim_rate: float = 0.5
    """Probability that a document's middle is moved, in [0, 1]."""
    spm_rate: float = 0.5
    """Probability that a document whose middle is moved has the order SPM, not PSM, in [0, 1]."""
    seed: int = 0
    """Another one cuts otherwise."""

    def __post_init__(self) -> None:
        for key in ("fim_rate", "spm_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"data.fill_in_middle.{key} is {getattr(self, key)}; accepted: a probability.")


@dataclass(frozen=True)
class Rearrangement:
    """The order in which the parts of a document are written. Can be pickled."""

    settings: DocumentFillInMiddle
    marks: tuple[int, int, int]
    """Ids of PRE, SUF and MID."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides it, in JSON, but for the ids."""
        return {"version": _VERSION, **dataclasses.asdict(self.settings)}

    def __call__(self, text: str) -> tuple[str | int, ...]:
        """Texts to tokenise one by one and ids of marks, in the order in which they are written; the text alone where
        it stays as it is."""
        address = json.dumps([self.settings.seed, text]).encode()
        key = int.from_bytes(hashlib.blake2b(address, digest_size=16).digest(), "little")
        moved, spm, *cuts = np.random.Philox(key=key).random_raw(4).tolist()
        if moved >= self.settings.fim_rate * 2**64:
            return (text,)
        low, high = sorted(cut * (len(text) + 1) >> 64 for cut in cuts)
        prefix, middle, suffix = text[:low], text[low:high], text[high:]
        before, behind, between = self.marks
        if spm < self.settings.spm_rate * 2**64:
            return before, behind, suffix, between, prefix, middle
        return before, prefix, behind, suffix, between, middle


def open_rearrangement(settings: DocumentFillInMiddle, tokenizer: Tokenizer) -> Rearrangement:
    """Raises UserError if the tokenizer has no marks, or would not give back a text that was cut."""
    marks = tokenizer.vocabulary.require("data.fill_in_middle", *INFILLING_MARKS)
    if not tokenizer.lossless:
        raise UserError(
            "data.fill_in_middle cuts texts between characters, and the model of data.tokenizer.path normalises text, "
            "so that parts would not be what they were in the whole; accepted: a model without normalisation (as "
            "trained here), or in its place objective.name=fill_in_middle, which cuts between tokens."
        )
    before, behind, between = marks
    return Rearrangement(settings, (before, behind, between))
