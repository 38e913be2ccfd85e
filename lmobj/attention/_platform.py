"""What kind of device a call is traced for."""

from __future__ import annotations

import jax

__all__ = ["platform"]


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: the devices of the mesh in force, which may be elsewhere, or else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform
