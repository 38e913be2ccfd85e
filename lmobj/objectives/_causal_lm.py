"""Causal language modelling: predict each token from those before it.

    L = - sum_t w_t log p(x_{t+1} | x_1..x_t) / sum_t w_t

Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training", eq. 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Key

from lmobj import losses, masks
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.objectives._objective import Context, Example, Models, Objective, Terms, token_metrics

__all__ = ["CausalLM"]


@dataclass(frozen=True)
class CausalLM(Objective):
    """Causal LM over packed rows: each document sees itself only, and no token is predicted across documents.

    Rows are the documents end to end, an end-of-sequence token after each where the vocabulary has one. The last
    token of a row and of a document's part in it predicts nothing. Metrics: `nll` (nats per token), `accuracy`,
    `bits_per_byte` (nll in bits over the UTF-8 bytes of the predicted tokens).
    """

    summary: ClassVar[str] = "Predict each token from those before it (GPT)."
    paper: ClassVar[str] = "Radford et al. 2018, Improving Language Understanding by Generative Pre-Training"
    judged_by: ClassVar[Literal["bits_per_byte"]] = "bits_per_byte"
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["causal_lm"] = "causal_lm"
    """Predict each token from those before it."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the whole vocabulary, in [0, 1)."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)^2 per token, at least 0 (PaLM: 1e-4)."""

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"objective.label_smoothing is {self.label_smoothing}; it must be in [0, 1).")
        if self.z_loss < 0:
            raise UserError(f"objective.z_loss is {self.z_loss}; it must be at least 0.")

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Packed rows of `length` tokens; refuses a length that leaves nothing to predict."""
        if length < 2:
            raise UserError(f"data.length is {length}; causal_lm predicts the next token and needs at least 2.")
        suffix = () if vocab.eos is None else (vocab.eos,)
        return RowSpec("packed", length, suffix=suffix, fields=("token_bytes",))

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Shifts the row by one to make targets; nothing is random.

        `loss_mask [B, L]` in the batch, if given, says which tokens are predicted (1) and which only read (0).
        `token_bytes` gives the targets' bytes for bits per byte.
        """
        tokens, segments = batch["tokens"], batch["segment_ids"]
        same_document = (segments == _shift_left(segments)) & (segments > 0)
        weights = same_document.astype(jnp.float32)
        if "loss_mask" in batch:
            weights = weights * _shift_left(batch["loss_mask"])
        extra = {"target_bytes": _shift_left(batch["token_bytes"])} if "token_bytes" in batch else {}
        return Example(
            inputs=tokens,
            targets=_shift_left(tokens),
            weights=weights,
            mask=masks.causal().packed(segments),
            positions=batch["positions"],
            extra=extra,
        )

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the weighted sum of next-token losses, with label smoothing and z-loss where they are set."""
        model = models["model"]
        hidden = model.hidden(example.inputs, mask=example.mask, positions=example.positions, dropout=ctx.dropout)
        head = model.head_table()
        stats = losses.linear_logit_stats(
            model.head_hidden(hidden),
            head.table,
            example.targets,
            bias=head.bias,
            vocab_size=head.vocab_size,
            soft_cap=head.soft_cap,
        )
        classes = head.vocab_size or head.table.shape[0]
        loss = losses.label_smoothed_nll(stats, epsilon=self.label_smoothing, num_classes=classes)
        loss = loss + self.z_loss * losses.z_loss(stats)
        nll = losses.nll(stats)
        metrics = token_metrics(nll, example.weights, stats.correct)
        if "target_bytes" in example.extra:
            bits = jnp.sum(nll * example.weights) / math.log(2)
            metrics["bits_per_byte"] = (bits, jnp.sum(example.extra["target_bytes"] * example.weights))
        return Terms({"nll": jnp.sum(loss * example.weights)}, metrics, carried)


def _shift_left(x: Array) -> Array:
    """x[:, t+1] at t; 0 at the end."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))
