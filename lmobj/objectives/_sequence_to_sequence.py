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
    """Most tokens of a target, its end included, at least 2. Null: as many as a source has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_length is not None and self.target_length < 2:
            raise UserError(
                f"objective.target_length is {self.target_length}; it must be at least 2: a token and the end of the "
                "text."
            )

    @property
    def task(self) -> Task | None:
        """Targets are written, and scored, by an encoder with a decoder."""
        return "sequence_to_sequence" if self.rendering == "encoder_decoder" else None

    def raw_length(self, length: int) -> int:
        """Room for a source and a target."""
        if self.rendering == "decoder":
            least = 4 if self.target_length is None else self.target_length + 2
            raw = length
        else:
            least, raw = 2, length + (self.target_length or length)
        if length < least:
            raise UserError(f"data.length is {length}; accepted: {least} or more tokens.")
        return raw

    def rooms(self, raw_length: int) -> Rooms:
        """As the settings say; half of the row for each where they say nothing."""
        targets = self.target_length or raw_length // 2
        return Rooms(raw_length - targets, targets, raw_length)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Source, end, target, end; refuses a vocabulary without an end token, or without what the decoder reads
        first."""
        self.start(vocab)
        raw = self.raw_length(length)
        suffix = (end_token(vocab, self.name),)
        return RowSpec("examples", raw, suffix=suffix, two_texts=True, second_length=self.rooms(raw).targets)

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
        rooms = self.rooms(tokens.shape[1])

        def text(kind: int, room: int) -> tuple[Int[Array, "B N"], Int[Array, " B"]]:
            inside = real & (types == kind)
            length = jnp.minimum(jnp.sum(inside, axis=1, dtype=jnp.int32), room)
            at = jnp.arange(room, dtype=jnp.int32)
            found = jnp.take_along_axis(tokens, jnp.argmax(inside, axis=1)[:, None] + at, axis=1, mode="clip")
            return jnp.where(at < length[:, None], found, 0), length

        return Denoised(*text(0, rooms.inputs), *text(1, rooms.targets))
