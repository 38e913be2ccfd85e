"""Multiple choice: which of K choices goes with a context (the next sentence, the answer to a question).

    L = - sum_b v_b log p_b,y_b / sum_b v_b        p_bk = exp(x_bk) / sum_j exp(x_bj)

with x_bk = the head's number for [CLS] context [SEP] choice k [SEP], each read by itself, j over the choices that the
example has, and v_b = 1 for every row that has text. Devlin et al. 2019, section 4.4, on SWAG.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from lmobj import losses
from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, PairHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms
from lmobj.objectives._row_task import RowTask

__all__ = ["MultipleChoice"]


@dataclass(frozen=True)
class MultipleChoice(RowTask):
    """The right one of several choices after a context (`data.source: {name: choices}`).

    All choices of an example are segments of one row of `data.length` tokens, which do not see one another; a model
    with 512 learned positions reads rows of 512 at most. Metrics: `nll` (nats per example) and `accuracy`.
    """

    task: ClassVar[Literal["multiple_choice"]] = "multiple_choice"
    judged_by: ClassVar[Judge] = "accuracy"
    FIELD: ClassVar[str] = "labels"
    summary: ClassVar[str] = "Choose what goes with a text: its continuation, the answer to a question."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT, section 4.4"

    name: Literal["multiple_choice"] = "multiple_choice"
    """Choose what goes with a text: its continuation, the answer to a question."""
    choices: int = 4
    """Most choices of an example, at least 2."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.choices < 2:
            raise UserError(f"objective.choices is {self.choices}; it must be at least 2.")

    @property
    def parts(self) -> int:
        """A choice with its context is a segment."""
        return self.choices

    def check_classes(self, classes_of: Callable[[str | None], Sequence[str]]) -> None:
        """Refuses data with examples that have more choices."""
        found = len(classes_of(None))
        if found > self.choices:
            raise UserError(
                f"objective.choices is {self.choices}, but the data has examples with {found} choices; accepted: "
                f"{found} or more."
            )

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] context [SEP] choice [SEP] of each choice; refuses a vocabulary without these tokens."""
        return dataclasses.replace(super().rows(vocab, length), layout="choices", classes=self.choices)

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """BERT's pooler and a number."""
        return PairHead(style, 1, rngs)

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the sum over rows."""
        logits, labels, weights = self.outputs(models, example, ctx), example.targets[:, 0], example.weights[:, 0]
        segments = example.mask.segment_ids
        assert segments is not None
        there = jnp.any(self.inside(segments), axis=2) | (weights == 0)[:, None]  # of an empty row too a loss is finite
        stats = losses.logit_stats(logits, labels, vocab_mask=there)
        nll, total = jnp.sum(losses.nll(stats) * weights), jnp.sum(weights)
        metrics = {"nll": (nll, total), "accuracy": (jnp.sum(stats.correct * weights), total)}
        return Terms({"nll": nll}, metrics, carried, {"logits": jnp.where(there, logits, -jnp.inf)})
