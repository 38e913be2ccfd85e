"""What the tasks share that read something off the state of every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from flax import nnx
from jaxtyping import Array, Float, Int

from lmobj import masks, noise
from lmobj.batch import Batch
from lmobj.errors import UserError
from lmobj.models import RowUse
from lmobj.objectives._objective import Context, Example, Models, Role
from lmobj.objectives._token_dropout import DropsTokens
from lmobj.objectives._tokens import hidden_states

__all__ = ["TokenTask"]

_STATES_SITE = 201
"""Tells the dropout of the states from those inside the model."""


@dataclass(frozen=True)
class TokenTask(DropsTokens):
    """Base of the tasks whose head is a linear map of tokens' states, after dropout."""

    roles: ClassVar[Mapping[str, Role]] = {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects the objective."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether tokens see the whole row, or what is before them, as a decoder was trained to."""
    token_types: bool = True
    """Whether a second text is told by its token types too; not for models that were trained without (RoBERTa), and
    never for decoders."""
    dropout: float = 0.1
    """Share of the states that is dropped in training, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attention not in ("bidirectional", "causal"):
            raise UserError(f"objective.attention is {self.attention!r}; accepted: bidirectional, causal.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"objective.dropout is {self.dropout}; it must be in [0, 1).")

    @property
    def causal(self) -> bool:
        """As `attention` says."""
        return self.attention == "causal"

    def use(self, length: int) -> RowUse:
        """No vocabulary head."""
        return RowUse(length, 0, self.causal)

    def example(self, batch: Batch, targets: Int[Array, "B N"], weights: Float[Array, "B N"]) -> Example:
        """The rows given, with what is to be told of them."""
        mask = masks.causal() if self.causal else masks.bidirectional()
        types = batch.get("token_types") if self.token_types and not self.causal else None
        return Example(
            inputs=batch["tokens"],
            targets=targets,
            weights=weights,
            mask=mask.packed(batch["segment_ids"]),
            positions=batch["positions"],
            token_types=types,
        )

    def states(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B L D"]:
        """The state of each token, after dropout."""
        hidden = hidden_states(models["model"], example, ctx)
        if ctx.dropout is not None:
            hidden = noise.dropout(hidden, self.dropout, ctx.dropout, layer=0, site=_STATES_SITE)
        return hidden

    def logits(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B L C"]:
        """What the head says of each token."""
        head: nnx.Module = models["heads"]
        return head(self.states(models, example, ctx))
