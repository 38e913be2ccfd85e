"""What the tasks share that may drop tokens of their rows in training."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
from jaxtyping import Array, Key

from lmobj import noise
from lmobj.batch import Batch, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives._masked_lm import maskable
from lmobj.objectives._objective import Context, Objective

__all__ = ["DropsTokens"]


@dataclass(frozen=True)
class DropsTokens(Objective):
    """Base of the tasks, whose rows have some tokens hidden in training: `noise.drop_tokens`, row by row."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects the objective."""
    token_dropout: float = 0.0
    """Share of the ordinary tokens that training replaces by [MASK], or by the unknown token where there is no [MASK],
    in [0, 1); labels stay as they are."""

    def __post_init__(self) -> None:
        if not 0 <= self.token_dropout < 1:
            raise UserError(f"objective.token_dropout is {self.token_dropout}; it must be in [0, 1).")

    def check_dropout(self, vocab: Vocabulary) -> None:
        """Refuses to drop tokens without one to put in their place."""
        if self.token_dropout and vocab.mask is None and vocab.unk is None:
            raise UserError(
                f"objective.token_dropout is {self.token_dropout}, and the vocabulary has neither [MASK] nor an "
                "unknown token; accepted: 0, or a tokenizer with one of them."
            )

    def dropped(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Batch:
        """The batch, in training with tokens dropped; special tokens and padding never are."""
        if not (ctx.train and self.token_dropout):
            return batch
        hidden = ctx.vocab.unk if ctx.vocab.mask is None else ctx.vocab.mask
        assert hidden is not None
        drop = functools.partial(noise.drop_tokens, rate=self.token_dropout, replacement_id=hidden)
        return batch | {"tokens": jax.vmap(drop)(keys, batch["tokens"], maskable(batch, ctx.vocab))}
