"""Settings that make a model one of a family, beside its sizes."""

from __future__ import annotations

from typing import Any

__all__ = ["BART"]

BART: dict[str, Any] = {
    "head_width": None,
    "positions": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "pre_norm": False,
    "embedding_norm": True,
    "activation": "gelu_exact",
    "bias": True,
    "tie_embeddings": True,
    "output_bias": True,
    "scale_attention": True,
}
"""Of `EncoderDecoderConfig`."""
