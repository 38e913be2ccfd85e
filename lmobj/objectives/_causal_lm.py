"""Causal language modelling: predict each token from those before it.

    L = - sum_t w_t log p(x_{t+1} | x_1..x_t) / sum_t w_t

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from lmobj import losses, masks
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import LanguageModel
from lmobj.objectives._objective import Context, Example, Judge, Metric, Models, Objective, Terms, token_metrics
from lmobj.objectives._tokens import head_stats, hidden_states

__all__ = [
    "CausalLM",
    "NextTokenLosses",
    "ahead",
    "as_one_text",
    "bits_per_byte",
    "check_token_loss",
    "next_token_example",
    "next_token_losses",
    "next_token_terms",
    "targets_ahead",
]


@dataclass(frozen=True)
class CausalLM(Objective):
    """Causal LM over packed rows, or over the second of two texts.

    Rows are the documents end to end, an end-of-sequence token after each where the vocabulary has one. The last
    token of a row predicts nothing; with `documents: isolated` neither does that of a document's part in it.

    With `loss_on: completion` a row is one example of data whose documents are two texts (`data.source.pair`):
    A eos B eos, and only the tokens of B, its end-of-sequence token included, are predicted. The tokens of A and the
    one that ends it are read and cost nothing. [CLS] and [SEP] take no part, whether the vocabulary has them or not.

    Metrics: `nll` (nats per token), `accuracy`, `bits_per_byte` (nll in bits over the UTF-8 bytes of the predicted
    tokens).
    """

    summary: ClassVar[str] = "Predict each token from those before it (GPT)."
    paper: ClassVar[str] = "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training"
    causal: ClassVar[bool] = True
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["causal_lm"] = "causal_lm"
    """Predict each token from those before it."""
    documents: Literal["isolated", "joined"] = "isolated"
    """`isolated`: a document of a row sees itself only; `joined`: a row is one text, in which attention, positions and
    targets run on from document to document (GPT-3)."""
    loss_on: Literal["all", "completion"] = "all"
    """`all`: every token is predicted; `completion`: those of the second text of each pair."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the whole vocabulary, in [0, 1)."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 per token, at least 0 (PaLM: 1e-4)."""

    def __post_init__(self) -> None:
        check_token_loss(self.label_smoothing, self.z_loss)
        if self.documents == "joined" and self.loss_on == "completion":
            raise UserError(
                "objective.documents is joined and objective.loss_on is completion, whose rows hold one example each; "
                "accepted: documents=isolated, or loss_on=all."
            )

    @property
    def judged_by(self) -> Judge:
        """`bits_per_byte` where n-gram models can be scored on the same tokens: on documents by themselves."""
        return "bits_per_byte" if (self.documents, self.loss_on) == ("isolated", "all") else "loss"

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows of `length` tokens; refuses a length that leaves nothing to predict, and completions without an end."""
        if length < 2:
            raise UserError(f"data.length is {length}; causal_lm predicts the next token and needs at least 2.")
        suffix = () if vocab.eos is None else (vocab.eos,)
        if self.loss_on == "all":
            return RowSpec("packed", length, suffix=suffix, fields=("token_bytes",))
        if vocab.eos is None:
            raise UserError(
                "objective.loss_on is completion, which ends both texts with an end-of-sequence token, and the "
                "vocabulary has none; set a tokenizer with one."
            )
        return RowSpec("examples", length, suffix=suffix, fields=("token_bytes",), two_texts=True)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Shifts the row by one to make targets; nothing is random.

        `loss_mask [B, L]` in the batch, if given, says which tokens are predicted (1) and which only read (0).
        `token_bytes` gives the targets' bytes for bits per byte.
        """
        segments, positions = batch["segment_ids"], batch["positions"]
        if self.documents == "joined":
            segments, positions = as_one_text(segments)
        predicted = batch["token_types"] == 1 if self.loss_on == "completion" else None
        return next_token_example(batch, segments, positions, predicted)

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of next-token losses, with label smoothing and z-loss where they are set."""
        model = models["model"]
        hidden = hidden_states(model, example, ctx)
        return next_token_terms(
            model, hidden, example, label_smoothing=self.label_smoothing, z_loss=self.z_loss, carried=carried
        )


def check_token_loss(label_smoothing: float, z_loss: float) -> None:
    """Refuses settings of `next_token_terms` that are out of range."""
    if not 0 <= label_smoothing < 1:
        raise UserError(f"objective.label_smoothing is {label_smoothing}; it must be in [0, 1).")
    if z_loss < 0:
        raise UserError(f"objective.z_loss is {z_loss}; it must be at least 0.")


def as_one_text(segments: Int[Array, "B L"]) -> tuple[Int[Array, "B L"], Int[Array, "B L"]]:
    """Segments and positions of rows that run on from document to document."""
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1], dtype=jnp.int32), segments.shape)
    return (segments > 0).astype(segments.dtype), positions


def next_token_example(
    batch: Batch,
    segments: Int[Array, "B L"],
    positions: Int[Array, "B L"],
    predicted: Bool[Array, "B L"] | None = None,
) -> Example:
    """Each token's target is the next one of its segment, under a causal mask that keeps to segments.

    Args:
      batch: `tokens`; where it has them, `loss_mask` and `token_bytes` (see `CausalLM.corrupt`).
      segments: of the tokens; 0 for padding.
      positions: of the tokens.
      predicted: the tokens that are predicted; by default all.
    """
    targets, weights = targets_ahead(batch, segments, 1)
    if predicted is not None:
        weights = weights * ahead(predicted)
    extra = {"target_bytes": ahead(batch["token_bytes"])} if "token_bytes" in batch else {}
    return Example(
        inputs=batch["tokens"],
        targets=targets,
        weights=weights,
        mask=masks.causal().packed(segments),
        positions=positions,
        extra=extra,
    )


def targets_ahead(
    batch: Batch, segments: Int[Array, "B L"], places: int
) -> tuple[Int[Array, "B L"], Float[Array, "B L"]]:
    """Each token's target so many places ahead, and its weight: 0 in another segment, or if `loss_mask` says so."""
    weights = ((segments == ahead(segments, places)) & (segments > 0)).astype(jnp.float32)
    if "loss_mask" in batch:
        weights = weights * ahead(batch["loss_mask"], places)
    return ahead(batch["tokens"], places), weights


class NextTokenLosses(NamedTuple):
    """Of each target."""

    loss: Float[Array, "B N"]
    """label_smoothed_nll + z_loss * logsumexp(logits)^2."""
    nll: Float[Array, "B N"]
    correct: Bool[Array, "B N"]


def next_token_losses(
    model: LanguageModel,
    hidden: Float[Array, "B L D"],
    example: Example,
    *,
    label_smoothing: float,
    z_loss: float,
) -> NextTokenLosses:
    """What each target costs, from the hidden states of `next_token_example`'s rows."""
    head = model.head_table()
    stats = head_stats(model.head_hidden(hidden), head, example.targets)
    classes = head.vocab_size or head.table.shape[0]
    loss = losses.label_smoothed_nll(stats, epsilon=label_smoothing, num_classes=classes)
    return NextTokenLosses(loss + z_loss * losses.z_loss(stats), losses.nll(stats), stats.correct)


def next_token_terms(
    model: LanguageModel,
    hidden: Float[Array, "B L D"],
    example: Example,
    *,
    label_smoothing: float,
    z_loss: float,
    carried: Any,
) -> Terms:
    """`nll` from `next_token_losses`, and its metrics, which are of the nll alone."""
    found = next_token_losses(model, hidden, example, label_smoothing=label_smoothing, z_loss=z_loss)
    metrics = token_metrics(found.nll, example.weights, found.correct)
    if "target_bytes" in example.extra:
        metrics["bits_per_byte"] = bits_per_byte(found.nll, example.weights, example.extra["target_bytes"])
    return Terms({"nll": jnp.sum(found.loss * example.weights)}, metrics, carried)


def bits_per_byte(nll: Float[Array, "B N"], weights: Float[Array, "B N"], target_bytes: Int[Array, "B N"]) -> Metric:
    """The nll of the targets in bits, over their bytes."""
    return jnp.sum(nll * weights) / math.log(2), jnp.sum(target_bytes * weights)


def ahead(x: Array, places: int = 1) -> Array:
    """x[:, t + places] at t; 0 at the end."""
    return jnp.pad(x[:, places:], ((0, 0), (0, places)))
