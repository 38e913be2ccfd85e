"""Filling the spans of a text that sentinels stand for, by an encoder with a decoder (T5).

text      Thank you <extra_id_0> me to your party <extra_id_1> week.
written   <extra_id_0> for inviting <extra_id_1> last <extra_id_2>
"""

from __future__ import annotations

import itertools
import re

import numpy as np
from numpy.typing import NDArray

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._beam_search import BeamConfig
from lmobj.evaluate._text import Filling
from lmobj.evaluate._written import write_targets
from lmobj.models import EncoderDecoderModel

__all__ = ["fill_spans", "sentinel_tokens"]


def fill_spans(
    model: EncoderDecoderModel,
    tokenizer: Tokenizer,
    text: str,
    k: int = 5,
    *,
    start: int,
    around: tuple[tuple[int, ...], tuple[int, ...]],
    length: int,
    max_new_tokens: int,
) -> tuple[str, list[Filling]]:
    """The k most probable targets that a search of k beams finds, cut at their sentinels.

    A sentinel that is not written stands for nothing.

    Args:
      model: of span corruption.
      tokenizer: the model's.
      text: as for `sentinel_tokens`.
      k: fillings to find.
      start: the token that the decoder reads first.
      around: as for `sentinel_tokens`.
      length: most tokens that the encoder reads.
      max_new_tokens: most that the decoder writes.

    Returns:
      The text with the most probable filling, and for each sentinel the span of each filling, with the probability of
      the filling as a whole.

    Raises:
      UserError: as for `sentinel_tokens`, or k out of range.
    """
    if not 1 <= k <= tokenizer.vocabulary.size:
        raise UserError(f"k is {k}; accepted: 1 to {tokenizer.vocabulary.size} fillings.")
    source = sentinel_tokens(tokenizer, text, around=around, length=length)
    body = source[len(around[0]) : len(source) - len(around[1])].tolist()
    sentinels = [token for token in body if token in tokenizer.vocabulary.sentinels]
    settings = BeamConfig(max_new_tokens=max_new_tokens, num_beams=k, num_samples=k, length_penalty=0.0)
    eos = tokenizer.vocabulary.eos
    found = write_targets(model, [source], settings, start=start, eos=eos, length=length)
    rows = zip(found.tokens[0], found.lengths[0], strict=True)
    written = [_spans(tokens[:count].tolist(), tokenizer) for tokens, count in rows]
    shares = np.exp(found.scores[0].astype(np.float64)).tolist()  # without a length penalty, sums of ln p
    fillings = [
        Filling([tokenizer.decode(spans.get(index, [])) for spans in written], shares, tokenizer.piece(index))
        for index in sentinels
    ]
    best = [written[0].get(token, []) if token in sentinels else [token] for token in body]
    return tokenizer.decode(list(itertools.chain.from_iterable(best))), fillings


def sentinel_tokens(
    tokenizer: Tokenizer, text: str, *, around: tuple[tuple[int, ...], tuple[int, ...]], length: int
) -> NDArray[np.int32]:
    """A text with sentinels as what the encoder reads.

    Spaces before a sentinel are part of what it stands for, because word pieces carry the space before them.

    Args:
      tokenizer: the model's.
      text: with <extra_id_0>, <extra_id_1> and so on in this order.
      around: what the encoder reads before and after the text.
      length: most tokens that it reads.

    Raises:
      UserError: no sentinels, or not the first ones in their order; or a text that is too long.
    """
    pattern = "|".join(re.escape(tokenizer.piece(index)) for index in _sentinels(tokenizer, text))
    before, after = around
    body = tokenizer.encode(re.sub(rf"\s*({pattern})", r"\1", text), special=True)
    source = np.concatenate([before, body, after]).astype(np.int32)
    if len(source) > length:
        raise UserError(f"the text {text!r:.60} has {len(source)} tokens; accepted: up to {length}, as in training.")
    return source


def _sentinels(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the sentinels that are written in a text."""
    every = tokenizer.vocabulary.sentinels
    ids = [index for index in tokenizer.encode(text, special=True).tolist() if index in every]
    if not ids or ids != list(every[: len(ids)]):
        names = "sentinels " + ", ".join(map(tokenizer.piece, ids)) if ids else "no sentinels"
        raise UserError(
            f"the text {text!r} has {names}; accepted: {tokenizer.piece(every[0])} where a span is to be "
            "filled in, and the others after it in their order, each once."
            if every
            else "fill needs a vocabulary with sentinels, and this run's has none."
        )
    return ids


def _spans(tokens: list[int], tokenizer: Tokenizer) -> dict[int, list[int]]:
    """What is written after each sentinel."""
    spans: dict[int, list[int]] = {}
    mark = None
    for token in tokens:
        if token in tokenizer.vocabulary.sentinels:
            mark = token
            spans[mark] = []
        elif mark is not None and token != tokenizer.vocabulary.eos:
            spans[mark].append(token)
    return spans
