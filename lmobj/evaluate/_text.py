"""Decoding with text at both ends: continue a prompt, fill the masks of a sentence, fill in the middle of a text."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from numpy.typing import NDArray

from lmobj._pieces import INFILLING_MARKS
from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._cached import Generated, check_reads_rows
from lmobj.evaluate._decoding import DecodingConfig, FilledMasks, fill_masks, generate
from lmobj.evaluate._unmasking import UnmaskingConfig
from lmobj.models import CachedModel, LanguageModel

__all__ = [
    "Continuation",
    "Filling",
    "Infilling",
    "InfillingOrder",
    "continuations",
    "continue_text",
    "fill_text",
    "infill_text",
    "infilling_tokens",
    "masked_tokens",
]


InfillingOrder = Literal["psm", "spm"]
"""What a model reads before it fills in a middle: `psm`: PRE before SUF after MID; `spm`: PRE SUF after MID before."""


class Continuation(NamedTuple):
    """One text that a model wrote after a prompt."""

    text: str
    """Without the prompt and without the end-of-sequence token."""
    tokens: NDArray[np.int32]
    """The generated tokens, the end-of-sequence token included."""
    log_probs: NDArray[np.floating]
    """ln p of each token under the model, in nats."""


class Filling(NamedTuple):
    """The guesses for one mask, or for the span that a sentinel stands for; most probable first."""

    pieces: list[str]
    probabilities: list[float]
    mark: str | None = None
    """The sentinel; None for a mask."""


class Infilling(NamedTuple):
    """A text whose middle a model wrote."""

    before: str
    middle: str
    after: str
    log_probs: NDArray[np.floating]
    """ln p of each token of the middle and of its end, in nats."""
    ended: bool
    """Whether the model came to an end, which says that the middle meets what is after it."""

    @property
    def text(self) -> str:
        """All of it."""
        return self.before + self.middle + self.after


def continue_text(
    model: CachedModel | LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: DecodingConfig | UnmaskingConfig,
    *,
    suffix: tuple[int, ...] = (),
) -> list[list[Continuation]]:
    """Continues each prompt; for every prompt the samples or beams, the best beam first.

    Args:
      model: a causal model; for unmasking, one that masked diffusion has trained.
      tokenizer: the model's.
      prompts: texts.
      settings: how to decode.
      suffix: tokens after each prompt, as after the first of two texts that a model was trained on.

    Raises:
      UserError: the model cannot generate, a prompt is empty, or the text outgrows the model.
    """
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    if not all(len(ids) for ids in encoded):
        raise UserError("the prompt is empty; accepted: a text of at least one character.")
    encoded = [np.concatenate([ids, np.array(suffix, np.int32)]) for ids in encoded]
    vocab = tokenizer.vocabulary
    return continuations(tokenizer, generate(model, encoded, settings, eos=vocab.eos, mask_id=vocab.mask))


def continuations(tokenizer: Tokenizer, generated: Generated) -> list[list[Continuation]]:
    """Generated rows [prompts, samples] with their texts."""
    results = []
    for tokens, log_probs, lengths in zip(generated.tokens, generated.log_probs, generated.lengths, strict=True):
        rows = zip(tokens, log_probs, lengths, strict=True)
        results.append([Continuation(tokenizer.decode(t[:n]), t[:n], p[:n]) for t, p, n in rows])
    return results


def fill_text(
    model: LanguageModel, tokenizer: Tokenizer, text: str, k: int = 5, *, framed: bool = True
) -> tuple[str, list[Filling]]:
    """Guesses each [MASK] of a text by itself.

    Spaces before a mask are part of what is guessed, because word pieces carry the space before them.

    Args:
      model: a model that sees both sides.
      tokenizer: the model's.
      text: with masks.
      k: guesses for each mask.
      framed: as for `masked_tokens`.

    Returns:
      The text with each mask filled by its most probable piece, and the k best pieces of each mask.

    Raises:
      UserError: the model reads no row by itself, the vocabulary has no mask, the text has none, or k is not in
        1..vocabulary size.
    """
    check_reads_rows(model)
    tokens, where = masked_tokens(tokenizer, text, framed=framed)
    size = tokenizer.vocabulary.size
    if not 1 <= k <= size:
        raise UserError(f"k is {k}; accepted: 1 to {size} guesses.")
    filled = _fill(*nnx.split(model), tokens, where, k)
    guesses, probabilities = np.asarray(filled.tokens[0]), np.asarray(filled.probabilities[0])
    fillings = [
        Filling([tokenizer.decode([i]) for i in ids], [float(p) for p in ps])
        for ids, ps in zip(guesses, probabilities, strict=True)
    ]
    tokens[0, where[0]] = guesses[:, 0]
    return tokenizer.decode(tokens[0]), fillings


def infill_text(
    model: CachedModel, tokenizer: Tokenizer, text: str, settings: DecodingConfig, *, order: InfillingOrder = "psm"
) -> list[Infilling]:
    """Writes what stands in the place of <fim_middle> in a text; the samples or beams, the best beam first.

    Args:
      model: a causal model that learned to fill in the middle.
      tokenizer: the model's.
      text: as for `infilling_tokens`.
      settings: how to decode.
      order: in which the model is asked.

    Raises:
      UserError: as for `infilling_tokens` and `generate`.
    """
    prompt, before, after = infilling_tokens(tokenizer, text, order)
    eos = tokenizer.vocabulary.eos
    found = generate(model, [prompt], settings, eos=eos)
    rows = zip(found.tokens[0], found.log_probs[0], found.lengths[0], strict=True)
    return [
        Infilling(before, tokenizer.decode(t[:n]), after, p[:n], ended=eos is not None and eos in t[:n])
        for t, p, n in rows
    ]


def infilling_tokens(
    tokenizer: Tokenizer, text: str, order: InfillingOrder = "psm"
) -> tuple[NDArray[np.int32], str, str]:
    """A text with a hole as what a model reads that learned to fill it in, and what is before and after the hole.

    A space before the hole is not read, because word pieces carry the space before them: it is part of what is written.

    Args:
      tokenizer: the model's.
      text: with one <fim_middle>, spelled as the vocabulary spells it.
      order: in which the model is asked.

    Raises:
      UserError: the vocabulary has no marks, or the text has no hole or several.
    """
    marks = tokenizer.vocabulary.require("filling in the middle of a text", *INFILLING_MARKS)
    hole = tokenizer.piece(marks[2])
    parts = text.split(hole)
    if len(parts) != 2:
        raise UserError(
            f"the text {text!r} has {len(parts) - 1} holes; write {hole} once, where something is to be filled in."
        )
    before, after = parts[0].removesuffix(" "), parts[1]
    prefix, suffix = tokenizer.encode(before).tolist(), tokenizer.encode(after).tolist()
    begin, behind, between = marks
    ids = [begin, behind, *suffix, between, *prefix] if order == "spm" else [begin, *prefix, behind, *suffix, between]
    return np.array(ids, np.int32), before, after


def masked_tokens(
    tokenizer: Tokenizer, text: str, *, framed: bool = True
) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """A text with masks as the one row that a model reads, and where in it the masks are.

    Args:
      tokenizer: the model's.
      text: with masks.
      framed: between [CLS] and [SEP], where the vocabulary has them, as masked language models read; else by itself,
        as models of masked diffusion do.

    Returns:
      [1, L] token ids and [1, K] indices.

    Raises:
      UserError: the vocabulary has no mask, or the text has none.
    """
    vocab = tokenizer.vocabulary
    if vocab.mask is None:
        raise UserError("fill needs a vocabulary with a [MASK] token, and this run's has none.")
    mask = tokenizer.piece(vocab.mask)
    if mask not in text:
        raise UserError(f"the text {text!r} has no {mask}; write {mask} where a token is to be guessed.")
    body = tokenizer.encode(re.sub(rf"\s*{re.escape(mask)}", mask, text), special=True)
    ends = [[token] if framed and token is not None else [] for token in (vocab.cls, vocab.sep)]
    tokens = np.concatenate([ends[0], body, ends[1]]).astype(np.int32)[None]
    return tokens, np.flatnonzero(tokens == vocab.mask)[None]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _fill(graph: nnx.GraphDef, state: nnx.State, tokens: Array, where: Array, k: int) -> FilledMasks:
    return fill_masks(nnx.merge(graph, state), tokens, where, k)
