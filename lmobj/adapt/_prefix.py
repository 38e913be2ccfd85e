"""Prefix tuning: every layer's attention finds P learnt keys and values before those of the text.

    softmax(q [P_k; k]^T / sqrt(Dh)) [P_v; v]        P_k, P_v in R^{P x heads x Dh}

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", section 4.2; Liu et al. 2022,
"P-Tuning v2", for encoders. Every token of every document in a row sees the prefix, which takes no place in the row;
prefix keys have no position, so rotary models do not rotate them and relative positions add no bias to them. A decoder
with an encoder has prefixes of its own in attention over that, as in the authors' code for BART. No prefix leaves a
model's function as it was, not even at first.

Deviation: the prefix is trained as it is, without the feed-forward network that Li and Liang make it by in training
and P-Tuning v2 finds to be no gain in general.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import Adapted, at_least, axes_of, children, positive, trained
from lmobj.errors import UserError
from lmobj.models._attention import Attention, CrossAttention, MultiHead, Seen
from lmobj.models._layers import normal

__all__ = ["Prefix", "PrefixAttention", "PrefixCrossAttention"]


@dataclass(frozen=True)
class Prefix:
    """Learnt keys and values in every layer."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["prefix"] = "prefix"
    """Keys and values before the text in every layer (prefix tuning)."""
    length: int = 10
    """P, at least 1."""
    init_std: float = 0.02
    """Standard deviation of the initial prefix, above 0."""

    def __post_init__(self) -> None:
        at_least(self, 1, "length")
        positive(self, "init_std")

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts prefixes into a model, in place."""
        places = [place for place in children(model) if isinstance(place[2], MultiHead)]
        if not places:
            raise UserError(
                f"adapter.name is prefix, and {type(model).__name__} has no attention that takes one; accepted: a "
                "decoder, an encoder, both in one, or an ELECTRA pair."
            )
        for path, parent, attention in places:
            kind = PrefixCrossAttention if isinstance(attention, CrossAttention) else PrefixAttention
            setattr(parent, path.rsplit("/", 1)[-1], kind(attention, self, rngs))


class _Prefixed(Adapted, MultiHead):
    """Attention that sees the prefix and what it would see without it."""

    def __init__(self, base: MultiHead, config: Prefix, rngs: nnx.Rngs) -> None:
        self.spec = base.spec
        self.query, self.key, self.value, self.out = base.query, base.key, base.value, base.out
        *stacked, _, out = base.key.kernel.shape
        axes = (None, axes_of(base.key)[1])
        self.prefix_keys, self.prefix_values = (
            trained(normal(config.init_std)(rngs.params(), (*stacked, config.length, out), base.key.kernel.dtype), axes)
            for _ in range(2)
        )

    def extended(self, seen: Seen) -> Seen:
        """The prefix before keys and values, visible to every query."""

        def after(prefix: nnx.Param, x: Float[Array, "B S G Dh"]) -> Float[Array, "B K G Dh"]:
            rows = prefix[...].astype(x.dtype).reshape(1, -1, *x.shape[2:])
            return jnp.concatenate([jnp.broadcast_to(rows, (x.shape[0], *rows.shape[1:])), x], axis=1)

        P = self.prefix_keys.shape[0]
        visible = jnp.ones((seen.keys.shape[0], P), bool)
        bias = None if seen.bias is None else jnp.pad(seen.bias, ((0, 0), (0, 0), (0, 0), (P, 0)))
        keys, values = after(self.prefix_keys, seen.keys), after(self.prefix_values, seen.values)
        return Seen(keys, values, seen.mask.with_memory(visible), bias)

    def merged(self) -> MultiHead:
        """Refuses: attention has no weights of its own that keys come from without a token."""
        raise UserError(
            "adapter.name is prefix, whose keys and values are no token's: they cannot be folded into the model's "
            "weights; accepted: the adapted model as it is, or lora, dora, adalora or ia3."
        )


class PrefixAttention(_Prefixed, Attention):
    """Attention of rows over a prefix and themselves."""


class PrefixCrossAttention(_Prefixed, CrossAttention):
    """Attention of a decoder's rows over a prefix and an encoder's output."""
