"""Filling the spans of a text that sentinels stand for, by an encoder with a decoder (T5).

text      Thank you <extra_id_0> me to your party <extra_id_1> week.
written   <extra_id_0> for inviting <extra_id_1> last <extra_id_2>
"""

from __future__ import annotations

import itertools
import re

import numpy as np

from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._beam_search import BeamConfig
from lmobj.evaluate._text import Filling
from lmobj.evaluate._written import write_targets
from lmobj.models import EncoderDecoderModel

__all__ = ["fill_spans", "sentinels_in"]


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

    Spaces before a sentinel are part of what it stands for, because word pieces carry the space before them. A sentinel
    that is not written stands for nothing.

    Args:
      model: of span corruption.
      tokenizer: the model's.
      text: with <extra_id_0>, <extra_id_1> and so on in this order.
      k: fillings to find.
      start: the token that the decoder reads first.
      around: what the encoder reads before and after the text.
      length: most tokens that it reads.
      max_new_tokens: most that the decoder writes.

    Returns:
      The text with the most probable filling, and for each sentinel the span of each filling, with the probability of
      the filling as a whole.

    Raises:
      UserError: no sentinels, or not the first ones in their order; a text that is too long, or k out of range.
    """
    sentinels = sentinels_in(tokenizer, text)
    pieces = [tokenizer.piece(index) for index in sentinels]
    pattern = "|".join(map(re.escape, pieces))
    body = tokenizer.encode(re.sub(rf"\s*({pattern})", r"\1", text), special=True)
    before, after = around
    source = np.concatenate([before, body, after]).astype(np.int32)
    if len(source) > length:
        raise UserError(f"the text {text!r:.60} has {len(source)} tokens; accepted: up to {length}, as in training.")
    settings = BeamConfig(max_new_tokens=max_new_tokens, num_beams=k, num_samples=k, length_penalty=0.0)
    eos = tokenizer.vocabulary.eos
    found = write_targets(model, [source], settings, start=start, eos=eos, length=length)
    rows = zip(found.tokens[0], found.lengths[0], strict=True)
    written = [_spans(tokens[:count].tolist(), tokenizer) for tokens, count in rows]
    shares = np.exp(found.scores[0].astype(np.float64)).tolist()  # without a length penalty, sums of ln p
    fillings = [
        Filling([tokenizer.decode(spans.get(index, [])) for spans in written], shares, mark)
        for index, mark in zip(sentinels, pieces, strict=True)
    ]
    best = [written[0].get(token, []) if token in sentinels else [token] for token in body.tolist()]
    return tokenizer.decode(list(itertools.chain.from_iterable(best))), fillings


def sentinels_in(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of the sentinels that are written in a text.

    Raises:
      UserError: there are none, or not the first ones in their order.
    """
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
