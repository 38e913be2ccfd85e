"""What the tasks share whose answer is about a whole row: the rows, how they are read, and the state that decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj import masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import RowUse
from lmobj.objectives._objective import Context, Example, Models, Role
from lmobj.objectives._row_classes import row_weights
from lmobj.objectives._token_dropout import DropsTokens
from lmobj.objectives._tokens import hidden_states

__all__ = ["RowTask"]

_POOLED_SITE = 200
"""Tells the dropout of the pooled state from those inside the model."""


@dataclass(frozen=True)
class RowTask(DropsTokens):
    """Base of the tasks on rows [CLS] A [SEP], or [CLS] A [SEP] B [SEP] where the data has a second text.

    The state of one token, or the mean of all, goes through dense and tanh, dropout, and a last dense layer (Devlin et
    al. 2019, section 4.1 and figure 4; ELECTRA's code has gelu and XLNet's another dropout). BERT and its kind decide
    from the first token, a causal model from the last, as GPT does (Radford et al. 2018, section 3.2).
    """

    FIELD: ClassVar[str]
    """What the rows are labelled with, of `lmobj.batch.LABEL_FIELDS`."""

    roles: ClassVar[Mapping[str, Role]] = {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects the objective."""
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """Whether tokens see the whole row, or what is before them, as a decoder was trained to."""
    pooling: Literal["first", "last", "mean"] = "first"
    """The state that the answer is read from: that of the first or the last token, or the mean over the row."""
    token_types: bool = True
    """Whether a second text is told by its token types too; not for models that were trained without (RoBERTa), and
    never for decoders."""
    dropout: float = 0.1
    """Share of the pooled state that is dropped in training, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, accepted in (("attention", ("bidirectional", "causal")), ("pooling", ("first", "last", "mean"))):
            if getattr(self, key) not in accepted:
                raise UserError(f"objective.{key} is {getattr(self, key)!r}; accepted: {', '.join(accepted)}.")
        if not 0 <= self.dropout < 1:
            raise UserError(f"objective.dropout is {self.dropout}; it must be in [0, 1).")
        if self.attention == "causal" and self.pooling == "first":
            raise UserError(
                "objective.pooling is 'first' and objective.attention is 'causal', where the first token sees nothing "
                "of the text; accepted: last, mean."
            )

    @property
    def parts(self) -> int:
        """N texts of a row that are judged, each a segment of its own: 1, and then it is the whole row."""
        return 1

    @property
    def causal(self) -> bool:
        """As `attention` says."""
        return self.attention == "causal"

    def use(self, length: int) -> RowUse:
        """No vocabulary head."""
        return RowUse(length, 0, self.causal)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] A [SEP] and perhaps B [SEP], labelled; refuses a vocabulary without these tokens."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        self.check_dropout(vocab)
        return RowSpec("examples", length, (cls,), (sep,), (self.FIELD,))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are, or with tokens dropped; one place of each of its parts says something of the label."""
        batch = self.dropped(keys, batch, ctx)
        labels, segments = batch[self.FIELD], batch["segment_ids"]
        inside = self.inside(segments)
        places = jnp.argmax(inside, axis=2)
        if self.pooling == "last":
            places += jnp.maximum(jnp.sum(inside, axis=2) - 1, 0)
        return Example(
            inputs=batch["tokens"],
            targets=labels.reshape(len(labels), -1),
            weights=row_weights(batch)[:, None],
            mask=(masks.causal() if self.causal else masks.bidirectional()).packed(segments),
            positions=batch["positions"],
            token_types=batch["token_types"] if self.token_types and not self.causal else None,
            predict=places,
        )

    def outputs(self, models: Models, example: Example, ctx: Context) -> Float[Array, "B NC"]:
        """What the head says of each part of a row: logits of classes, or a number."""
        hidden, head = hidden_states(models["model"], example, ctx), models["heads"]
        if self.pooling == "mean":
            assert example.mask.segment_ids is not None
            precise = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
            inside = self.inside(example.mask.segment_ids).astype(precise.dtype)
            mean = inside @ precise / jnp.maximum(jnp.sum(inside, axis=2, keepdims=True), 1)
            states = mean.astype(hidden.dtype)
        else:
            states = example.at_predictions(hidden)
        rows = len(states)
        pooled = head.pooled(states.reshape(rows * self.parts, 1, -1)).reshape(rows, -1)
        if ctx.dropout is not None:
            pooled = noise.dropout(pooled, self.dropout, ctx.dropout, layer=0, site=_POOLED_SITE)
        return head.classifier(pooled.reshape(rows * self.parts, -1)).reshape(rows, -1)

    def inside(self, segments: Int[Array, "B L"]) -> Bool[Array, "B N L"]:
        """Which tokens are in each part."""
        if self.parts == 1:
            return (segments > 0)[:, None]
        return segments[:, None] == jnp.arange(1, self.parts + 1)[:, None]
