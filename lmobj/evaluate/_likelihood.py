"""How probable a causal model finds texts after others, and what is made of it to choose among answers.

    ln p(y | x) = sum_{t = n+1..N} ln p(z_t | z_1..z_{t-1})     z_1..z_N: the tokens of x and y, of which n are x's

Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.4, compare answers so.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike, NDArray

from lmobj import losses, masks
from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.evaluate._cached import check_reads_rows
from lmobj.models import LanguageModel

__all__ = [
    "Normalisation",
    "ScoredText",
    "answer_scores",
    "batch_rows",
    "continuation_log_probs",
    "row_shapes",
    "same_start",
    "scored_text",
]

Normalisation = Literal["sum", "tokens", "bytes", "prior"]
"""What the log-likelihood of an answer is set against; see `answer_scores`."""

_BATCH_TOKENS = 8192
_MOST_ROWS = 64
"""A batch has as many rows as hold `_BATCH_TOKENS` tokens, at most this many."""
_LEAST_LENGTH, _LEAST_PLACES = 16, 4


class ScoredText(NamedTuple):
    """Tokens, of which those from `start` on are scored given all before them."""

    tokens: NDArray[np.int32]
    start: int


def scored_text(tokenizer: Tokenizer, prompt: str, completion: str) -> ScoredText:
    """The tokens of `prompt + completion`, scored from where they differ from those of the prompt alone.

    A tokenizer may cut a text otherwise once more follows, so the two are not cut apart: that would score tokens which
    the model never met in this place. The whole text is encoded, and what counts as read is the longest beginning that
    it has in common with the prompt's own tokens. Where a piece spans the end of the prompt, the scored tokens thus
    begin a little before the completion: `same_start` lets those of other completions begin there too.

    Raises:
      UserError: no token is in common, so that the first one would be scored given nothing.
    """
    whole, alone = tokenizer.encode_batch([prompt + completion, prompt])
    most = min(len(whole) - 1, len(alone))
    differs = whole[:most] != alone[:most]
    start = int(np.argmax(differs)) if differs.any() else most
    if start <= 0:
        raise UserError(
            f"the prompt {prompt!r} before {completion!r} is empty, or their first pieces run into one another; a "
            "causal model says how probable a text is after another, so accepted: a prompt of at least one token."
        )
    return ScoredText(whole, start)


def same_start(rows: Sequence[ScoredText]) -> list[ScoredText]:
    """The same prompt with several completions, each scored from the earliest place from which one of them must be.

    Up to there all have the same tokens, so all are told the same and are asked for the rest of the same text.
    """
    start = min(row.start for row in rows)
    return [row._replace(start=start) for row in rows]


def continuation_log_probs(
    model: LanguageModel, rows: Sequence[ScoredText], *, done: Callable[[int], None] = lambda count: None
) -> list[NDArray[np.float64]]:
    """ln p of each scored token of each row given the tokens before it, in nats; exact, over the whole vocabulary.

    Rows are read in batches of few distinct shapes, each of which is compiled once. The vocabulary head runs at the
    scored places alone, and no logits are stored.

    Args:
      model: reads each row under a causal mask.
      rows: each with 1 <= start < its number of tokens.
      done: told after each batch how many rows are done.

    Raises:
      UserError: a row without a scored token or without one before it, or a model that reads no row by itself or whose
        probabilities are not numbers.
    """
    check_reads_rows(model)
    for number, row in enumerate(rows):
        if not 1 <= row.start < len(row.tokens):
            raise UserError(
                f"row {number} has {len(row.tokens)} tokens, scored from {row.start}; accepted: at least one token "
                "before those that are scored, and one that is."
            )
    graph, state = nnx.split(model)
    found: list[NDArray[np.float64]] = [np.zeros(0)] * len(rows)
    count = 0
    # The last token is not read.
    sizes = [(len(row.tokens) - 1, len(row.tokens) - row.start) for row in rows]
    for numbers, length, places in row_shapes(model, sizes):
        size = batch_rows(length, len(numbers))
        for first in range(0, len(numbers), size):
            batch = numbers[first : first + size]
            arrays = _padded([rows[number] for number in batch], size, length, places)
            log_probs = np.asarray(_log_probs(graph, state, *arrays), np.float64)
            for number, values in zip(batch, log_probs, strict=False):
                found[number] = values[: len(rows[number].tokens) - rows[number].start]
            count += len(batch)
            done(count)
    if not all(np.isfinite(values).all() for values in found):
        raise UserError("the model's probabilities are not finite numbers; accepted: weights of a run that went well.")
    return found


def answer_scores(
    log_likelihoods: ArrayLike,
    normalise: Normalisation = "sum",
    *,
    tokens: ArrayLike | None = None,
    num_bytes: ArrayLike | None = None,
    priors: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Scores by which the best of several answers y to x is chosen; larger is better.

        sum      ln p(y | x)
        tokens   ln p(y | x) / |y| in tokens
        bytes    ln p(y | x) / |y| in bytes of UTF-8
        prior    ln p(y | x) - ln p(y | the same prompt without its input)

    Answers that differ in length, or in how common they are whatever the question, are compared unfairly by their sums.

    Args:
      log_likelihoods: [...] ln p(y | x), in nats.
      normalise: one of the above.
      tokens, num_bytes: [...] sizes of the answers, each needed where it divides; at least 1.
      priors: [...] needed for `prior`.

    Raises:
      UserError: a normalisation that is none of these, or whose argument is missing, or an answer without size.

    Source: `tokens`, Brown et al. 2020, section 2.4; `bytes`, as bits per byte in Gao et al. 2020, "The Pile", which no
    choice of tokens changes; `prior`, domain-conditional pointwise mutual information of Holtzman et al. 2021, "Surface
    Form Competition: Why the Highest Probability Answer Isn't Always Right", section 3. There the prior is that after a
    fixed phrase; here it is that after the prompt with its input empty, examples and all.
    """
    values = np.asarray(log_likelihoods, np.float64)
    by = {"tokens": tokens, "bytes": num_bytes, "prior": priors}
    if normalise == "sum":
        return values
    if normalise not in by or by[normalise] is None:
        raise UserError(
            f"normalise is {normalise!r}; accepted: sum, or tokens, bytes or prior together with what they need."
        )
    against = np.asarray(by[normalise], np.float64)
    if normalise == "prior":
        return values - against
    if (against < 1).any():
        raise UserError(f"an answer has {against.min():g} {normalise}; accepted: answers of at least 1.")
    return values / against


def row_shapes(model: LanguageModel, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[list[int], int, int]]:
    """Rows of like sizes together: their numbers, and the length and the places that all of them are padded to.

    Args:
      model: its `config.max_length`, if it has one, is the most that a length is rounded up to.
      sizes: tokens and scored places of each row.
    """
    shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for number, (length, places) in enumerate(sizes):
        shapes[_rounded(length, _LEAST_LENGTH), _rounded(places, _LEAST_PLACES)].append(number)
    context = getattr(getattr(model, "config", None), "max_length", None)
    for (rounded, places), numbers in sorted(shapes.items()):
        longest = max(sizes[number][0] for number in numbers)
        # If it is too long, the model says so.
        yield numbers, rounded if context is None else max(min(rounded, context), longest), places


def batch_rows(length: int, count: int) -> int:
    """Rows in a batch, of `count` rows of `length` tokens."""
    return min(_MOST_ROWS, max(1, _BATCH_TOKENS // length), _rounded(count, 1))


def _rounded(number: int, least: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least both."""
    number = max(number, least)
    power = 1 << (number - 1).bit_length()
    return 3 * power // 4 if power >= 4 and number <= 3 * power // 4 else power


def _padded(rows: Sequence[ScoredText], size: int, length: int, places: int) -> tuple[NDArray[np.int32], ...]:
    """Tokens and segments [size, length], the places that predict a scored token and those tokens [size, places]."""
    tokens, segments = np.zeros((size, length), np.int32), np.zeros((size, length), np.int32)
    where, targets = np.zeros((size, places), np.int32), np.zeros((size, places), np.int32)
    for i, (ids, start) in enumerate(rows):
        read, count = len(ids) - 1, len(ids) - start
        tokens[i, :read], segments[i, :read] = ids[:-1], 1
        where[i, :count], targets[i, :count] = np.arange(start - 1, read), ids[start:]
    return tokens, segments, where, targets


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(
    graph: nnx.GraphDef,
    state: nnx.State,
    tokens: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    where: Int[Array, "B K"],
    targets: Int[Array, "B K"],
) -> Float[Array, "B K"]:
    model = nnx.merge(graph, state)
    hidden = model.hidden(tokens, mask=masks.causal().packed(segments))
    picked = model.head_hidden(jnp.take_along_axis(hidden, where[..., None], axis=1))
    head = model.head_table()
    return -losses.linear_token_nll(
        picked, head.table, targets, bias=head.bias, vocab_size=head.vocab_size, soft_cap=head.soft_cap
    )
