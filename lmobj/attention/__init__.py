"""The one attention call. A backend that cannot honour what it is asked for raises; nothing is ever ignored.

    attention(q, k, v) = dropout(softmax(scale q k^T + bias where the mask allows)) v

Vaswani et al. 2017, "Attention Is All You Need", eq. 1; grouped queries as in Ainslie et al. 2023, "GQA".
"""

from __future__ import annotations

import math
from typing import Literal

from jaxtyping import Array, Float, Int, UInt32

from lmobj.attention._cudnn import cudnn_attention, refuse_for_cudnn
from lmobj.attention._splash import refuse_for_splash, splash_attention
from lmobj.attention._xla import xla_attention
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.partition import mesh_axes

__all__ = ["AttentionBackend", "attention"]

AttentionBackend = Literal["xla", "cudnn", "splash"]

_DROPOUT_SITE = 0
"""Usual site of the dropout on attention probabilities; a layer's own sites start at 1."""


def attention(
    q: Float[Array, "B Q H Dh"],
    k: Float[Array, "B S G Dh"],
    v: Float[Array, "B S G Dh"],
    mask: AttentionMask,
    *,
    backend: AttentionBackend = "xla",
    scale: float | None = None,
    bias: Float[Array, "B_or_1 H Q S"] | None = None,
    soft_cap: float | None = None,
    dropout_rate: float = 0.0,
    dropout_seeds: UInt32[Array, " B"] | None = None,
    layer: Int[Array, ""] | int = 0,
    site: int = _DROPOUT_SITE,
) -> Float[Array, "B Q H Dh"]:
    """Scaled dot-product attention of H query heads over G key and value heads, H a multiple of G.

    Query head h reads key head h // (H / G). A query that may see nothing gets zeros where the mask says that this
    can happen (`may_be_empty`), because an even softmax over everything would show it what it must not see. Under other
    masks it gets something finite, and undefined.

    Args:
      q, k, v: queries, keys and values of one dtype.
      mask: who may see whom.
      backend: `xla` honours everything and computes the softmax in `promote_types(dtype, float32)`, so float64 stays
        float64; `cudnn` is flash attention on NVIDIA GPUs, in bfloat16 or float16. cuDNN gets causal, windowed and
        bidirectional masks as such, and every other mask as booleans [B, 1, Q, S]. `splash` is flash attention on
        TPUs, in bfloat16 or float32, with causal, windowed and bidirectional masks, packed or not.
      scale: of the products of queries and keys; 1 / sqrt(Dh) by default.
      bias: added to the scaled logits before cap and mask (relative positions).
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2); None leaves them.
      dropout_rate: dropout of the probabilities, in [0, 1).
      dropout_seeds: one seed per row; None switches dropout off.
      layer: index of the layer, for dropout.
      site: which attention of the layer this is, for dropout; two attentions of a layer need two sites.

    Raises:
      ValueError: shapes that do not fit one another, heads that the mesh does not divide, or something that the backend
        cannot honour.
    """
    heads, groups, width = q.shape[2], k.shape[2], q.shape[3]
    if k.shape != v.shape or k.shape[3] != width or k.shape[0] != q.shape[0] or heads % groups:
        raise ValueError(
            f"attention: q {q.shape}, k {k.shape} and v {v.shape} do not fit; expected [B, Q, H, Dh] and twice "
            "[B, S, G, Dh] with H a multiple of G."
        )
    logits = (heads, q.shape[1], k.shape[1])
    if bias is not None and (bias.ndim != 4 or bias.shape[0] not in (1, q.shape[0]) or bias.shape[1:] != logits):
        raise ValueError(f"attention: the bias is {bias.shape}; expected [{q.shape[0]} or 1, {str(logits)[1:-1]}].")
    ways = mesh_axes("heads")
    if heads % math.prod(ways.values()):
        sizes = ", ".join(f"train.mesh.{axis}={size}" for axis, size in ways.items())
        raise UserError(f"{sizes} does not divide the {heads} heads of attention; accepted: a divisor of {heads}.")
    scale = 1 / math.sqrt(width) if scale is None else scale
    if dropout_seeds is None:
        dropout_rate = 0.0
    if backend == "cudnn":
        refuse_for_cudnn(q, mask, soft_cap, dropout_rate)
        return cudnn_attention(q, k, v, mask, scale, bias)
    if backend == "splash":
        refuse_for_splash(q, k, mask, bias, dropout_rate)
        return splash_attention(q, k, v, mask, scale, soft_cap)
    if backend != "xla":
        raise ValueError(f"attention: the backend is {backend!r}; it must be 'xla', 'cudnn' or 'splash'.")
    return xla_attention(q, k, v, mask, scale, bias, soft_cap, dropout_rate, dropout_seeds, layer, site)
