"""Freezing: the first layers, and the embeddings, stay as they are.

Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.3, whose gradual
unfreezing is a sequence of such settings; Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer
Fine-Tuning", which trains the last quarter of the layers.

Frozen layers run as a stack of their own, so that with frozen embeddings the backward pass ends above them: they cost
no gradient, and nothing of them is kept for one. Of an encoder-decoder the first layers of both stay as they are; its
decoder's lie on the way to the encoder's that learn, so the backward pass goes through them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lmobj.adapt._adapted import Adapted, at_least, children
from lmobj.adapt._marks import mark
from lmobj.errors import UserError
from lmobj.models._block import Call, KVCache, Stack
from lmobj.models._encoder import Embeddings
from lmobj.models._layers import Embedding

__all__ = ["Freeze", "PartlyFrozenStack"]

_OUTPUT_TABLE, _EMBEDDING_NORM = "head", "/embedding_norm"


@dataclass(frozen=True)
class Freeze:
    """Training of all but the lowest parts of a model."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["freeze"] = "freeze"
    """The model itself, but for its first layers."""
    layers: int = 0
    """How many of the first layers stay as they are, at least 0; of an encoder-decoder, in each of the two."""
    embeddings: bool = True
    """Whether the tables that are read by index, positions' too, and the norm over their sum, stay as they are; tied
    output tables with them."""

    def __post_init__(self) -> None:
        at_least(self, 0, "layers")
        if not (self.layers or self.embeddings):
            raise UserError(
                "adapter.layers is 0 and adapter.embeddings is false, so nothing is frozen; set one, or leave "
                "the adapter out."
            )

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Marks the model's parameters, and parts its stacks of layers, in place."""
        mark(model, True)
        places = list(children(model))
        if self.embeddings:
            for path, _, module in places:
                table = isinstance(module, Embedding) and path != _OUTPUT_TABLE
                if table or isinstance(module, Embeddings) or path.endswith(_EMBEDDING_NORM):
                    mark(module, False)
        if not self.layers:
            return
        stacks = [place for place in places if isinstance(place[2], Stack)]
        if not stacks:
            raise UserError(
                f"adapter.layers is {self.layers}, and the layers of {type(model).__name__} cannot be parted; "
                "accepted: 0, or a decoder, an encoder, both in one, or an ELECTRA pair."
            )
        for path, parent, stack in stacks:
            setattr(parent, path.rsplit("/", 1)[-1], self._frozen(stack))

    def _frozen(self, stack: Stack) -> Stack:
        """The stack with its first layers frozen."""
        spec = stack.spec
        if self.layers > spec.layers:
            raise UserError(f"adapter.layers is {self.layers}, and the model has {spec.layers}; accepted: up to that.")
        if self.layers == spec.layers:
            mark(stack, False)
            return stack
        if spec.share_layers or spec.moe is not None:
            why = "one block is all its layers" if spec.share_layers else "its routers are judged in one stack"
            raise UserError(f"adapter.layers is {self.layers}, and {why}; accepted: 0, or all {spec.layers}.")
        return PartlyFrozenStack(stack, self.layers)


class PartlyFrozenStack(Adapted, Stack):
    """A stack whose first layers are another one, which is not trained."""

    def __init__(self, base: Stack, layers: int) -> None:
        rest = _part(base, slice(layers, None), layers=base.spec.layers - layers, first=base.first + layers)
        self.frozen = _part(base, slice(0, layers), layers=layers, first=base.first)
        self.spec, self.blocks, self.first = rest.spec, rest.blocks, rest.first
        mark(self.frozen, False)

    def merged(self) -> Stack:
        """One stack."""
        stack: Stack = nnx.clone(self.frozen)
        stack.spec = dataclasses.replace(self.spec, layers=self.frozen.spec.layers + self.spec.layers)
        graphdef, first = nnx.split(self.frozen.blocks)
        rest = nnx.state(self.blocks)
        joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), nnx.to_pure_dict(first), nnx.to_pure_dict(rest))
        stack.blocks = nnx.merge(graphdef, joined)
        return stack

    def _run(
        self, x: Float[Array, "B L D"], call: Call, *, collect: bool = False, last: int = 1
    ) -> tuple[tuple[Array, ...], Any]:
        (x,), first = self.frozen._run(x, call, collect=collect)
        states, rest = super()._run(x, call, collect=collect, last=last)
        return states, jnp.concatenate([first, rest]) if collect else None

    def step(self, x: Float[Array, "B T D"], call: Call, cache: KVCache) -> tuple[Float[Array, "B T D"], KVCache]:
        """The last block's output for new tokens, and the cache with them added."""
        x, cache = self.frozen.step(x, call, cache)
        return super().step(x, call, cache)

    def cross_cache(self, encoded: Float[Array, "B S D"]) -> KVCache:
        """Keys and values of an encoder's output in every layer's attention over it."""
        first, rest = self.frozen.cross_cache(encoded), super().cross_cache(encoded)
        return KVCache(*(jnp.concatenate(parts, axis=1) for parts in zip(first, rest, strict=True)))


def _part(base: Stack, part: slice, *, layers: int, first: int) -> Stack:
    """Some layers of a stack as a stack."""
    stack: Stack = nnx.clone(base)
    graphdef, state = nnx.split(base.blocks)
    stack.blocks = nnx.merge(graphdef, jax.tree.map(lambda x: x[part], state))
    stack.spec, stack.first = dataclasses.replace(base.spec, layers=layers), first
    return stack
