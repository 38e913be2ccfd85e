"""What the flash kernels have in common: where they run, and what none of them can do."""

from __future__ import annotations

import jax

from lmobj.errors import UserError
from lmobj.partition import mesh_axes

__all__ = ["platform", "refuse_for_flash"]


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the devices of the mesh in force, which may be elsewhere, or else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def refuse_for_flash(backend: str, dropout_rate: float) -> None:
    """Raises UserError for dropout of probabilities, and for a mesh that cuts rows over their length."""
    if dropout_rate > 0:
        raise UserError(
            f"model.attention_backend: {backend!r} cannot drop out attention probabilities and attention dropout is "
            f"{dropout_rate}; set it to 0, or use 'xla'."
        )
    if lengthwise := mesh_axes("length"):
        raise UserError(
            f"model.attention_backend: {backend!r} cannot cut rows over length and the mesh axis "
            f"{next(iter(lengthwise))!r} does; set its size to 1, or use 'xla'."
        )
