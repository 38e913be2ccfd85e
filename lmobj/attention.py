"""The one attention call. A backend that cannot honour what it is asked for raises; nothing is ever ignored.

    attention(q, k, v) = dropout(softmax(scale q k^T + bias where the mask allows)) v

Vaswani et al. 2017, "Attention Is All You Need", eq. 1; grouped queries as in Ainslie et al. 2023, "GQA".
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.noise import dropout

__all__ = ["AttentionBackend", "attention"]

AttentionBackend = Literal["xla", "cudnn"]

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
        bidirectional masks as such, and every other mask as booleans [B, 1, Q, S].
      scale: of the products of queries and keys; 1 / sqrt(Dh) by default.
      bias: added to the scaled logits before cap and mask (relative positions).
      soft_cap: logits become soft_cap * tanh(logits / soft_cap) (Gemma 2); None leaves them.
      dropout_rate: dropout of the probabilities, in [0, 1).
      dropout_seeds: one seed per row; None switches dropout off.
      layer: index of the layer, for dropout.
      site: which attention of the layer this is, for dropout; two attentions of a layer need two sites.

    Raises:
      ValueError: shapes that do not fit one another, or something that the backend cannot honour.
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
    scale = 1 / math.sqrt(width) if scale is None else scale
    if dropout_seeds is None:
        dropout_rate = 0.0
    if backend == "cudnn":
        _refuse_for_cudnn(q, mask, bias, soft_cap, dropout_rate)
        return _cudnn(q, k, v, mask, scale)
    if backend != "xla":
        raise ValueError(f"attention: the backend is {backend!r}; it must be 'xla' or 'cudnn'.")
    return _xla(q, k, v, mask, scale, bias, soft_cap, dropout_rate, dropout_seeds, layer, site)


def _xla(
    q: Float[Array, "B Q H Dh"],
    k: Float[Array, "B S G Dh"],
    v: Float[Array, "B S G Dh"],
    mask: AttentionMask,
    scale: float,
    bias: Float[Array, "B_or_1 H Q S"] | None,
    soft_cap: float | None,
    dropout_rate: float,
    dropout_seeds: UInt32[Array, " B"] | None,
    layer: Int[Array, ""] | int,
    site: int,
) -> Float[Array, "B Q H Dh"]:
    """Attention by two batched matrix products. The R queries that share a key head are rows of one product.

    Keys are never repeated, and both products have one matrix per (row, key head) with nothing between: on CPU that is
    a sixth of a small model's whole step faster than leaving the axes where they are.
    """
    B, Q, H, width = q.shape
    S, G = k.shape[1:3]
    R = H // G
    precise = jnp.promote_types(q.dtype, jnp.float32)
    q_BxGxRQxDh = q.reshape(B, Q, G, R, width).transpose(0, 2, 3, 1, 4).reshape(B, G, R * Q, width)
    k_BxGxSxDh, v_BxGxSxDh = k.swapaxes(1, 2), v.swapaxes(1, 2)
    logits = jnp.einsum("bgqd,bgsd->bgqs", q_BxGxRQxDh, k_BxGxSxDh, preferred_element_type=precise)
    logits = logits.reshape(B, H, Q, S) * scale
    if bias is not None:
        logits = logits + bias.astype(precise)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    allowed = mask.dense(Q, S)
    probabilities = jax.nn.softmax(jnp.where(allowed, logits, jnp.finfo(precise).min), axis=-1)
    if mask.may_be_empty:
        probabilities = jnp.where(allowed, probabilities, 0)
    probabilities = probabilities.astype(v.dtype)
    if dropout_seeds is not None and dropout_rate > 0:
        probabilities = dropout(probabilities, dropout_rate, dropout_seeds, layer=layer, site=site)
    y = jnp.einsum("bgqs,bgsd->bgqd", probabilities.reshape(B, G, R * Q, S), v_BxGxSxDh)
    return y.reshape(B, G, R, Q, width).transpose(0, 3, 1, 2, 4).reshape(B, Q, H, width)


def _refuse_for_cudnn(
    q: Float[Array, "B Q H Dh"],
    mask: AttentionMask,
    bias: Float[Array, "B_or_1 H Q S"] | None,
    soft_cap: float | None,
    dropout_rate: float,
) -> None:
    """Raises UserError for what cuDNN's flash attention, as jax exposes it, cannot do."""
    if bias is not None:
        raise UserError("model.attention_backend: 'cudnn' takes no bias here and the model has one; use 'xla'.")
    if mask.may_be_empty:
        raise UserError(
            "model.attention_backend: 'cudnn' cannot give zeros to a token that sees nothing, as the first of a "
            "permutation does; use 'xla'."
        )
    if dropout_rate > 0:
        raise UserError(
            f"model.attention_backend: 'cudnn' cannot drop out attention probabilities and attention dropout is "
            f"{dropout_rate}; set it to 0, or use 'xla'."
        )
    if soft_cap is not None:
        raise UserError(
            f"model.attention_backend: 'cudnn' cannot cap logits and the soft cap is {soft_cap}; set it to null, "
            "or use 'xla'."
        )
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise UserError(
            f"model.attention_backend: 'cudnn' computes in bfloat16 or float16 and the inputs are {q.dtype}; set "
            "model.dtype to bfloat16, or use 'xla'."
        )
    if q.shape[3] % 8 or q.shape[3] > 128:
        raise UserError(
            f"model.attention_backend: 'cudnn' needs a head width that is a multiple of 8 and at most 128, and it is "
            f"{q.shape[3]}; change the width or the number of heads, or use 'xla'."
        )
    if jax.default_backend() != "gpu":
        raise UserError(
            f"model.attention_backend: 'cudnn' runs on NVIDIA GPUs and jax runs on {jax.default_backend()}; use 'xla'."
        )


def _cudnn(
    q: Float[Array, "B Q H Dh"],
    k: Float[Array, "B S G Dh"],
    v: Float[Array, "B S G Dh"],
    mask: AttentionMask,
    scale: float,
) -> Float[Array, "B Q H Dh"]:
    """Flash attention. Only masks that cuDNN knows by themselves are passed as flags; any other one as booleans."""
    Q, S = q.shape[1], k.shape[1]
    arrays = (mask.is_prefix, mask.segment_ids, mask.query_offset, mask.query_rank, mask.memory)
    by_flags = all(array is None for array in arrays) and Q == S
    if not by_flags and (Q % 2 or S % 2):
        raise UserError(
            f"model.attention_backend: 'cudnn' needs even lengths with a mask of packed segments, prefixes, ranks, a "
            f"memory or a cache, and the lengths are {Q} and {S}; make them even, or use 'xla'."
        )
    window = None if mask.window is None else (mask.window - 1, 0)  # cuDNN's left bound excludes the token itself
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=None if by_flags else mask.dense(Q, S),
        scale=scale,
        is_causal=mask.causal and by_flags,
        local_window_size=window if by_flags else None,
        implementation="cudnn",
    )
