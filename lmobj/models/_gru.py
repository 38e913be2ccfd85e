"""The GRU language model of the older literature: embedding, a stack of GRU layers, tied output table.

Cho et al. 2014, "Learning Phrase Representations using RNN Encoder-Decoder", in the variant that cuDNN and PyTorch
compute, with the reset gate after the recurrent product:

    r = sigmoid(W_r x + b_r + U_r h + c_r)
    z = sigmoid(W_z x + b_z + U_z h + c_z)
    n = tanh(W_n x + b_n + r * (U_n h + c_n))
    h' = (1 - z) * n + z * h

Dropout is on what enters the first layer and on what leaves each layer, never on the recurrence (Zaremba et al. 2014,
"Recurrent Neural Network Regularization").
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.masks import AttentionMask
from lmobj.models._block import EMBEDDING, HIDDEN_AXES, drop
from lmobj.models._heads import HeadStyle
from lmobj.models._layers import DTypeName, Embedding, Linear, output_head, pad_vocabulary, uniform
from lmobj.models._protocol import OutputHead, RowUse
from lmobj.models._settings import at_least, check_rates, resolve_dtype
from lmobj.partition import constrain, mesh_axes

__all__ = ["GRUConfig", "GRULanguageModel"]

LAYER_OUT = 1
"""Dropout site of a layer's output."""


@dataclass(frozen=True)
class GRUConfig:
    """A GRU language model: the embedding is as wide as the layers, so that it can be tied."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["gru"] = "gru"
    """Stacked GRU; causal masks only."""
    layers: int = 2
    """Number of layers, at least 1."""
    width: int = 512
    """Width of embedding and states, at least 1."""
    tie_embeddings: bool = True
    """Whether the output table is the token embedding."""
    dropout: float = 0.0
    """Dropout rate of each layer's output, in [0, 1)."""
    embedding_dropout: float = 0.0
    """Dropout rate of the embeddings, in [0, 1)."""
    vocab_multiple: int = 128
    """The embedding's rows are padded up to a multiple of this, so that they divide over devices."""
    init_range: float = 0.1
    """Initial embeddings are uniform in [-init_range, init_range]; layers use 1 / sqrt(width), as PyTorch does."""
    dtype: DTypeName = "float32"
    """Dtype of the computation; states are kept in float32 at least."""
    param_dtype: DTypeName = "float32"
    """Dtype of the parameters."""

    def __post_init__(self) -> None:
        at_least(self, 1, "layers", "width", "vocab_multiple")
        check_rates(self, "dropout", "embedding_dropout")
        if self.init_range <= 0:
            raise UserError(f"model.init_range is {self.init_range}; it must be above 0.")

    def build(self, vocab: Vocabulary, rngs: nnx.Rngs) -> GRULanguageModel:
        """A GRU language model with fresh parameters."""
        return GRULanguageModel(self, vocab, rngs)

    def forward_flops(self, vocab_size: int, use: RowUse) -> float:
        """Operations of a forward pass over one row (`CountsProducts`)."""
        return 2 * self.width * (use.length * self.layers * 6 * self.width + use.predictions * vocab_size)


class GRULayer(nnx.Module):
    """One layer over time. Kernels hold the gates r, z, n side by side."""

    def __init__(self, width: int, *, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        init = uniform(1 / math.sqrt(width))

        def gates(axes: tuple[str | None, None]) -> Linear:
            return Linear(width, 3 * width, axes=axes, init=init, bias=True, param_dtype=param_dtype, rngs=rngs)

        self.input = gates(("embed", None))
        self.recurrent = gates((None, None))  # whole on each device: it is read at every time step

    def __call__(
        self,
        x: Float[Array, "B L D"],
        state: Float[Array, "B D"],
        starts: Bool[Array, "B L"],
        ignored: Bool[Array, "B L"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B D"]]:
        """States after each token, and the last one.

        The state is zero before a token that `starts` a document, and stays as it was at `ignored` tokens.
        """

        def step(h: Array, at_t: tuple[Array, Array, Array | None]) -> tuple[Array, Array]:
            from_input, start, ignore = at_t
            previous = jnp.where(start[:, None], 0, h)
            from_state = self.recurrent(previous.astype(x.dtype)).astype(h.dtype)
            r_x, z_x, n_x = jnp.split(from_input.astype(h.dtype), 3, axis=-1)
            r_h, z_h, n_h = jnp.split(from_state, 3, axis=-1)
            update = jax.nn.sigmoid(z_x + z_h)
            candidate = jnp.tanh(n_x + jax.nn.sigmoid(r_x + r_h) * n_h)
            new = (1 - update) * candidate + update * previous
            if ignore is not None:
                new = jnp.where(ignore[:, None], h, new)
            return new, new.astype(x.dtype)

        by_time = (self.input(x).swapaxes(0, 1), starts.T, None if ignored is None else ignored.T)
        state, outputs = jax.lax.scan(step, state, by_time)
        return outputs.swapaxes(0, 1), state


class GRULanguageModel(nnx.Module):
    """A stacked GRU. The state restarts at every document of a packed row, so documents do not see one another."""

    def __init__(self, config: GRUConfig, vocab: Vocabulary, rngs: nnx.Rngs) -> None:
        rows = pad_vocabulary(vocab.size, config.vocab_multiple)
        param_dtype = resolve_dtype(config.param_dtype, "param_dtype")
        self.config = config
        self.vocab_size = vocab.size
        self.dtype = resolve_dtype(config.dtype, "dtype")

        def table() -> Embedding:
            init = uniform(config.init_range)
            return Embedding(rows, config.width, axes=("vocab", "embed"), init=init, param_dtype=param_dtype, rngs=rngs)

        def layer(key: Array) -> GRULayer:
            return GRULayer(config.width, param_dtype=param_dtype, rngs=nnx.Rngs(params=key))

        self.tokens = table()
        self.layers = nnx.vmap(layer)(jax.random.split(rngs.params(), config.layers))
        self.head = None if config.tie_embeddings else table()

    def hidden(
        self,
        tokens: Int[Array, "B L"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B L"] | None = None,
        token_types: Int[Array, "B L"] | None = None,
        dropout: UInt32[Array, " B"] | None = None,
    ) -> Float[Array, "B L D"]:
        """Outputs of the last layer. `positions` are not read: a recurrence knows the order already.

        Raises:
          ValueError: the mask is anything but causal, packed or not, or `token_types` are given.
        """
        _refuse(mask, token_types)
        segments = jnp.zeros_like(tokens) if mask.segment_ids is None else mask.segment_ids
        starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
        states = jnp.zeros((self.config.layers, tokens.shape[0], self.config.width), self._state_dtype())
        return self._run(tokens, states, starts, None, dropout)[0]

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """The identity: nothing stands between the trunk and the table."""
        return hidden

    def head_table(self) -> OutputHead:
        """The token embedding where it is tied, else a table of its own."""
        return output_head(self.tokens if self.head is None else self.head, self.vocab_size)

    @property
    def head_style(self) -> HeadStyle:
        """What heads on the hidden states take over; a GRU has no activation or norm to give, so those are GPT-2's."""
        param_dtype = resolve_dtype(self.config.param_dtype, "param_dtype")
        init = uniform(1 / math.sqrt(self.config.width))
        return HeadStyle(self.config.width, "gelu", 1e-5, init, param_dtype)

    def init_cache(self, batch_size: int, length: int) -> Float[Array, "B n D"]:
        """The layers' states before any token; `length` is not limited."""
        return jnp.zeros((batch_size, self.config.layers, self.config.width), self._state_dtype())

    def step(
        self, tokens: Int[Array, "B T"], cache: Float[Array, "B n D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B n D"]]:
        """Outputs for new tokens given the states in the cache, and the states after them.

        Position 0 starts from zero; -1 marks padding after a row's last token, which leaves the states as they are.
        """
        y, states = self._run(tokens, cache.swapaxes(0, 1), positions == 0, positions < 0, None)
        return y, states.swapaxes(0, 1)

    def _run(
        self,
        tokens: Int[Array, "B L"],
        states: Float[Array, "n B D"],
        starts: Bool[Array, "B L"],
        ignored: Bool[Array, "B L"] | None,
        dropout: UInt32[Array, " B"] | None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "n B D"]]:
        """Every layer, from embeddings to the last one's outputs and all layers' states."""
        if mesh_axes("length"):
            raise UserError(
                f"model.name is gru, which reads a row token by token, and the mesh cuts rows over "
                f"{', '.join(mesh_axes('length'))}; set train.mesh.sequence=1."
            )
        graphdef, params = nnx.split(self.layers)
        config = self.config

        def body(x: Array, layer: tuple[nnx.State, Array, Array]) -> tuple[Array, Array]:
            param, index, state = layer
            y, state = nnx.merge(graphdef, param)(x, state, starts, ignored)
            return constrain(drop(y, config.dropout, dropout, index, LAYER_OUT), HIDDEN_AXES), state

        x = constrain(self.tokens(tokens, self.dtype), HIDDEN_AXES)
        x = drop(x, config.embedding_dropout, dropout, 0, EMBEDDING)
        return jax.lax.scan(body, x, (params, jnp.arange(config.layers), states))

    def _state_dtype(self) -> jnp.dtype:
        return jnp.promote_types(self.dtype, jnp.float32)


def _refuse(mask: AttentionMask, token_types: Array | None) -> None:
    """Raises UserError for what a recurrence cannot honour."""
    asked = {
        "a bidirectional mask": not mask.causal,
        "a window": mask.window is not None,
        "a visible prefix": mask.is_prefix is not None,
        "keys of another length": mask.key_segment_ids is not None or mask.query_offset is not None,
        "token types": token_types is not None,
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise UserError(
                f"model.name is gru, which reads left to right and cannot honour {what}; use an objective such as "
                "causal_lm, whose mask is causal, packed or not."
            )
