"""Extractive question answering: where in a text the answer to a question begins and ends.

    L = - sum_b (log p_start,b(s_b) + log p_end,b(e_b)) / 2B        p_start = softmax over the row of S . h_t

over windows [CLS] question [SEP] context [SEP]. A window that does not hold the answer, and a question that has none,
is answered by [CLS]: s = e = 0. Devlin et al. 2019, sections 4.2 and 4.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from lmobj import losses
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.models import HeadStyle, TokenHead
from lmobj.objectives._objective import Context, Example, Judge, Models, Terms, token_metrics
from lmobj.objectives._row_classes import row_weights
from lmobj.objectives._token_task import TokenTask

__all__ = ["ExtractiveQA"]


@dataclass(frozen=True)
class ExtractiveQA(TokenTask):
    """The first and last token of the answer to a question (`data.source: {name: squad}`).

    Two linear maps of each token's state, S and E. Metrics: `nll` (nats per end) and `accuracy` of single ends in their
    window; evaluation adds exact match and F1 of the answers' texts.
    """

    task: ClassVar[Literal["extractive_qa"]] = "extractive_qa"
    judged_by: ClassVar[Judge] = "f1"
    summary: ClassVar[str] = "Cut the answer to a question out of a text."
    paper: ClassVar[str] = "Devlin et al. 2019, BERT, section 4.2"

    name: Literal["extractive_qa"] = "extractive_qa"
    """Cut the answer to a question out of a text."""

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] question [SEP] window of the context [SEP]; refuses a vocabulary without these tokens."""
        cls, sep = vocab.require(f"objective {self.name}", "cls", "sep")
        self.check_dropout(vocab)
        return RowSpec("questions", length, (cls,), (sep,), ("spans",))

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """S and E."""
        return TokenHead(style, 2, rngs)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """The rows as they are, or with tokens dropped; both ends of each are predicted."""
        there = row_weights(batch)[:, None]
        spans = jnp.where(there > 0, batch["spans"], 0)
        return self.example(self.dropped(keys, batch, ctx), spans, jnp.broadcast_to(there, spans.shape))

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the sum over both ends of all rows."""
        ends = jnp.swapaxes(self.logits(models, example, ctx), 1, 2)  # [B, 2, L]
        segments = example.mask.segment_ids
        assert segments is not None
        there = (segments > 0).at[:, 0].set(True)[:, None]  # an empty row has one place too, so that its loss is finite
        stats = losses.logit_stats(ends, example.targets, vocab_mask=there)
        nll = losses.nll(stats)
        metrics = token_metrics(nll, example.weights, stats.correct)
        start, end = jnp.moveaxis(jnp.where(there, ends.astype(nll.dtype), -jnp.inf), 1, 0)
        outputs = {"start_logits": start, "end_logits": end}
        return Terms({"nll": jnp.sum(nll * example.weights)}, metrics, carried, outputs)
