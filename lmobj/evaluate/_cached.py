"""What sampling and beam search share: reading a prompt into the cache, extending it, and the result."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lmobj.errors import UserError
from lmobj.models import Cache, EncoderDecoderModel, OutputHead

__all__ = [
    "Generated",
    "HeadModel",
    "WritingModel",
    "check_counts",
    "check_reads_rows",
    "extend",
    "output_logits",
    "prefill",
]

_MOST = 2**20
"""Of tokens, samples, beams: more than any context or memory holds."""


class HeadModel(Protocol):
    """What turns hidden states into logits, as every model has it."""

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]: ...

    def head_table(self) -> OutputHead: ...


class WritingModel(HeadModel, Protocol):
    """What decoding asks of a model: a `lmobj.models.CachedModel` is one."""

    def init_cache(self, batch_size: int, length: int) -> Cache: ...

    def step(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]: ...


class Generated(NamedTuple):
    """Generated tokens. Of each row the first `lengths` count; what follows is 0."""

    tokens: Int[Array, "*rows T"]
    """Without the prompt; the end-of-sequence token is included where it was generated."""
    log_probs: Float[Array, "*rows T"]
    """ln p of each token under the model itself, before penalty, temperature and filters; in nats."""
    lengths: Int[Array, "*rows"]
    """Number of tokens, the end-of-sequence token included."""
    scores: Float[Array, "*rows"]
    """Sum of the log-probabilities; in beam search divided by the length penalty."""


def check_counts(settings: Any, *names: str) -> None:
    """Refuses counts that are below 1 or beyond all use; None passes."""
    for name in names:
        count = getattr(settings, name)
        if count is not None and count < 1:
            raise UserError(f"{name} is {count}; it must be at least 1.")
        if count is not None and count > _MOST:
            raise UserError(f"{name} is {count}; it must be at most {_MOST}.")


def check_reads_rows(model: Any) -> None:
    """Refuses a model that gives no hidden states of a row by itself."""
    if isinstance(model, EncoderDecoderModel):
        raise UserError(
            f"model is {type(model).__name__}, whose decoder writes a row of its own beside the one that is read; "
            "accepted: a model that reads one row, such as a decoder or an encoder."
        )


def output_logits(model: HeadModel, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Logits over the real vocabulary (table rows that pad it are cut off), in float32 at least."""
    head = model.head_table()
    hidden = model.head_hidden(hidden)
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    logits = jnp.einsum("...d,vd->...v", hidden, head.table.astype(hidden.dtype), preferred_element_type=dtype)
    if head.bias is not None:
        logits = logits + head.bias
    if head.soft_cap is not None:
        logits = head.soft_cap * jnp.tanh(logits / head.soft_cap)
    return logits[..., : head.vocab_size]


def prefill(
    model: WritingModel, prompts: Int[Array, "B P"], lengths: Int[Array, " B"], room: int
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads the prompts: logits of the first new token, and a cache with room for P + `room` tokens."""
    rows, width = prompts.shape
    index = jnp.arange(width)
    positions = jnp.where(index < lengths[:, None], index, -1)
    hidden, cache = model.step(prompts, model.init_cache(rows, width + room), positions)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    return output_logits(model, last), cache


def extend(
    model: WritingModel, tokens: Int[Array, " B"], cache: Cache, positions: Int[Array, " B"]
) -> tuple[Float[Array, "B V"], Cache]:
    """Reads one more token per row; position -1 leaves a row's cache as it is."""
    hidden, cache = model.step(tokens[:, None], cache, positions[:, None])
    return output_logits(model, hidden[:, 0]), cache
