"""Span corruption: write the tokens of a row that were replaced by sentinels, or all that follow a prefix.

    n = round(r R) tokens of noise in s = round(n / m) spans, of rows of R tokens
    inputs   the row, with a sentinel for each span                                         R - n + s + 1 tokens
    targets  the spans, with a sentinel for each run of the row between them                    n + s + 1 tokens

with the end token after both. R is the most that makes inputs of `data.length`, so that every row of R tokens fills
them exactly: 568 for 512, at r = 0.15 and m = 3, and targets of 114.

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
sections 3.1.4, 3.2 and 3.3, and the authors' `preprocessors.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
from jaxtyping import Array, Bool, Int, Key

from lmobj import noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.noise import Denoised
from lmobj.objectives._text_to_text import Rooms, TextToText, end_token, text_lengths

__all__ = ["PrefixLM", "SpanCorruption", "check_density", "noise_row_length", "sentinel_count", "sentinels_for"]


@dataclass(frozen=True)
class SpanCorruption(TextToText):
    """Spans or single tokens of a row, which sentinels stand for, by an encoder-decoder or a decoder (T5).

    With `noise: tokens` each token is noise by itself with probability `noise_density`; then R = `data.length` - 1, and
    the targets may be as long as the inputs. A row without noise has one sentinel for its target. Rows with more spans
    than the vocabulary has sentinels count nothing, and so do rows of one token.

    Metrics: `nll` (nats per token of the targets, sentinels and end included) and `accuracy`.
    """

    summary: ClassVar[str] = "Write the spans of a text that sentinels stand for (T5)."
    paper: ClassVar[str] = (
        "Raffel et al. 2020, Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer"
    )
    fills_spans: ClassVar[bool] = True

    name: Literal["span_corruption"] = "span_corruption"
    """Write the spans that sentinels stand for."""
    noise: Literal["spans", "tokens"] = "spans"
    """`spans`: noise comes in spans, and its amount is exact; `tokens`: each token by itself."""
    noise_density: float = 0.15
    """Share of the tokens that are noise, above 0 and below 1."""
    mean_span: float = 3.0
    """Average tokens of a span, at least 1. Of `spans` alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise not in ("spans", "tokens"):
            raise UserError(f"objective.noise is {self.noise!r}; accepted: spans, tokens.")
        check_density(self.noise_density, self.mean_span)

    def raw_length(self, length: int) -> int:
        """The most tokens whose inputs, or inputs and targets in one row, have `length`."""
        joined = self.rendering == "decoder"
        if self.noise == "spans":
            return noise_row_length(length, self.noise_density, self.mean_span, joined=joined)
        raw = length // 2 - 1 if joined else length - 1
        if raw < 2:
            raise UserError(f"data.length is {length}; accepted: {6 if joined else 3} tokens or more.")
        return raw

    def rooms(self, raw_length: int) -> Rooms:
        """Exactly what rows of so many tokens make, or with `tokens` the most that they can."""
        if self.noise == "tokens":  # noise and other tokens by turns: a sentinel for each, and both ends
            return Rooms(raw_length + 1, raw_length + 1, 2 * raw_length + 2)
        inputs, targets = noise.span_corruption_lengths(raw_length, self.noise_density, self.mean_span)
        return Rooms(inputs, targets, inputs + targets)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows of R tokens; refuses a vocabulary with fewer sentinels than spans, or without an end token."""
        end_token(vocab, self.name)
        vocab.require_sentinels(f"objective {self.name}", self._sentinels(self.raw_length(length)))
        return super().rows(vocab, length)

    def denoise(self, keys: Key[Array, " B"], batch: Batch, vocab: Vocabulary) -> Denoised:
        """Draws each row's noise, and puts sentinels for it."""
        raw = batch["tokens"].shape[1]
        rooms = self.rooms(raw)

        def one(key: Key[Array, ""], tokens: Int[Array, " R"], length: Int[Array, ""]) -> Denoised:
            return sentinels_for(tokens, self._noise(key, length, raw), length, rooms, vocab, self.name)

        return jax.vmap(one)(keys, batch["tokens"], text_lengths(batch))

    def _noise(self, key: Key[Array, ""], length: Int[Array, ""], raw: int) -> Bool[Array, " R"]:
        if self.noise == "tokens":
            return noise.noise_tokens_iid(key, length, max_length=raw, noise_density=self.noise_density)
        return noise.noise_spans(
            key, length, max_length=raw, noise_density=self.noise_density, mean_span=self.mean_span
        )

    def _sentinels(self, raw: int) -> int:
        """How many rows need. Of `tokens` nearly all rows: the mean of their spans and four standard deviations."""
        if self.noise == "spans":
            return sentinel_count(raw, self.noise_density, self.mean_span)
        spans = raw * self.noise_density * (1 - self.noise_density)  # a bound of their variance, too
        return min(math.ceil(spans + 4 * math.sqrt(spans)), -(-raw // 2))


@dataclass(frozen=True)
class PrefixLM(TextToText):
    """The rest of a row, from a prefix of random length that is seen from both sides (T5's prefix language modelling).

    The prefix has U{max(1, round((1 - 2 d)(R - 1))) .. R - 1} tokens of a row of R: with d = 0.5 any number. Both parts
    have the end token after them. Rows of one token count nothing.
    """

    summary: ClassVar[str] = "Write how a text goes on after a prefix that is read from both sides (prefix LM)."
    paper: ClassVar[str] = SpanCorruption.paper

    name: Literal["prefix_lm"] = "prefix_lm"
    """Write how a text goes on after a prefix."""
    noise_density: float = 0.5
    """Average share of the tokens that are to be written, above 0 and below 1; above 0.5 as 0.5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_density(self.noise_density, 1.0)

    def raw_length(self, length: int) -> int:
        """`length`, or two less where inputs and targets share a row."""
        raw = length - 2 if self.rendering == "decoder" else length
        if raw < 2:
            raise UserError(
                f"data.length is {length}; prefix_lm reads 2 tokens or more, and at least {length + 2 - raw}."
            )
        return raw

    def rooms(self, raw_length: int) -> Rooms:
        """The longest prefix and the longest rest."""
        rest = raw_length - noise.shortest_prefix(raw_length, self.noise_density)
        return Rooms(raw_length, rest + 1, raw_length + 2)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows to cut in two; refuses a vocabulary without an end token."""
        end_token(vocab, self.name)
        return super().rows(vocab, length)

    def denoise(self, keys: Key[Array, " B"], batch: Batch, vocab: Vocabulary) -> Denoised:
        """Cuts each row in two."""
        rooms, eos = self.rooms(batch["tokens"].shape[1]), end_token(vocab, self.name)

        def one(key: Key[Array, ""], tokens: Int[Array, " R"], length: Int[Array, ""]) -> Denoised:
            prefix = noise.split_prefix(key, length, noise_density=self.noise_density)
            return noise.prefix_inputs_targets(
                tokens, prefix, length, input_room=rooms.inputs, target_room=rooms.targets, eos=eos
            )

        return jax.vmap(one)(keys, batch["tokens"], text_lengths(batch))


def check_density(noise_density: float, mean_span: float, key: str = "objective") -> None:
    """Refuses spans that no row can have."""
    if not 0 < noise_density < 1:
        raise UserError(
            f"{key}.noise_density is {noise_density}, which leaves nothing to "
            f"{'see' if noise_density >= 1 else 'write'}; it must be above 0 and below 1."
        )
    if not mean_span >= 1:
        raise UserError(f"{key}.mean_span is {mean_span}; it is the average number of tokens in a span, at least 1.")


def noise_row_length(length: int, noise_density: float, mean_span: float, *, joined: bool) -> int:
    """`noise.raw_length_for`, whose `length` is data.length."""
    least = 6 if joined else 3
    if length < least:
        raise UserError(f"data.length is {length}; span corruption makes rows of {least} tokens or more.")
    return noise.raw_length_for(length, noise_density, mean_span, joined=joined)


def sentinel_count(raw_length: int, noise_density: float, mean_span: float) -> int:
    """Sentinels in the inputs, and in the targets, of a row of so many tokens."""
    inputs, targets = noise.span_corruption_lengths(raw_length, noise_density, mean_span)
    return (inputs + targets - raw_length) // 2 - 1


def sentinels_for(
    tokens: Int[Array, " R"],
    hidden: Bool[Array, " R"],
    length: Int[Array, ""],
    rooms: Rooms,
    vocab: Vocabulary,
    name: str,
) -> Denoised:
    """`noise.sentinel_inputs_targets` of the vocabulary's sentinels."""
    return noise.sentinel_inputs_targets(
        tokens,
        hidden,
        length,
        first_sentinel=vocab.require_sentinels(f"objective {name}", 1),
        num_sentinels=len(vocab.sentinels),
        input_room=rooms.inputs,
        target_room=rooms.targets,
        eos=end_token(vocab, name),
    )
