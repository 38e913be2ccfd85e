"""Denoising autoencoder: write a text anew from what steps of noise have left of it.

    text      <s> a b c . d e f . </s>
    permuted  <s> d e f . a b c . </s>
    inputs    <s> d [MASK] a b [MASK] . </s>
    targets   <s> a b c . d e f . </s>

The steps are, in this order, each by a rate of its own: sentences change places, spans of words are hidden, tokens are
inserted, the text begins at another token. The targets are the whole text.

Source: Lewis et al. 2020, "BART: Denoising Sequence-to-Sequence Pre-training for Natural Language Generation,
Translation, and Comprehension", section 2.2; where the paper is silent, fairseq's `denoising_dataset.py` and
`tasks/denoising.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from lmobj import noise
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.noise import Denoised, NoisedRow
from lmobj.objectives._text_to_text import Rooms, TextToText, text_lengths

__all__ = ["DenoisingAutoencoder"]

Marks = Mapping[str, Bool[Array, " N"]]
"""What is known of a text's tokens, by the names of `lmobj.batch`."""


@dataclass(frozen=True)
class DenoisingAutoencoder(TextToText):
    """A text from its sentences in another order and with spans of words hidden, by an encoder-decoder (BART).

    The defaults are those of the paper's large model: all sentences change places, and 30% of the words are hidden in
    spans of Poisson(3) words, each replaced by one [MASK]. The released one is reported to have `mean_span: 3.5` and
    `random_share: 0.1`. The paper's other kinds of noise:

        token masking     permute_rate: 0, unit: tokens, mean_span: null
        token deletion    permute_rate: 0, unit: tokens, mean_span: null, replace: delete
        text infilling    permute_rate: 0
        sentences         mask_rate: 0
        rotation          permute_rate: 0, mask_rate: 0, rotate_rate: 1

    A row is R = `data.length` - 2 tokens of one document, as many fewer as `insert_rate` adds, between <s> and </s>,
    which no step moves; the decoder writes both. Rows without text count nothing. Insertions for which the inputs have
    no room are left out.

    Metrics: `nll` (nats per token of the targets, of which most can be read off the inputs) and `accuracy`.

    Words are those of `data.segment.words`. Deviation: sentences are those of `data.segment.sentences`, where fairseq
    goes by full stops, and a row may end inside one, where fairseq's blocks hold whole lines.
    """

    summary: ClassVar[str] = "Write a text anew from a noised copy: sentences moved, spans hidden (BART)."
    paper: ClassVar[str] = "Lewis et al. 2020, BART: Denoising Sequence-to-Sequence Pre-training"

    name: Literal["denoising_autoencoder"] = "denoising_autoencoder"
    """Write a text anew from a noised copy."""
    decoder_start: Literal["pad", "bos", "eos"] = "eos"
    """What a decoder beside an encoder reads first: </s> (BART), <s>, or the padding token."""
    documents: Literal["joined", "isolated"] = "isolated"
    """`isolated`: a row is a piece of one document, as in BART; `joined`: it goes on from one to the next."""
    permute_rate: float = 1.0
    """Share of the sentences of a row that change places among themselves, in [0, 1]."""
    mask_rate: float = 0.3
    """Share of the words, or tokens, of a row that are hidden at most, rounded up; in [0, 1)."""
    unit: Literal["words", "tokens"] = "words"
    """What `mask_rate` and `mean_span` count."""
    mean_span: float | None = 3.0
    """Mean of the Poisson lengths of hidden spans, above 0 and at most 16: a span of none inserts a mask. Null: each is
    one word, or token."""
    replace: Literal["span", "token", "delete"] = "span"
    """What stands for a span: `span`: one [MASK]; `token`: one for each of its tokens; `delete`: nothing."""
    random_share: float = 0.0
    """Share of the spans, and of the insertions, that are random tokens in the place of [MASK], in [0, 1]."""
    insert_rate: float = 0.0
    """Tokens inserted for each of the row after that, rounded up; in [0, 1]."""
    rotate_rate: float = 0.0
    """Share of the rows that begin at another token, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, accepted in (("unit", ("words", "tokens")), ("replace", ("span", "token", "delete"))):
            if getattr(self, key) not in accepted:
                raise UserError(f"objective.{key} is {getattr(self, key)!r}; accepted: {', '.join(accepted)}.")
        rates = ("permute_rate", "mask_rate", "insert_rate", "rotate_rate")
        for key in (*rates, "random_share"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"objective.{key} is {getattr(self, key)}; it must be from 0 to 1.")
        if self.mask_rate == 1:
            raise UserError("objective.mask_rate is 1, which leaves nothing to read; it must be below 1.")
        if not any(getattr(self, key) for key in rates):
            raise UserError(
                f"objective.{', '.join(rates)} are all 0, which leaves the text as it is; one must be above 0."
            )
        if self.mean_span is not None and not 0 < self.mean_span <= noise.LONGEST_MEAN:
            raise UserError(
                f"objective.mean_span is {self.mean_span}; it must be above 0 and at most {noise.LONGEST_MEAN:g}, or "
                "null for spans of one word."
            )

    def raw_length(self, length: int) -> int:
        """The most tokens whose inputs, or inputs and targets in one row, have `length`."""

        def size(raw: int) -> int:
            rooms = self.rooms(raw)
            return rooms.joined if self.rendering == "decoder" else rooms.inputs

        if length < size(2):
            raise UserError(f"data.length is {length}; two tokens of text need at least {size(2)}.")
        return next(raw for raw in range(length, 1, -1) if size(raw) <= length)

    def rooms(self, raw_length: int) -> Rooms:
        """The text between <s> and </s>, and of the inputs with what is inserted."""
        whole = raw_length + 2
        inputs = whole + math.ceil(whole * self.insert_rate)
        return Rooms(inputs, whole, inputs + whole)

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows of R tokens; refuses a vocabulary without <s>, </s> or [MASK], and rates that hide whole rows."""
        self._specials(vocab)
        spec = super().rows(vocab, length)
        hidden = math.ceil(spec.length * self.mask_rate)
        if hidden >= spec.length:
            raise UserError(
                f"objective.mask_rate {self.mask_rate} hides {hidden} of the {spec.length} tokens of text in a row of "
                f"data.length {length} and leaves none to read; lower objective.mask_rate or raise data.length."
            )
        return RowSpec(spec.layout, spec.length, fields=self._fields)

    def around(self, vocab: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """<s> and </s>, as around the text of a row."""
        bos, eos, _ = self._specials(vocab)
        return (bos,), (eos,)

    def denoise(self, keys: Key[Array, " B"], batch: Batch, vocab: Vocabulary) -> Denoised:
        """Takes each row through the steps, between <s> and </s>."""
        rooms = self.rooms(batch["tokens"].shape[1])
        bos, eos, _ = self._specials(vocab)
        at = jnp.arange(rooms.targets)
        # A gather, because XLA loses a token of a padded row that is spread over devices.
        inside = jnp.clip(at - 1, 0, rooms.targets - 3)

        def one(key: Key[Array, ""], tokens: Int[Array, " R"], length: Int[Array, ""], marks: Marks) -> Denoised:
            text = jnp.where(at == 0, bos, jnp.where(at == length + 1, eos, tokens[inside]))
            whole = noise.whole_row(text, jnp.where(length > 0, length + 2, 0), room=rooms.inputs)
            row = self.noised(key, whole, {name: each[inside] for name, each in marks.items()}, vocab)
            return Denoised(row.tokens, row.length, whole.tokens[: rooms.targets], whole.length)

        marks = {name: batch[name] for name in self._fields}
        return jax.vmap(one)(keys, batch["tokens"], text_lengths(batch), marks)

    def noised(self, key: Key[Array, ""], row: NoisedRow, marks: Marks, vocab: Vocabulary) -> NoisedRow:
        """The text after the steps, of which those with a rate of 0 are left out.

        Args:
          key: the row's.
          row: the text with <s> and </s>.
          marks: `word_starts` and `sentence_ends` of its tokens, where the steps ask for them.
          vocab: of the text.
        """
        permute_key, infill_key, insert_key, rotate_key = jax.random.split(key, 4)
        *_, mask = self._specials(vocab)
        fillers: dict[str, Any] = {"mask_id": mask, "vocab_size": vocab.size, "random_share": self.random_share}
        if self.permute_rate:
            row = noise.permute_sentences(permute_key, row, marks["sentence_ends"], rate=self.permute_rate)
        if self.mask_rate:
            starts = marks["word_starts"] if self.unit == "words" else jnp.ones_like(row.tokens, bool)
            spans: dict[str, Any] = {"mean_span": self.mean_span, "replace": self.replace}
            row = noise.infill_spans(infill_key, row, starts, mask_rate=self.mask_rate, **spans, **fillers)
        if self.insert_rate:
            count = noise.ceil_share(row.length, self.insert_rate)
            row = noise.insert_tokens(insert_key, row, count, **fillers)
        if self.rotate_rate:
            row = noise.rotate_row(rotate_key, row, rate=self.rotate_rate)
        return row

    @property
    def _fields(self) -> tuple[str, ...]:
        """What the steps need to know of the text's tokens."""
        words = self.mask_rate > 0 and self.unit == "words"
        return ("word_starts",) * words + ("sentence_ends",) * (self.permute_rate > 0)

    def _specials(self, vocab: Vocabulary) -> tuple[int, ...]:
        return vocab.require(f"objective {self.name}", "bos", "eos", "mask")
