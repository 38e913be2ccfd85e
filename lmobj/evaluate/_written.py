"""What an encoder with a decoder writes: targets for sources, by the sampling and the beam search of causal models.

    generated = write_targets(model, sources, BeamConfig(), start=vocab.pad, eos=vocab.eos, length=128)

Sources are read in batches of alike length; which of them share a batch changes neither tokens nor draws.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key
from numpy.typing import ArrayLike

from lmobj import masks
from lmobj.errors import UserError
from lmobj.evaluate._beam_search import BeamConfig, beam_search
from lmobj.evaluate._cached import Generated
from lmobj.evaluate._decoding import DecodingConfig, check_prompts, pad_rows, sample_keys
from lmobj.evaluate._sampling import SamplingConfig, sample
from lmobj.evaluate._written_scores import Words
from lmobj.models import Cache, EncoderDecoderModel, OutputHead

__all__ = ["WritingConfig", "write_targets"]

_LEAST_WIDTH = 16
"""Of the rows of a batch, which are as long as the longest source, rounded up to a power of two."""


@dataclass(frozen=True)
class WritingConfig:
    """How an encoder with a decoder writes targets, and how those of held-out text are scored."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    decoding: DecodingConfig = field(default_factory=BeamConfig)
    """Beam search or sampling (greedy with temperature 0), one target for each source; its `max_new_tokens` is
    `objective.target_length`. The defaults are those of Vaswani et al. 2017: 4 beams, length penalty 0.6."""
    examples: int | None = None
    """Most examples of a split whose targets are written and scored, its first ones; null: all, 0: none."""
    words: Words = "13a"
    """What BLEU counts, by sacrebleu's names: `13a`: words of languages with spaces (WMT); `intl`: the same by Unicode;
    `zh`: Chinese characters, and words; `char`: characters; `none`: what stands between spaces. ROUGE counts the same,
    but with `13a` its own words of a-z and 0-9, stemmed for English."""

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "num_samples"):
            value = getattr(self.decoding, key)
            if value != getattr(type(self.decoding)(), key):
                ours = "objective.target_length says that" if key == "max_new_tokens" else "one target for each source"
                raise UserError(f"writing.decoding.{key} is {value}; accepted: no such key: {ours}.")
        if self.examples is not None and self.examples < 0:
            raise UserError(f"writing.examples is {self.examples}; accepted: 0 or more, or null for all.")
        if self.words not in get_args(Words):
            raise UserError(f"writing.words is {self.words!r}; accepted: {', '.join(get_args(Words))}.")


def write_targets(
    model: EncoderDecoderModel,
    sources: Sequence[ArrayLike],
    settings: DecodingConfig,
    *,
    start: int,
    eos: int | None,
    length: int,
    batch_size: int = 32,
    done: Callable[[int], None] = lambda count: None,
) -> Generated:
    """Writes a target for each source; returns host arrays of S sources x N samples x at most `max_new_tokens` tokens.

    What is drawn for a source depends on the seed and on its tokens, not on its place among others.

    Compiles once per (model structure, width and number of rows, settings, start, eos). Widths are powers of two from
    16 on, and `length`; numbers are powers of two, and `batch_size`.

    Args:
      model: an NNX module that is an `EncoderDecoderModel`.
      sources: S one-dimensional arrays of token ids as the encoder reads them, each of 1 to `length` tokens.
      settings: sampling (greedy with temperature 0) or beam search.
      start: the token that the decoder reads first.
      eos: the token that ends a target; None: every target has `max_new_tokens` tokens.
      length: most tokens of a source.
      batch_size: sources that are read at a time.
      done: is told after each batch how many targets are written.

    Raises:
      UserError: a model of another kind; no source, one without tokens, with more than `length` or with ids outside the
        vocabulary, an `eos` outside it, or targets longer than the model allows.
    """
    if not isinstance(model, EncoderDecoderModel):
        raise UserError(
            f"model is {type(model).__name__}, which does not read one text and write another; targets can be written "
            "by an encoder with a decoder."
        )
    rows = [np.asarray(source) for source in sources]
    check_prompts(model, rows, eos)
    lengths = np.array([len(row) for row in rows], np.int32)
    if lengths.max() > length:
        raise UserError(f"source {lengths.argmax()} has {lengths.max()} tokens; accepted: at most {length}.")
    samples, seed = settings.num_samples, 0
    if isinstance(settings, SamplingConfig):
        seed = settings.seed
        settings = dataclasses.replace(settings, seed=0)  # so that another seed does not compile again
    addresses = np.array([zlib.crc32(row.astype("<i4").tobytes()) for row in rows], np.uint32)
    keys = sample_keys(seed, addresses, samples).reshape(len(rows), samples)
    graphdef, state = nnx.split(model)
    size = min(batch_size, _power_of_two(len(rows)))
    order = np.argsort(-lengths, kind="stable")
    parts = []
    for first in range(0, len(order), size):
        chosen = order[first : first + size]
        filled = np.pad(chosen, (0, size - len(chosen)), mode="edge")
        width = min(length, max(_LEAST_WIDTH, _power_of_two(int(lengths[chosen[0]]))))
        tokens = pad_rows([rows[number] for number in filled], width)
        found = jax.device_get(_write(graphdef, state, tokens, lengths[filled], keys[filled], settings, start, eos))
        parts.append(Generated(*(x[: len(chosen)] for x in found)))
        done(first + len(chosen))
    places = np.argsort(order)
    written: Generated = jax.tree.map(lambda *x: np.concatenate(x)[places], *parts)
    return written


def _power_of_two(number: int) -> int:
    """The least that is not below a number."""
    return 1 << (number - 1).bit_length()


@functools.partial(jax.jit, static_argnums=(0, 5, 6, 7))
def _write(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    sources: Int[Array, "B S"],
    lengths: Int[Array, " B"],
    keys: Key[Array, "B N"],
    settings: DecodingConfig,
    start: int,
    eos: int | None,
) -> Generated:
    model = nnx.merge(graphdef, state)
    valid = jnp.arange(sources.shape[1]) < lengths[:, None]
    encoded = model.encode(sources, mask=masks.bidirectional().packed(valid.astype(jnp.int32)))
    rows, samples = len(sources), settings.num_samples
    if isinstance(settings, BeamConfig):
        first, ones = jnp.full((rows, 1), start, jnp.int32), jnp.ones(rows, jnp.int32)
        return beam_search(_Beside(model, encoded, valid), first, ones, settings=settings, eos=eos)
    encoded, valid = (jnp.repeat(x, samples, axis=0) for x in (encoded, valid))
    first, ones = jnp.full((rows * samples, 1), start, jnp.int32), jnp.ones(rows * samples, jnp.int32)
    drawn = sample(_Beside(model, encoded, valid), first, ones, keys.reshape(-1), settings=settings, eos=eos)
    return Generated(*(x.reshape(rows, samples, *x.shape[1:]) for x in drawn))


@dataclass(frozen=True)
class _Beside:
    """The decoder beside the sources of a batch: a `WritingModel` whose rows begin with the token `start`."""

    model: Any
    encoded: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]

    def init_cache(self, batch_size: int, length: int) -> Cache:
        """A cache of the rows that were encoded."""
        assert batch_size == len(self.encoded)
        return self.model.init_cache(self.encoded, self.valid, length)

    def step(
        self, tokens: Int[Array, "B T"], cache: Cache, positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The decoder's own."""
        hidden, cache = self.model.step(tokens, cache, positions)
        return hidden, cache

    def head_hidden(self, hidden: Float[Array, "... D"]) -> Float[Array, "... E"]:
        """The model's."""
        states: Float[Array, "... E"] = self.model.head_hidden(hidden)
        return states

    def head_table(self) -> OutputHead:
        """The model's."""
        head: OutputHead = self.model.head_table()
        return head
