"""Checks that the families' settings share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lmobj.errors import UserError
from lmobj.models._layers import GATED, DTypeName

__all__ = [
    "at_least",
    "check_blocks",
    "check_length",
    "check_rates",
    "check_rotary",
    "check_transformer",
    "default_mlp_width",
    "resolve_dtype",
]


_MOST = 2**31 - 1
"""Tokens and positions are counted in int32."""


def at_least(settings: Any, minimum: int, *names: str) -> None:
    """Refuses counts below `minimum`, and those that do not fit in int32; None passes."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < minimum:
            raise UserError(f"model.{name} is {value}; it must be at least {minimum}.")
        if value is not None and value > _MOST:
            raise UserError(f"model.{name} is {value}; it must be at most {_MOST}.")


def check_rates(settings: Any, *names: str) -> None:
    """Refuses dropout rates outside [0, 1)."""
    for name in names:
        value = getattr(settings, name)
        if not 0 <= value < 1:
            raise UserError(f"model.{name} is {value}; it must be in [0, 1).")


def check_blocks(settings: Any, *rates: str) -> None:
    """Refuses sizes that no stack of transformer blocks can have, and dropout rates outside [0, 1)."""
    at_least(settings, 1, "layers", "width", "heads", "mlp_width", "vocab_multiple")
    check_rates(settings, *rates)
    for name in ("norm_eps", "init_std"):
        value = getattr(settings, name)
        if value is not None and value <= 0:
            raise UserError(f"model.{name} is {value}; it must be above 0.")
    if getattr(settings, "head_width", None) is None and settings.width % settings.heads:
        otherwise = ", or model.head_width be set" if hasattr(settings, "head_width") else ""
        raise UserError(
            f"model.heads is {settings.heads} and model.width is {settings.width}; heads must divide the width"
            f"{otherwise}."
        )


def check_transformer(settings: Any) -> None:
    """Refuses sizes that decoder and encoder cannot have."""
    check_blocks(settings, "dropout", "attention_dropout", "embedding_dropout")
    at_least(settings, 1, "max_length")
    if settings.attention_backend != "xla" and settings.attention_dropout > 0:
        raise UserError(
            f"model.attention_dropout is {settings.attention_dropout} and model.attention_backend is "
            f"{settings.attention_backend}, which cannot drop out attention probabilities; set the dropout "
            "to 0, or the backend to xla."
        )


def check_rotary(settings: Any) -> None:
    """Refuses what rotary positions cannot have."""
    head_width = settings.width // settings.heads
    if settings.positions == "rotary" and head_width % 2:
        raise UserError(f"model.positions is rotary and model.width / model.heads is {head_width}; it must be even.")
    if settings.rope_base <= 1:
        raise UserError(f"model.rope_base is {settings.rope_base}; it must be above 1.")


def default_mlp_width(width: int, activation: str) -> int:
    """4 * width; with a gate, which is a third matrix, 8/3 * width rounded up to a multiple of 64."""
    return -(-8 * width // (3 * 64)) * 64 if activation in GATED else 4 * width


def resolve_dtype(name: DTypeName, key: str) -> jnp.dtype:
    """The dtype called `name`. float64 is refused where jax would silently make it float32."""
    if name == "float64" and jnp.result_type(float) != jnp.float64:
        raise UserError(f"model.{key} is float64 and jax's 64-bit mode is off; set JAX_ENABLE_X64=1, or use float32.")
    return jnp.dtype(name)


def check_length(length: int, max_length: int) -> None:
    """Refuses rows longer than the model was built for."""
    if length > max_length:
        raise UserError(
            f"model.max_length is {max_length} and rows have {length} tokens; raise it to at least {length}."
        )
