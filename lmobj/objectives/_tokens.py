"""What the objectives that predict tokens share: a model's hidden states, its vocabulary head, sums and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lmobj import losses
from lmobj.errors import UserError
from lmobj.models import LanguageModel, OutputHead
from lmobj.objectives._objective import Context, Example, Terms, token_metrics

__all__ = ["head_stats", "hidden_states", "is_one_of", "token_terms"]


def hidden_states(model: LanguageModel, example: Example, ctx: Context) -> Float[Array, "B L D"]:
    """The model's last hidden states of the example's rows.

    Raises:
      UserError: the model has no `hidden`: it does not read one row by itself.
    """
    if not hasattr(model, "hidden"):  # an objective with heads of its own asks no more of a model
        raise UserError(
            f"the objective reads rows by one model and {type(model).__name__}, which model.name gives, is not of that "
            "kind; set model.name to a decoder or an encoder, or use an objective for an encoder with a decoder."
        )
    return model.hidden(
        example.inputs,
        mask=example.mask,
        positions=example.positions,
        token_types=example.token_types,
        dropout=ctx.dropout,
    )


def head_stats(
    states: Float[Array, "B N E"],
    head: OutputHead,
    targets: Int[Array, "B N"],
    vocab_mask: Bool[Array, " V"] | None = None,
) -> losses.LogitStats:
    """[B, N] statistics of the logits of an output head, which are never stored; of the tokens in `vocab_mask` alone
    where it is given."""
    return losses.linear_logit_stats(
        states,
        head.table,
        targets,
        bias=head.bias,
        vocab_mask=vocab_mask,
        vocab_size=head.vocab_size,
        soft_cap=head.soft_cap,
    )


def token_terms(model: LanguageModel, hidden: Float[Array, "B N D"], example: Example, carried: Any = ()) -> Terms:
    """`nll`: the weighted sum of losses at the example's targets, and metrics, from the states that predict them."""
    stats = head_stats(model.head_hidden(hidden), model.head_table(), example.targets)
    nll = losses.nll(stats)
    metrics = token_metrics(nll, example.weights, stats.correct)
    return Terms({"nll": jnp.sum(nll * example.weights)}, metrics, carried)


def is_one_of(tokens: Int[Array, "B L"], ids: Iterable[int]) -> Bool[Array, "B L"]:
    """Which tokens have one of the ids."""
    return jnp.any(tokens[..., None] == jnp.asarray([*ids], tokens.dtype), axis=-1)
