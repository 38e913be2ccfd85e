"""Fill in the middle: next tokens of rows in which the middle of some documents was moved to their end.

    L = - sum_t w_t log p(z_{t+1} | z_1 .. z_t) / sum_t w_t,   z = a document, or with probability `fim_rate`

    PSM     PRE prefix SUF suffix MID middle EOS
    SPM     PRE SUF suffix MID prefix middle EOS

over the whole batch. All of z is predicted, markers too, and EOS says that the middle meets the suffix.

Source: Bavarian et al. 2022, "Efficient Training of Language Models to Fill in the Middle", sections 3 and 3.2: this is
its context-level FIM, which cuts what a row has of each document. Its document-level FIM is `data.fill_in_middle`.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from lmobj import noise
from lmobj._pieces import INFILLING_MARKS
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives._causal_lm import (
    ahead,
    as_one_text,
    bits_per_byte,
    check_token_loss,
    next_token_example,
    next_token_losses,
)
from lmobj.objectives._objective import Context, Example, Judge, Models, Objective, Terms, token_metrics
from lmobj.objectives._tokens import hidden_states

__all__ = ["FillInMiddle"]

_MARKERS = 3
"""Tokens by which a document grows."""


@dataclass(frozen=True)
class FillInMiddle(Objective):
    """Causal LM over packed rows, in which documents are rearranged so that it learns to fill in their middle.

    Rows are read shorter than `data.length` by what the markers of `max_documents` documents take, so that nothing is
    cut off. Where more documents of a row are drawn, the last of them stay as they are; where fewer are, the row ends
    in padding.

    Metrics: `nll` and `accuracy` of all predicted tokens, markers too; `middle_nll` and `middle_accuracy` of those of
    middles and the EOS after them; `bits_per_byte` of the documents that stayed as they are, which compares with that
    of causal_lm, as no marker stands in them and no cut has to be guessed; and `moved`, the share of the predicted
    tokens that are in the others. Documents that were in the row without their end have no EOS.

    Deviations from the paper: the cuts are between tokens, and it cuts rows that became too long, which may lose a
    middle.
    """

    summary: ClassVar[str] = "Predict each token, in documents whose middle may come last (FIM)."
    paper: ClassVar[str] = "Bavarian et al. 2022, Efficient Training of Language Models to Fill in the Middle"
    causal: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["fill_in_middle"] = "fill_in_middle"
    """Predict each token, in documents whose middle may come last."""
    fim_rate: float = 0.5
    """Probability that a document's middle is moved, in [0, 1]. The paper finds that reading from the left does not
    suffer up to 0.9."""
    spm_rate: float = 0.5
    """Probability that a document whose middle is moved has the order SPM, not PSM, in [0, 1]."""
    max_documents: int = 4
    """The most documents of a row whose middle is moved, at least 1; each takes 3 tokens of `data.length`."""
    documents: Literal["isolated", "joined"] = "isolated"
    """`isolated`: a document of a row sees itself only; `joined`: attention, positions and targets run on from document
    to document, as in the paper. Each has a middle of its own either way."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the whole vocabulary, in [0, 1)."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 per token, at least 0 (PaLM: 1e-4)."""

    def __post_init__(self) -> None:
        for key in ("fim_rate", "spm_rate"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"objective.{key} is {getattr(self, key)}; it must be in [0, 1].")
        if self.max_documents < 1:
            raise UserError(f"objective.max_documents is {self.max_documents}; accepted: 1 or more.")
        if self.documents not in ("isolated", "joined"):
            raise UserError(f"objective.documents is {self.documents!r}; accepted: isolated, joined.")
        check_token_loss(self.label_smoothing, self.z_loss)

    @property
    def judged_by(self) -> Judge:
        """`bits_per_byte` where some documents stay as they are, by themselves, as n-gram models read them."""
        return "bits_per_byte" if self.documents == "isolated" and self.fim_rate < 1 else "loss"

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows with room left for markers; refuses a vocabulary without them or without an end."""
        vocab.require(f"objective {self.name}", *INFILLING_MARKS)
        if vocab.eos is None:
            raise UserError(
                f"objective {self.name} ends what is filled in with an end-of-sequence token, and the vocabulary has "
                "none; set a tokenizer with one."
            )
        room = _MARKERS * self.max_documents
        if length < room + 2:
            raise UserError(
                f"data.length is {length}, of which markers may take {room} tokens (3 for each of the "
                f"{self.max_documents} documents of objective.max_documents); accepted: a length of at least "
                f"{room + 2}, or fewer documents."
            )
        return RowSpec("packed", length - room, suffix=(vocab.eos,), fields=("token_bytes",))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Rearranges documents by the row's key, and shifts the row by one to make targets.

        In `extra`, of each target: `target_bytes`, `in_middle` (of a middle, or the EOS after it) and `in_place` (in a
        document that stayed as it is).
        """
        prefix_id, suffix_id, middle_id = ctx.vocab.require(f"objective {self.name}", *INFILLING_MARKS)
        rearranged = functools.partial(
            noise.fill_in_middle,
            max_documents=self.max_documents,
            prefix_id=prefix_id,
            suffix_id=suffix_id,
            middle_id=middle_id,
            fim_rate=self.fim_rate,
            spm_rate=self.spm_rate,
            eos=ctx.vocab.eos,
        )
        found = jax.vmap(rearranged)(keys, batch["tokens"], batch["segment_ids"])
        last = found.segment_ids != ahead(found.segment_ids)
        in_middle = found.is_middle | (found.is_moved & last & (found.tokens == ctx.vocab.eos))
        rows = {"tokens": found.tokens}
        if "token_bytes" in batch:
            there = jnp.take_along_axis(batch["token_bytes"], jnp.maximum(found.source, 0), axis=1)
            rows["token_bytes"] = jnp.where(found.source < 0, 0, there)
        segments, positions = found.segment_ids, found.positions
        if self.documents == "joined":
            segments, positions = as_one_text(segments)
        example = next_token_example(rows, segments, positions)
        parts = {"in_middle": ahead(in_middle), "in_place": ahead(~found.is_moved)}
        return dataclasses.replace(example, extra={**example.extra, **parts})

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of next-token losses, with label smoothing and z-loss where they are set."""
        model, weights = models["model"], example.weights
        found = next_token_losses(
            model,
            hidden_states(model, example, ctx),
            example,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
        )
        middle, place = weights * example.extra["in_middle"], weights * example.extra["in_place"]
        metrics = token_metrics(found.nll, weights, found.correct)
        metrics |= {f"middle_{name}": x for name, x in token_metrics(found.nll, middle, found.correct).items()}
        metrics["moved"] = (jnp.sum(weights - place), jnp.sum(weights))
        if "target_bytes" in example.extra:
            metrics["bits_per_byte"] = bits_per_byte(found.nll, place, example.extra["target_bytes"])
        return Terms({"nll": jnp.sum(found.loss * weights)}, metrics, carried)
