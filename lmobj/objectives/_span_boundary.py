"""Span masking and the span-boundary objective: predict the tokens of a span, where they stand and from its borders.

    L = - sum_k w_k log p(x_{i_k} | corrupted x) / sum_k w_k
        - sum_k v_k log q(x_{i_k} | h_{left(k)}, h_{right(k)}, i_k - left(k)) / (sum_k v_k + 1)

over the masked positions i_k, where left(k) and right(k) are the positions next to the span that holds i_k, and h the
last hidden states. Joshi et al. 2020, "SpanBERT: Improving Pre-training by Representing and Predicting Spans".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from lmobj import losses, masks, noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import HeadStyle, RowUse, SpanBoundaryHead
from lmobj.objectives._masked_lm import check_room, check_shares, maskable, masked_rows, masked_terms
from lmobj.objectives._objective import Context, Example, Models, Objective, ObjectiveState, Role, Terms
from lmobj.objectives._tokens import head_stats, hidden_states

__all__ = ["SpanBoundary"]


@dataclass(frozen=True)
class SpanBoundary(Objective):
    """SpanBERT's pre-training: masked LM on spans of words (`nll`), and the span-boundary objective (`sbo`).

    A token's span is a run of masked tokens. Tokens are predicted from its borders if both are ordinary tokens, so not
    in spans at either end of a document, and if they are among the span's first `max_targets`. Rows without such a span
    count nothing in `sbo`. What a word is: `data.segment.words`.

    Metrics: masked LM's, and `sbo_nll` and `sbo_accuracy` of the tokens predicted from borders.

    Deviations from the reference code: masks are drawn anew at every step; random tokens are drawn evenly from the
    vocabulary, not by frequency; with `packed` rows the count is taken over the row.
    """

    summary: ClassVar[str] = "Predict masked spans, also from their borders (SpanBERT)."
    paper: ClassVar[str] = "Joshi et al. 2020, SpanBERT: Improving Pre-training by Representing and Predicting Spans"
    roles: ClassVar[Mapping[str, Role]] = {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}
    coefficients: ClassVar[Mapping[str, float]] = {"nll": 1.0, "sbo": 1.0}
    epsilon: ClassVar[Mapping[str, float]] = {"sbo": 1.0}
    judged_by: ClassVar[Literal["top5_accuracy"]] = "top5_accuracy"
    fills_masks: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["span_boundary"] = "span_boundary"
    """Predict masked spans, also from their borders."""
    mask_rate: float = 0.15
    """Share of a row's ordinary tokens that is selected, rounded up, in (0, 1)."""
    span_probability: float = 0.2
    """p of the lengths of spans in words, which are drawn in proportion to p (1 - p)^(l - 1), in (0, 1)."""
    max_span: int = 10
    """Most words in a span when it is drawn, at least 1."""
    max_targets: int = 15
    """Most tokens of a span that are predicted from its borders, at least 1."""
    offset_width: int = 200
    """Width of the embedding of a token's place in its span, at least 1."""
    mask_share: float = 0.8
    """Share of the spans that become [MASK]."""
    random_share: float = 0.1
    """Share of the spans that become random tokens; the rest stay as they are."""
    layout: Literal["packed", "single"] = "single"
    """`packed`: documents end to end, each seeing itself only; `single`: one piece of a document per row."""

    def __post_init__(self) -> None:
        check_shares(self.mask_rate, self.mask_share, self.random_share)
        if not 0 < self.span_probability < 1:
            raise UserError(f"objective.span_probability is {self.span_probability}; it must be above 0 and below 1.")
        for name in ("max_span", "max_targets", "offset_width"):
            if getattr(self, name) < 1:
                raise UserError(f"objective.{name} is {getattr(self, name)}; it must be at least 1.")

    def build_heads(self, style: HeadStyle, vocab: Vocabulary, rngs: nnx.Rngs) -> nnx.Module:
        """The head that reads the borders of spans."""
        return SpanBoundaryHead(style, vocab.size, rngs, max_targets=self.max_targets, offset_width=self.offset_width)

    def use(self, length: int) -> RowUse:
        """The vocabulary's table is held against each slot twice, for either term."""
        return RowUse(length, 2 * noise.span_budget(length, self.mask_rate))

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """[CLS] document [SEP], single or packed; refuses what masked LM does, and spans longer than a row."""
        specials = (vocab.cls is not None) + (vocab.sep is not None)
        spec = masked_rows(self.name, vocab, self.layout, length)
        check_room(self.mask_rate, noise.span_budget(length - specials, self.mask_rate), length, specials)
        if self.max_span > length - specials:
            raise UserError(
                f"objective.max_span is {self.max_span} words, and a row of data.length {length} has "
                f"{length - specials} ordinary tokens; accepted: 1 to {length - specials}, or a larger data.length."
            )
        return RowSpec(spec.layout, length, spec.prefix, spec.suffix, fields=("word_starts",))

    def init(self, models: Models, key: Key[Array, ""], batch_size: int) -> ObjectiveState:
        """Nothing; refuses a model whose output table is narrower than its hidden states."""
        _check_width(models)
        return ObjectiveState()

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Masks spans of each row by its own key; special tokens and padding are never selected and end a span."""
        assert ctx.vocab.mask is not None
        tokens = batch["tokens"]
        mask = functools.partial(
            noise.mask_spans,
            num_predictions=noise.span_budget(tokens.shape[1], self.mask_rate),
            mask_id=ctx.vocab.mask,
            vocab_size=ctx.vocab.size,
            mask_rate=self.mask_rate,
            mask_share=self.mask_share,
            random_share=self.random_share,
            span_probability=self.span_probability,
            max_span=self.max_span,
            max_targets=self.max_targets,
        )
        masked = jax.vmap(mask)(keys, tokens, maskable(batch, ctx.vocab), batch["word_starts"], batch["segment_ids"])
        return Example(
            inputs=masked.tokens,
            targets=masked.targets,
            weights=masked.weights,
            mask=masks.bidirectional().packed(batch["segment_ids"]),
            positions=batch["positions"],
            token_types=batch.get("token_types"),
            predict=masked.positions,
            extra={
                "left": masked.left,
                "right": masked.right,
                "offset": masked.offset,
                "boundary_weights": masked.boundary_weights,
            },
        )

    def weights(self, example: Example) -> dict[str, Float[Array, ""]]:
        """Masked tokens, and those of them that are predicted from borders."""
        return {"nll": jnp.sum(example.weights), "sbo": jnp.sum(example.extra["boundary_weights"])}

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll` and `sbo`: the weighted sums of the two losses, from one pass over the corrupted rows."""
        model = models["model"]
        hidden = hidden_states(model, example, ctx)
        masked = masked_terms(model, hidden, example)
        stats = boundary_stats(models, hidden, example)
        nll, weights = losses.nll(stats), example.extra["boundary_weights"]
        total, count = jnp.sum(nll * weights), jnp.sum(weights)
        metrics = {"sbo_nll": (total, count), "sbo_accuracy": (jnp.sum(stats.correct * weights), count)}
        return Terms({**masked.sums, "sbo": total}, {**masked.metrics, **metrics}, carried)


def boundary_stats(models: Models, hidden: Float[Array, "B L D"], example: Example) -> losses.LogitStats:
    """[B, K] statistics of the logits of each masked token, seen from the borders of its span."""
    left, right = (jnp.take_along_axis(hidden, example.extra[side][..., None], axis=1) for side in ("left", "right"))
    heads, head = models["heads"], models["model"].head_table()
    bias = heads.bias[...]
    padded = jnp.pad(bias, (0, head.table.shape[0] - bias.shape[0]))  # as the table may be
    return head_stats(heads(left, right, example.extra["offset"]), head._replace(bias=padded), example.targets)


def _check_width(models: Models) -> None:
    width, table = models["heads"].second.bias.shape[0], models["model"].head_table().table.shape[1]
    if width != table:
        raise UserError(
            f"objective span_boundary reads hidden states of width {width} and scores what it makes of them against an "
            f"output table of width {table}; accepted: a model with both alike, such as model.embedding_width=null."
        )
