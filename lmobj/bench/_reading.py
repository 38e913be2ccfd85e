"""How a model reads a probe's texts: in rows like those of its training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lmobj.batch import RowSpec
from lmobj.data import Tokenizer
from lmobj.train.assemble import Assembly
from lmobj.train.batches import batch_shapes

__all__ = ["Reading"]


@dataclass(frozen=True)
class Reading:
    """How a model reads texts: as it read documents in training."""

    tokenizer: Tokenizer
    rows: RowSpec
    """Which special tokens stand around a text, and by default the most tokens."""
    causal: bool
    """Whether tokens see earlier ones alone (`Objective.causal`)."""

    @classmethod
    def of(cls, run: Assembly) -> Reading:
        """That of a run's model, which may take shorter rows than are read to make its inputs of (T5)."""
        rows = dataclasses.replace(run.spec, length=min(run.spec.length, run.config.data.length))
        return cls(run.dataset.tokenizer, rows, run.objective.causal)

    @property
    def typed(self) -> bool:
        """Whether the model was given token types. Objectives that are causal give none, whatever their rows."""
        return not self.causal and "token_types" in batch_shapes(self.rows, 1)
