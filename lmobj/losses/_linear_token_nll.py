"""The loss of tokens straight from hidden states and the output table."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj.errors import UserError
from lmobj.losses import _logit_stats as on_stats
from lmobj.losses._linear_logit_stats import linear_logit_stats

__all__ = ["linear_token_nll"]


def linear_token_nll(
    hidden: Float[Array, "*N D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "*N"],
    *,
    bias: Float[Array, " V"] | None = None,
    vocab_mask: Bool[Array, " V"] | None = None,
    vocab_size: int | None = None,
    soft_cap: float | None = None,
    label_smoothing: float = 0.0,
    offtarget_smoothing: float = 0.0,
    z_loss: float = 0.0,
    block_size: int | None = None,
) -> Float[Array, "*N"]:
    """Negative log-likelihood of each target in nats, unreduced, without ever storing the logits.

        token_nll(c tanh((hidden @ table.T + bias) / c), targets),  or without tanh where there is no cap c

    For accuracy, or several losses from one pass, take `linear_logit_stats` and the functions of its result.

    Args:
      hidden, table, targets, bias, vocab_mask, vocab_size, soft_cap, block_size: see `linear_logit_stats`.
      label_smoothing: epsilon of `label_smoothed_nll` (epsilon / V on every class: PyTorch), in [0, 1).
      offtarget_smoothing: epsilon of `offtarget_smoothed_nll` (epsilon / (V - 1) on each wrong class: fairseq, t5x), in
        [0, 1); not together with `label_smoothing`.
      z_loss: coefficient of the function `z_loss`, >= 0 (T5X and PaLM: 1e-4).

    Returns:
      [...] nats for each token, z-loss included.

    Raises:
      UserError: shapes or types that do not fit, or settings out of range.

    Source: as for `linear_logit_stats` and `token_nll`.
    """
    if label_smoothing and offtarget_smoothing:
        raise UserError(
            f"linear_token_nll: label_smoothing is {label_smoothing} and offtarget_smoothing is {offtarget_smoothing}; "
            "they are two conventions of the same thing, so one of them must be 0."
        )
    stats = linear_logit_stats(
        hidden,
        table,
        targets,
        bias=bias,
        vocab_mask=vocab_mask,
        vocab_size=vocab_size,
        soft_cap=soft_cap,
        block_size=block_size,
    )
    num_classes: int | Array = table.shape[0] if vocab_size is None else vocab_size
    if vocab_mask is not None:
        num_classes = jnp.sum(vocab_mask[:num_classes])
    if label_smoothing:
        loss = on_stats.label_smoothed_nll(stats, epsilon=label_smoothing, num_classes=num_classes)
    elif offtarget_smoothing:
        loss = on_stats.offtarget_smoothed_nll(stats, epsilon=offtarget_smoothing, num_classes=num_classes)
    else:
        loss = on_stats.nll(stats)
    return loss + z_loss * on_stats.z_loss(stats) if z_loss else loss
