"""Floating-point operations of a training step: counted in the compiled program, and by the usual formula.

What counts, and what does not, is said in `lmobj.train.flops`.
"""

from __future__ import annotations

from lmobj.train.assemble import Design
from lmobj.train.flops import matmul_flops

__all__ = ["formula_flops", "step_flops"]


def step_flops(design: Design, hlo_text: str) -> int:
    """Counted operations of one training step on all devices. `hlo_text` is the program of one of them."""
    return matmul_flops(hlo_text) * design.mesh.size


def formula_flops(design: Design) -> float:
    """The estimate (6 N + 12 layers width length) tokens of Chowdhery et al. 2022 (PaLM), appendix B, for one step.

    N is all trainable parameters, embeddings included and those of shared layers once for each layer, as if each met
    every token in one product forwards and two backwards. The second part is attention, and 0 for models without
    `layers` and `width` in their settings. It knows nothing of recomputation, of vocabulary heads on predicted
    positions only, or of a second model's attention.
    """
    model, length = design.config.model, design.config.data.length
    attention = 12 * getattr(model, "layers", 0) * getattr(model, "width", 0) * length
    return float((6 * design.applied_parameter_count + attention) * design.tokens_per_step)
