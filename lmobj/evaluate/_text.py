"""Decoding with text at both ends: continue a prompt, fill the masks of a sentence."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array
from numpy.typing import NDArray

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._cached import Generated
from lmobj.evaluate._decoding import DecodingConfig, FilledMasks, fill_masks, generate
from lmobj.models import CachedModel, LanguageModel

__all__ = ["Continuation", "Filling", "continuations", "continue_text", "fill_text", "masked_tokens"]


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


def continue_text(
    model: CachedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: DecodingConfig,
    *,
    suffix: tuple[int, ...] = (),
) -> list[list[Continuation]]:
    """Continues each prompt; for every prompt the samples or beams, the best beam first.

    Args:
      model: a causal model.
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
    return continuations(tokenizer, generate(model, encoded, settings, eos=tokenizer.vocabulary.eos))


def continuations(tokenizer: Tokenizer, generated: Generated) -> list[list[Continuation]]:
    """Generated rows [prompts, samples] with their texts."""
    results = []
    for tokens, log_probs, lengths in zip(generated.tokens, generated.log_probs, generated.lengths, strict=True):
        rows = zip(tokens, log_probs, lengths, strict=True)
        results.append([Continuation(tokenizer.decode(t[:n]), t[:n], p[:n]) for t, p, n in rows])
    return results


def fill_text(model: LanguageModel, tokenizer: Tokenizer, text: str, k: int = 5) -> tuple[str, list[Filling]]:
    """Guesses each [MASK] of a text by itself.

    Spaces before a mask are part of what is guessed, because word pieces carry the space before them.

    Returns:
      The text with each mask filled by its most probable piece, and the k best pieces of each mask.

    Raises:
      UserError: the vocabulary has no mask, the text has none, or k is not in 1..vocabulary size.
    """
    tokens, where = masked_tokens(tokenizer, text)
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


def masked_tokens(tokenizer: Tokenizer, text: str) -> tuple[NDArray[np.int32], NDArray[np.intp]]:
    """A text with masks as the one row that a masked language model reads, and where in it the masks are.

    Returns:
      [1, L] token ids between [CLS] and [SEP], where the vocabulary has them, and [1, K] indices.

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
    ends = [[] if token is None else [token] for token in (vocab.cls, vocab.sep)]
    tokens = np.concatenate([ends[0], body, ends[1]]).astype(np.int32)[None]
    return tokens, np.flatnonzero(tokens == vocab.mask)[None]


@functools.partial(jax.jit, static_argnums=(0, 4))
def _fill(graph: nnx.GraphDef, state: nnx.State, tokens: Array, where: Array, k: int) -> FilledMasks:
    return fill_masks(nnx.merge(graph, state), tokens, where, k)
