"""Text to text: a model reads one row and writes another, whose tokens are predicted one after the other.

    L = - sum_t w_t log p(y_t | y_1 .. y_{t-1}, x) / sum_t w_t

over the whole batch, for inputs x and targets y that an objective makes of its rows. There are two ways to lay them
out, of the same x and y:

    encoder_decoder    the encoder reads x; the decoder reads START y_1 .. y_{T-1}, and sees all of x
    decoder            one row x y, whose tokens x all see one another (a prefix LM); the last of x predicts y_1

Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
section 3.2.1 and figures 3 and 4.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from lmobj import masks
from lmobj.batch import Batch, RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import RowUse
from lmobj.noise import Denoised
from lmobj.objectives._causal_lm import check_token_loss, next_token_terms
from lmobj.objectives._objective import Context, Example, Models, Objective, Terms
from lmobj.objectives._tokens import hidden_states

__all__ = ["InputsToTargets", "Rooms", "TextToText", "end_token", "text_lengths", "written_states"]


class Rooms(NamedTuple):
    """Static lengths of what is made of a row."""

    inputs: int
    targets: int
    joined: int
    """Both in one row; their sum, or less where none is longest with the other."""


@dataclass(frozen=True)
class InputsToTargets(Objective, abc.ABC):
    """Base of the objectives that make inputs and targets of rows, each of them closed by the end token.

    A subclass implements `rows`, `raw_length`, `rooms` and `denoise`.
    """

    fills_spans: ClassVar[bool] = False
    """Whether targets are the spans that sentinels of the inputs stand for."""
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = ""
    """Selects the objective."""
    rendering: Literal["encoder_decoder", "decoder"] = "encoder_decoder"
    """`encoder_decoder`: an encoder reads the inputs, of `data.length` tokens, and a decoder writes the targets;
    `decoder`: one model does both, and inputs and targets together have `data.length` tokens."""
    decoder_start: Literal["pad", "bos", "eos"] = "pad"
    """What a decoder beside an encoder reads first: the padding token (T5), <s>, or </s> (BART)."""
    label_smoothing: float = 0.0
    """Share of the target's probability spread evenly over the whole vocabulary, in [0, 1) (the Transformer: 0.1)."""
    z_loss: float = 0.0
    """Factor of logsumexp(logits)^2, at least 0 (T5 1.1: 1e-4)."""

    def __post_init__(self) -> None:
        for key, accepted in (
            ("rendering", ("encoder_decoder", "decoder")),
            ("decoder_start", ("pad", "bos", "eos")),
        ):
            if getattr(self, key) not in accepted:
                raise UserError(f"objective.{key} is {getattr(self, key)!r}; accepted: {', '.join(accepted)}.")
        check_token_loss(self.label_smoothing, self.z_loss)

    @abc.abstractmethod
    def raw_length(self, length: int) -> int:
        """Tokens of the rows that are read for `data.length` tokens of model input."""

    @abc.abstractmethod
    def rooms(self, raw_length: int) -> Rooms:
        """Room for what is made of rows of so many tokens."""

    @abc.abstractmethod
    def denoise(self, keys: Key[Array, " B"], batch: Batch, vocab: Vocabulary) -> Denoised:
        """Inputs and targets of each row, in the `rooms` of its length."""

    def around(self, vocab: Vocabulary) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The special tokens before and after a text that is given for inputs: the end token alone, where it is
        otherwise not told."""
        return (), (end_token(vocab, self.name),)

    def use(self, length: int) -> RowUse:
        """The inputs, and the targets beside or after them."""
        rooms = self.rooms(self.raw_length(length))
        if self.rendering == "decoder":
            return RowUse(rooms.joined, rooms.targets)
        return RowUse(rooms.inputs, rooms.targets, decoder_length=rooms.targets)

    def start(self, vocab: Vocabulary) -> int:
        """The token that the decoder reads first."""
        token = getattr(vocab, self.decoder_start)
        if token is None:
            raise UserError(
                f"objective.decoder_start is {self.decoder_start}, and the vocabulary has no such token; accepted: "
                "another one, or a tokenizer with it."
            )
        return int(token)

    def corrupt(self, keys: Key[Array, " B"], batch: Batch, ctx: Context) -> Example:
        """Inputs and targets, laid out as `rendering` says."""
        found = self.denoise(keys, batch, ctx.vocab)
        written = (jnp.arange(found.targets.shape[1]) < found.target_length[:, None]).astype(jnp.int32)
        if self.rendering == "decoder":
            return _joined(found, written, self.rooms(batch["tokens"].shape[1]).joined)
        read = (jnp.arange(found.inputs.shape[1]) < found.input_length[:, None]).astype(jnp.int32)
        first = jnp.full_like(found.targets[:, :1], self.start(ctx.vocab))
        return Example(
            inputs=found.inputs,
            targets=found.targets,
            weights=written.astype(jnp.float32),
            mask=masks.bidirectional().packed(read),
            decoder_inputs=jnp.concatenate([first, found.targets[:, :-1]], axis=1),
            decoder_mask=masks.causal().packed(written),
            cross_mask=masks.bidirectional().packed(written, read),
        )

    def terms(self, models: Models, example: Example, carried: Any, ctx: Context) -> Terms:
        """`nll`: the sum of losses over the targets, with label smoothing and z-loss where they are set."""
        model = models["model"]
        states = written_states(model, example, ctx)
        return next_token_terms(
            model, states, example, label_smoothing=self.label_smoothing, z_loss=self.z_loss, carried=carried
        )


@dataclass(frozen=True)
class TextToText(InputsToTargets, abc.ABC):
    """Base of those that make both of one text.

    A subclass implements `raw_length`, `rooms` and `denoise`.
    """

    documents: Literal["joined", "isolated"] = "joined"
    """`joined`: a row goes on from one document to the next, as in T5; `isolated`: it is a piece of one document."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.documents not in ("joined", "isolated"):
            raise UserError(f"objective.documents is {self.documents!r}; accepted: joined, isolated.")

    def rows(self, vocab: Vocabulary, length: int) -> RowSpec:
        """Rows of `raw_length` tokens; refuses a vocabulary without what the decoder reads first."""
        self.start(vocab)
        return RowSpec("packed" if self.documents == "joined" else "single", self.raw_length(length))


def written_states(model: Any, example: Example, ctx: Context) -> Float[Array, "B T D"]:
    """The hidden states that predict the targets, by an encoder with a decoder or by one model.

    Raises:
      UserError: the model is not of the kind that the example is laid out for.
    """
    if example.decoder_inputs is None:
        return example.at_predictions(hidden_states(model, example, ctx))
    if not hasattr(model, "encode"):
        raise UserError(
            f"objective.rendering is encoder_decoder, and {type(model).__name__}, which model.name gives, is no "
            "encoder with a decoder; set model.name to encoder_decoder, or the rendering to decoder."
        )
    encoded = model.encode(example.inputs, mask=example.mask, dropout=ctx.dropout)
    return model.decode(
        example.decoder_inputs,
        encoded,
        mask=example.decoder_mask,
        cross_mask=example.cross_mask,
        dropout=ctx.dropout,
    )


def end_token(vocab: Vocabulary, name: str) -> int:
    """What inputs and targets of the objective `name` end with."""
    if vocab.eos is None:
        raise UserError(
            f"objective {name} ends inputs and targets with an end-of-sequence token, and the vocabulary has none; set "
            "a tokenizer with one."
        )
    return vocab.eos


def text_lengths(batch: Batch) -> Int[Array, " B"]:
    """Tokens of each row that are no padding."""
    return jnp.sum(batch["segment_ids"] > 0, axis=1, dtype=jnp.int32)


def _joined(found: Denoised, written: Int[Array, "B T"], width: int) -> Example:
    """Rows of `width` tokens: the inputs and, right after them, the targets."""
    at, read = jnp.arange(width), found.input_length[:, None]
    inputs = jnp.take_along_axis(found.inputs, jnp.broadcast_to(at, (len(read), width)), axis=1, mode="clip")
    targets = jnp.take_along_axis(found.targets, at - read, axis=1, mode="clip")
    segments = (at < read + found.target_length[:, None]).astype(jnp.int32)
    row = jnp.where(at < read, inputs, targets)
    return Example(
        inputs=jnp.where(segments > 0, row, 0),
        targets=found.targets,
        weights=written.astype(jnp.float32),
        mask=masks.prefix(at < read).packed(segments),
        predict=jnp.clip(read - 1 + jnp.arange(written.shape[1]), 0, width - 1),
    )
