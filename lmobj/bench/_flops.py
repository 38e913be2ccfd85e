"""Floating-point operations of a training step, counted in the compiled program."""

from __future__ import annotations

from lmobj.train.assemble import Design
from lmobj.train.products import matmul_flops

__all__ = ["step_flops"]


def step_flops(design: Design, hlo_text: str) -> int:
    """Counted operations of one training step on all devices. `hlo_text` is the program of one of them."""
    return matmul_flops(hlo_text) * design.mesh.size
