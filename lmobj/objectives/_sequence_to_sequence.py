"""Sequence to sequence: write the second of two texts, such as a translation or a summary, from the first.

    L = - sum_t w_t sum_v q_v log p(v | y_1 .. y_{t-1}, x) / sum_t w_t,   q_v = (1 - epsilon) [v = y_t] + epsilon / V

over the whole batch, for pairs of a source x and a target y, both closed by the end token, which is predicted too.

Source: Sutskever et al. 2014, "Sequence to Sequence Learning with Neural Networks"; Vaswani et al. 2017, "Attention Is
All You Need", section 5.4, for the smoothing of labels, and Szegedy et al. 2016, "Rethinking the Inception Architecture
for Computer Vision", section 7, for its formula.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.noise import Denoised
from lmobj.objectives._objective import Task
from lmobj.objectives._text_to_text import InputsToTargets, Rooms, end_token

__all__ = ["SequenceToSequence"]


@dataclass(frozen=True)
class SequenceToSequence(InputsToTargets):
    """The second of two texts (`data.source.pair`) from the first: translation, summaries, and whatever maps texts.

    An example is a row. A source has up to `data.length` tokens and a target up to `target_length`, the end token of
    each included; what is longer loses its last tokens, each text by itself, and how many do is printed.

    Metrics: `nll` (nats per token of the targets, ends included) and `accuracy`, both with the true target before each
    token. `lmobj eval` has the model write the targets too, and scores them with BLEU, chrF and ROUGE.
    """

    summary: ClassVar[str] = "Write the second of two texts from the first (translation, summaries)."
    paper: ClassVar[str] = "Vaswani et al. 2017, Attention Is All You Need"

    name: Literal["sequence_to_sequence"] = "sequence_to_sequence"
    """Write the second of two texts from the first."""
    target_length: int | None = None
    """Most tokens of a target, what opens and ends it included, at least 2 (3 with `open_texts`). Null: as many as a
    source has."""
    open_texts: bool = False
    """Whether sources and targets begin with <s>, as BART's do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_length is not None and self.target_length < self._least:
            raise UserError(
                f"objective.target_length is {self.target_length}; it must be at least {self._least}: a token and what "
                "stands around a text."
            )

    @property
    def task(self) -> Task | None:
        """Targets are written, and scored, by an encoder with a decoder."""
        return "sequence_to_sequence" if self.rendering == "encoder_decoder" else None

    def raw_length(self, length: int) -> int:
        """Room for a source and a target."""
        least, both = self._least, length
        if self.rendering == "decoder":
            least += self.target_length or least
        else:
            both += self.target_length or length
        if length < least:
            raise UserError(f"data.length is {length}; accepted: {least} or more tokens.")
        return both - 2 * self.open_texts

    def rooms(self, raw_length: int) -> Rooms:
        """As the settings say; half of the row for each where they say nothing."""
        both = raw_length + 2 * self.open_texts
        targets = self.target_length or both // 2
        return Rooms(both - targets, targets, both)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Source, end, target, end; refuses a vocabulary without what ends or opens a text, or what the decoder reads
        first."""
        self.start(vocab)
        raw, (_, suffix) = self.raw_length(length), self.around(vocab)
        second = self.rooms(raw).targets - self.open_texts
        return RowSpec("examples", raw, suffix=suffix, two_texts=True, second_length=second)

    def around(self, vocab: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The end token, and with `open_texts` <s> before a text."""
        suffix = (end_token(vocab, self.name),)
        if not self.open_texts:
            return (), suffix
        if vocab.bos is None:
            raise UserError(
                "objective.open_texts is true, and the vocabulary has no <s>; accepted: a tokenizer with it, or false."
            )
        return (vocab.bos,), suffix

    def check_model(self, settings: Any) -> None:
        """Refuses a model whose decoder does not write so many tokens."""
        most = getattr(settings, "max_length", None)
        if self.rendering == "encoder_decoder" and most is not None and (self.target_length or 0) > most:
            raise UserError(
                f"objective.target_length is {self.target_length} and model.max_length is {most}; raise that to at "
                f"least {self.target_length}."
            )

    def denoise(self, keys: Key[Array, " B"], batch: Batch, vocab: Vocabulary) -> Denoised:
        """Both texts of each row; nothing is random."""
        tokens, types, real = batch["tokens"], batch["token_types"], batch["segment_ids"] > 0
        rooms, (opening, _) = self.rooms(tokens.shape[1]), self.around(vocab)

        def text(kind: int, room: int) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
            inside = real & (types == kind)
            own = room - len(opening)
            count = jnp.minimum(jnp.sum(inside, axis=1, dtype=jnp.int32), own)
            places = jnp.argmax(inside, axis=1)[:, None] + jnp.arange(own, dtype=jnp.int32)
            found = jnp.take_along_axis(tokens, places, axis=1, mode="clip")
            first = jnp.tile(jnp.asarray(opening, tokens.dtype), (len(tokens), 1))
            length = jnp.where(count > 0, count + len(opening), 0)
            row = jnp.concatenate([first, found], axis=1)
            return jnp.where(jnp.arange(room) < length[:, None], row, 0), length

        return Denoised(*text(0, rooms.inputs), *text(1, rooms.targets))

    @property
    def _least(self) -> int:
        """Of the tokens of a text."""
        return 2 + self.open_texts
