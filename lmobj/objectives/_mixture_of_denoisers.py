"""Mixture of denoisers: each row is corrupted by one of several denoisers, and says by its first token which.

    R  regular       spans of 3 or 8 tokens, a share of 0.15
    S  sequential    everything after a prefix, a share of 0.25
    X  extreme       spans of 3 or 8 tokens, a share of 0.5; spans of 64, a share of 0.15 or 0.5

    inputs   [MODE] the row, with a sentinel for each span </s>       (S: [MODE] prefix <extra_id_0> </s>)
    targets  the spans, with a sentinel for each run between them </s>            (S: <extra_id_0> rest </s>)

The denoiser is drawn for each row by itself, so a batch holds all of them, in arrays of one static shape.

Source: Tay et al. 2022, "UL2: Unifying Language Learning Paradigms", section 3.1 and table 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from lmobj import noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.noise import Denoised
from lmobj.objectives._span_corruption import check_density, sentinel_count, sentinels_for
from lmobj.objectives._text_to_text import Rooms, TextToText, end_token, text_lengths

__all__ = ["Denoiser", "MixtureOfDenoisers"]

Mark = Literal["nlu", "s2s", "nlg"]


@dataclass(frozen=True)
class Denoiser:
    """One way to corrupt a row, and its share of the rows."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    noise_density: float = 0.15
    """Share of the tokens that are to be written, above 0 and below 1; with a prefix the average, and above 0.5 as
    0.5."""
    mean_span: float | None = 3.0
    """Average tokens of a span, at least 1; null: one span, which is all that follows a prefix of random length."""
    mark: Mark | None = None
    """Mode token before the inputs: `nlu` [NLU], `s2s` [S2S] or `nlg` [NLG]; null: none."""
    weight: float = 1.0
    """Share of the rows, relative to the others; above 0."""

    def __post_init__(self) -> None:
        check_density(self.noise_density, 1.0 if self.mean_span is None else self.mean_span, "objective.denoisers")
        if self.mark not in (None, "nlu", "s2s", "nlg"):
            raise UserError(f"objective.denoisers.mark is {self.mark!r}; accepted: nlu, s2s, nlg, null.")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"objective.denoisers.weight is {self.weight}; it must be a finite number above 0.")

    def raw_length(self, length: int, *, joined: bool) -> int:
        """The most tokens whose inputs, or with `joined` inputs and targets, have at most `length`."""
        if length < self.least(joined=joined):
            raise UserError(f"data.length is {length}; accepted: {self.least(joined=joined)} or more tokens.")
        length -= self.mark is not None
        if self.mean_span is not None:
            return noise.raw_length_for(length, self.noise_density, self.mean_span, joined=joined)
        return length - (4 if joined else 1)  # sentinel and end once, for a token that the inputs lack, or twice

    def least(self, *, joined: bool) -> int:
        """The least `data.length`, which holds rows of two tokens."""
        return (6 if joined else 3) + (self.mark is not None)

    def rooms(self, raw_length: int) -> Rooms:
        """The most that inputs and targets of rows of so many tokens have."""
        mark = int(self.mark is not None)
        if self.mean_span is not None:
            inputs, targets = noise.span_corruption_lengths(raw_length, self.noise_density, self.mean_span)
            return Rooms(mark + inputs, targets, mark + inputs + targets)
        rest = raw_length - noise.shortest_prefix(raw_length, self.noise_density)
        return Rooms(mark + raw_length + 1, rest + 2, mark + raw_length + 4)


_UL2 = (
    Denoiser(0.15, 3.0, "nlu"),
    Denoiser(0.15, 8.0, "nlu"),
    Denoiser(0.25, None, "s2s"),
    Denoiser(0.5, 3.0, "nlg"),
    Denoiser(0.5, 8.0, "nlg"),
    Denoiser(0.15, 64.0, "nlg"),
    Denoiser(0.5, 64.0, "nlg"),
)


@dataclass(frozen=True)
class MixtureOfDenoisers(TextToText):
    """Rows corrupted by denoisers drawn with the chances that their weights give, by an encoder-decoder or a decoder.

    As in UL2 each denoiser's inputs fill `data.length`. So denoisers read rows of different lengths; as all rows of a
    batch have the same, that of the longest, a row is read as far as its denoiser goes and the rest is left out. Rows
    of one token count nothing.

    `lmobj fill` takes the mode token as part of the text: "[S2S] It was a dark <extra_id_0>".

    Metrics: `nll` (nats per token of the targets, sentinels and end included) and `accuracy`.
    """

    summary: ClassVar[str] = "Write spans, long spans or the rest of a text, as a mode token says (UL2)."
    paper: ClassVar[str] = "Tay et al. 2022, UL2: Unifying Language Learning Paradigms"
    fills_spans: ClassVar[bool] = True

    name: Literal["mixture_of_denoisers"] = "mixture_of_denoisers"
    """Write spans, long spans or the rest of a text, as a mode token says."""
    denoisers: tuple[Denoiser, ...] = _UL2
    """The denoisers, at least one; by default UL2's seven."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.denoisers:
            raise UserError("objective.denoisers is empty; accepted: one or more denoisers.")

    def raw_length(self, length: int) -> int:
        """What the denoiser reads that reads most."""
        return max(self._raw_lengths(length))

    def rooms(self, raw_length: int) -> Rooms:
        """The most that any denoiser makes of what it reads of such rows."""
        rooms = [one.rooms(raw) for one, raw in zip(self.denoisers, self._read(raw_length), strict=True)]
        return Rooms(*(max(sizes) for sizes in zip(*rooms, strict=True)))

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows for the longest denoiser; refuses a vocabulary without their marks, or with too few sentinels."""
        who = f"objective {self.name}"
        end_token(vocab, self.name)
        vocab.require(who, *dict.fromkeys(one.mark for one in self.denoisers if one.mark is not None))
        spans = [
            1 if one.mean_span is None else sentinel_count(raw, one.noise_density, one.mean_span)
            for one, raw in zip(self.denoisers, self._raw_lengths(length), strict=True)
        ]
        vocab.require_sentinels(who, max(spans))
        return super().rows(vocab, length)

    def around(self, vocab: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the first denoiser of prefixes has around one, so that the text is gone on with; the end token alone
        where there is no such denoiser."""
        before, after = super().around(vocab)
        for one in self.denoisers:
            if one.mean_span is None:
                mark = () if one.mark is None else vocab.require(f"objective {self.name}", one.mark)
                return mark, (vocab.require_sentinels(f"objective {self.name}", 1), *after)
        return before, after

    def denoise(self, keys: Key[Array, " B"], batch: Batch, vocab: Vocabulary) -> Denoised:
        """Draws each row's denoiser, then its noise."""
        raw = batch["tokens"].shape[1]
        rooms = self.rooms(raw)
        marks = [0 if one.mark is None else vocab.require(self.name, one.mark)[0] for one in self.denoisers]
        read, mark = jnp.asarray(self._read(raw), jnp.int32), jnp.asarray(marks, batch["tokens"].dtype)
        density = jnp.asarray([one.noise_density for one in self.denoisers], jnp.float32)
        span = jnp.asarray([one.mean_span or 1.0 for one in self.denoisers], jnp.float32)
        is_prefix = jnp.asarray([one.mean_span is None for one in self.denoisers])
        marked = jnp.asarray([one.mark is not None for one in self.denoisers])

        def one(key: Key[Array, ""], tokens: Int[Array, " R"], length: Int[Array, ""]) -> Denoised:
            which_key, noise_key = jax.random.split(key)
            k = self._draw(which_key)
            length = jnp.minimum(length, read[k])
            spans = noise.noise_spans(noise_key, length, max_length=raw, noise_density=density[k], mean_span=span[k])
            prefix = noise.split_prefix(noise_key, length, noise_density=density[k])
            hidden = jnp.where(is_prefix[k], jnp.arange(raw) >= prefix, spans)
            found = sentinels_for(tokens, hidden, length, rooms, vocab, self.name)
            return _opened(found, mark[k], marked[k])

        return jax.vmap(one)(keys, batch["tokens"], text_lengths(batch))

    def _draw(self, key: Key[Array, ""]) -> Int[Array, ""]:
        """The place of a denoiser among them."""
        shares = np.cumsum([one.weight for one in self.denoisers])
        drawn = jax.random.uniform(key, dtype=jnp.float32)
        return jnp.sum(drawn >= jnp.asarray(shares[:-1] / shares[-1], jnp.float32), dtype=jnp.int32)

    def _raw_lengths(self, length: int) -> list[int]:
        """Tokens that each denoiser reads for `data.length`."""
        return [one.raw_length(length, joined=self.rendering == "decoder") for one in self.denoisers]

    def _read(self, raw_length: int) -> list[int]:
        """Tokens that each denoiser reads of rows of so many: as many as for the `data.length` that such rows are for.

        That is the least whose longest denoiser reads them all.
        """
        joined = self.rendering == "decoder"
        low = max(one.least(joined=joined) for one in self.denoisers)
        high = max(low, 3 * raw_length)  # a token, and a sentinel and a mark or an end for it
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.raw_length(middle) < raw_length else (low, middle)
        return [min(raw, raw_length) for raw in self._raw_lengths(low)]


def _opened(found: Denoised, mark: Any, marked: Any) -> Denoised:
    """The row with its mode token before the inputs, which have room for it."""
    put = marked & (found.input_length > 0)
    moved = jnp.concatenate([mark[None], found.inputs[:-1]])
    return found._replace(
        inputs=jnp.where(put, moved, found.inputs), input_length=found.input_length + put.astype(jnp.int32)
    )
