"""Prompt tuning: P learnt vectors before the text, at the input of the first layer.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", section 2. The text sees the prompt; the
prompt sees itself in both directions, and no text. So packed documents stay independent of one another, each with
the same prompt before it, and a causal model's prompt is the paper's but for its looking ahead within itself. Of an
encoder-decoder it is the encoder that reads one, as the paper's T5.

Deviations: in a bidirectional model the paper's prompt sees the text, and a decoder sees what its encoder makes of the
prompt. The prompt stands behind the embeddings with their positions and norm, so that tokens keep their positions and a
row its full length; rotary models do not rotate it, and relative positions add no bias to it. It begins with normal
values; the paper also tries vectors of words.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NoReturn

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import Adapted, at_least, children, positive, trained
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._block import Call, Stack
from lmobj.models._layers import normal

__all__ = ["Prompt", "PromptedStack"]

_PROMPT = -1
"""Segment of the prompt's queries: no token's."""


@dataclass(frozen=True)
class Prompt:
    """Learnt vectors before the text."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["prompt"] = "prompt"
    """Vectors before the text (prompt tuning)."""
    length: int = 20
    """P, at least 1."""
    init_std: float = 0.02
    """Standard deviation of the initial prompt, above 0."""

    def __post_init__(self) -> None:
        at_least(self, 1, "length")
        positive(self, "init_std")

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts a prompt before each stack of a model that reads no encoder, in place."""
        stacks = (place for place in children(model) if isinstance(place[2], Stack))
        places = [place for place in stacks if not place[2].spec.cross_attention]
        if not places or any(stack.spec.moe is not None for _, _, stack in places):
            raise UserError(
                f"adapter.name is prompt, and the layers of {type(model).__name__} cannot take one; accepted: a "
                "decoder or an encoder without experts, both in one, or an ELECTRA pair."
            )
        for path, parent, stack in places:
            setattr(parent, path.rsplit("/", 1)[-1], PromptedStack(stack, self, rngs))


class PromptedStack(Adapted, Stack):
    """A stack that reads the prompt before every row, and gives back the row's positions alone."""

    def __init__(self, base: Stack, config: Prompt, rngs: nnx.Rngs) -> None:
        self.spec, self.first, self.blocks = base.spec, base.first, base.blocks
        prompt = normal(config.init_std)(rngs.params(), (config.length, base.spec.width), base.spec.param_dtype)
        self.prompt = trained(prompt, (None, "embed"))

    def _run(
        self, x: Float[Array, "B L D"], call: Call, *, collect: bool = False, last: int = 1
    ) -> tuple[tuple[Array, ...], Any]:
        P = self.prompt.shape[0]
        prompt = jnp.broadcast_to(self.prompt[...].astype(x.dtype), (x.shape[0], P, x.shape[2]))
        rotary = call.rotary
        if rotary is not None:
            cos, sin = (jnp.pad(part, ((0, 0), (P, 0), (0, 0), (0, 0))) for part in rotary)
            rotary = cos.at[:, :P].set(1), sin
        call = call._replace(
            mask=_with_prompt(call.mask, x.shape[:2], P),
            positions=jnp.pad(call.positions, ((0, 0), (P, 0))),
            rotary=rotary,
            bias=None if call.bias is None else jnp.pad(call.bias, ((0, 0), (0, 0), (P, 0), (P, 0))),
        )
        longer = jnp.concatenate([prompt, x], axis=1)
        states, collected = super()._run(longer, call, collect=collect, last=last)
        return tuple(x[:, P:] for x in states), collected[:, :, P:] if collect else None

    def step(self, *_: Any) -> NoReturn:
        """Refuses: a cache has no room for the prompt."""
        raise UserError(
            "adapter.name is prompt, which decoding with a cache does not know; accepted: decoding without one, or "
            "adapter.name=prefix."
        )

    def merged(self) -> Stack:
        """Refuses: no weight of a stack is a position of its own."""
        raise UserError(
            "adapter.name is prompt, whose vectors are no token's: they cannot be folded into the model's weights; "
            "accepted: the adapted model as it is, or lora, dora, adalora or ia3."
        )


def _with_prompt(mask: AttentionMask, shape: tuple[int, ...], length: int) -> AttentionMask:
    """The mask of rows that begin with a prompt: memory to the text, which the prompt's own queries alone see.

    They stand at -P, ..., -1 along the keys of the text, before all of it, and belong to no document.
    """
    segments = jnp.ones(shape, jnp.int32) if mask.segment_ids is None else mask.segment_ids
    return dataclasses.replace(
        mask,
        memory=jnp.ones((shape[0], length), bool),
        query_offset=jnp.int32(-length),
        segment_ids=jnp.pad(segments, ((0, 0), (length, 0)), constant_values=_PROMPT),
        key_segment_ids=segments,
    )
