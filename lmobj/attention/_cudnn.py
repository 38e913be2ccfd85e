"""Flash attention of cuDNN, through `jax.nn.dot_product_attention`: what it honours, and what it is refused for.

What jax 0.10 and 0.11 hand to cuDNN decides the limits (`jax._src.cudnn.fused_attention_stablehlo`):

- bfloat16 and float16. A head is a multiple of 8 wide, at most 128 (256 from Hopper on, which is not relied on).
- Causal masks, and windows with them, are flags of the kernel, which then skips what is masked. A boolean mask becomes
  a bias [B, 1, Q, S] of large negative numbers, in memory and without skipping; lengths must then be even to train.
- A bias is added to the scaled logits, as here, rounded to the dtype of the inputs; it has a gradient.
- The kernel can drop out probabilities, with a generator of its own; jax's public call has no such argument, and that
  noise would depend on the layout of the batch. There is no soft cap.
- jax cuts the call over rows and heads by itself. A cut over length is an error there.
- The packed layout of cuDNN (offsets of segments) has no public call, so packed rows go as a boolean mask.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lmobj.attention._flash import platform, refuse_for_flash
from lmobj.errors import UserError
from lmobj.masks import AttentionMask

__all__ = ["cudnn_attention", "refuse_for_cudnn"]


def refuse_for_cudnn(
    q: Float[Array, "B Q H Dh"],
    mask: AttentionMask,
    soft_cap: float | None,
    dropout_rate: float,
) -> None:
    """Raises UserError for what cuDNN's flash attention, as jax exposes it, cannot do."""
    if mask.may_be_empty:
        raise UserError(
            "model.attention_backend: 'cudnn' cannot give zeros to a token that sees nothing, as the first of a "
            "permutation does; use 'xla'."
        )
    refuse_for_flash("cudnn", dropout_rate)
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
    if platform() not in ("gpu", "cuda"):
        raise UserError(
            f"model.attention_backend: 'cudnn' runs on NVIDIA GPUs and jax runs on {platform()}; use 'xla'."
        )


def cudnn_attention(
    q: Float[Array, "B Q H Dh"],
    k: Float[Array, "B S G Dh"],
    v: Float[Array, "B S G Dh"],
    mask: AttentionMask,
    scale: float,
    bias: Float[Array, "B_or_1 H Q S"] | None,
) -> Float[Array, "B Q H Dh"]:
    """Flash attention. Only masks that cuDNN knows by themselves are passed as flags; any other one as booleans."""
    Q, S = q.shape[1], k.shape[1]
    arrays = (mask.is_prefix, mask.segment_ids, mask.query_offset, mask.query_rank, mask.memory)
    by_flags = all(array is None for array in arrays) and Q == S
    if (bias is not None or not by_flags) and (Q % 2 or S % 2):
        raise UserError(
            f"model.attention_backend: 'cudnn' needs even lengths with a bias, or a mask of packed segments, prefixes, "
            f"ranks, a memory or a cache, and the lengths are {Q} and {S}; make them even, or use 'xla'."
        )
    window = None if mask.window is None else (mask.window - 1, 0)  # cuDNN's left bound excludes the token itself
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=None if bias is None else bias.astype(q.dtype),
        mask=None if by_flags else mask.dense(Q, S),
        scale=scale,
        is_causal=mask.causal and by_flags,
        local_window_size=window if by_flags else None,
        implementation="cudnn",
    )
