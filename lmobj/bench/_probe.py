"""The frozen-feature probe: what a linear classifier can read off a model's hidden states, the model left as it is.

A text is read as the model has read documents in training, with the same special tokens around it. Its features are
the mean over its tokens of the last layer's hidden states (or those of one token). They are standardised, and a
logistic regression is fitted on them by scikit-learn, which is deterministic.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from lmobj import masks
from lmobj.batch import RowSpec
from lmobj.bench._labelled import Labelled, ProbeData
from lmobj.bench._probe_config import Features, Probe
from lmobj.data import Tokenizer
from lmobj.errors import UserError
from lmobj.models import CachedModel

__all__ = ["Scores", "fit_and_score", "majority", "probe_model", "text_rows"]

_MULTIPLE = 16
"""Rows are as long as the longest text, rounded up to this."""


@dataclass(frozen=True)
class Scores:
    """How well classes are told on the test texts."""

    accuracy: float
    macro_f1: float
    """F1 of each class, averaged with equal weights (classes of the test texts and of the guesses)."""
    converged: bool = True
    """Whether the solver came to its end within `probe.iterations`."""

    def as_dict(self) -> dict[str, Any]:
        """In JSON."""
        return asdict(self)


def probe_model(probe: Probe, data: ProbeData, *, model: Any, tokenizer: Tokenizer, rows: RowSpec) -> Scores:
    """Scores a model.

    Args:
      probe: features and classifier.
      data: the texts.
      model: a language model; one that generates reads from left to right, any other sees both sides.
      tokenizer: its tokenizer.
      rows: the rows of its training: which special tokens stand around a text, and by default the most tokens.

    Raises:
      UserError: a model without hidden states, or texts that leave no room.
    """
    if not hasattr(model, "hidden"):
        raise UserError(f"probe is given, and the model {type(model).__name__} has no hidden states; accepted: null.")
    length = probe.length or rows.length
    features = [
        _features(model, text_rows(part, tokenizer, rows, length), probe.features, probe.batch_size)
        for part in (data.train, data.test)
    ]
    labels = [[row.label for row in part] for part in (data.train, data.test)]
    return fit_and_score(features[0], labels[0], features[1], labels[1], probe.regularisation, probe.iterations)


def fit_and_score(
    train: NDArray, train_labels: Sequence[str], test: NDArray, test_labels: Sequence[str],
    regularisation: float = 1.0, iterations: int = 1000,
) -> Scores:  # fmt: skip
    """Fits on features [N, D] and scores on others. Raises UserError if scikit-learn is missing."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise UserError(f"a probe needs scikit-learn ({error}); install it with `pip install scikit-learn`.") from None
    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise UserError("the model's hidden states are not all finite, so there is nothing to probe.")
    regression = LogisticRegression(C=regularisation, max_iter=iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is told in the scores
        classifier = make_pipeline(StandardScaler(), regression).fit(train, list(train_labels))
    return _scores(test_labels, classifier.predict(test), converged=bool(np.max(regression.n_iter_) < iterations))


def majority(data: ProbeData) -> Scores:
    """What always guessing the most frequent class of the training texts reaches."""
    most = Counter(row.label for row in data.train).most_common()
    label = min(name for name, count in most if count == most[0][1])
    return _scores([row.label for row in data.test], [label] * len(data.test))


def _scores(labels: Sequence[str], guesses: Any, converged: bool = True) -> Scores:
    from sklearn.metrics import accuracy_score, f1_score

    guesses = [str(guess) for guess in guesses]
    f1 = f1_score(list(labels), guesses, average="macro", zero_division=0.0)
    return Scores(float(accuracy_score(list(labels), guesses)), float(f1), converged)


@dataclass(frozen=True)
class TextRows:
    """Texts as rows: tokens [N, L], segments [N, L] (1, 0 where padded), types [N, L] (1 in second texts)."""

    tokens: NDArray[np.int32]
    segments: NDArray[np.int32]
    types: NDArray[np.int32]


def text_rows(texts: Sequence[Labelled], tokenizer: Tokenizer, rows: RowSpec, length: int) -> TextRows:
    """Texts with the special tokens of `rows` around them, cut to `length`: of a pair the longer text first.

    Raises:
      UserError: `length` leaves no room for text.
    """
    paired = any(row.pair is not None for row in texts)
    middle = rows.suffix[:1] if rows.layout == "stream_pairs" else rows.suffix  # A SEP B SEP CLS
    room = length - len(rows.prefix) - len(rows.suffix) - len(middle) * paired
    if room < 2:
        raise UserError(f"probe.length is {length}, which leaves {room} tokens for text; accepted: more.")
    firsts = tokenizer.encode_batch([row.text for row in texts])
    seconds = tokenizer.encode_batch([row.pair or "" for row in texts])
    lines, types = [], []
    for first, second in zip(firsts, seconds, strict=True):
        longest = max(room - len(second), room // 2)  # of the first, where both are too long
        first = first[: longest if paired else room]
        second = second[: room - len(first)]
        opening = [*rows.prefix, *first, *(middle if paired else ())]
        closing = [*(second if paired else ()), *rows.suffix]
        lines.append([*opening, *closing])
        types.append([0] * len(opening) + [int(paired)] * len(closing))
    width = max(len(line) for line in lines)
    width = min(length, -(-width // _MULTIPLE) * _MULTIPLE)
    shape = (len(lines), width)
    found = TextRows(np.zeros(shape, np.int32), np.zeros(shape, np.int32), np.zeros(shape, np.int32))
    for index, (line, kind) in enumerate(zip(lines, types, strict=True)):
        found.tokens[index, : len(line)] = line
        found.segments[index, : len(line)] = 1
        found.types[index, : len(line)] = kind
    return found


def _features(model: Any, texts: TextRows, features: Features, batch_size: int) -> NDArray[np.float32]:
    """[N, D] of the texts, a batch at a time; the last batch is filled with padding so that all have one shape."""
    graph, params = nnx.split(model)
    count = len(texts.tokens)
    causal, typed = isinstance(model, CachedModel), bool(texts.types.any()) and not isinstance(model, CachedModel)
    found = []
    for start in range(0, count, batch_size):
        part = [x[start : start + batch_size] for x in (texts.tokens, texts.segments, texts.types)]
        part = [np.pad(x, ((0, batch_size - len(x)), (0, 0))) for x in part]
        found.append(np.asarray(_hidden_features(graph, features, causal, typed, params, *part)))
    return np.concatenate(found)[:count]


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _hidden_features(
    graph: nnx.GraphDef,
    features: Features,
    causal: bool,
    typed: bool,
    params: Any,
    tokens: Int[Array, "B L"],
    segments: Int[Array, "B L"],
    types: Int[Array, "B L"],
) -> Float[Array, "B D"]:
    model = nnx.merge(graph, params)
    mask = (masks.causal() if causal else masks.bidirectional()).packed(segments)
    given = {"token_types": types} if typed else {}
    hidden = model.hidden(tokens, mask=mask, **given)
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    if features == "first":
        return hidden[:, 0]
    if features == "last":
        return jnp.take_along_axis(hidden, jnp.maximum(segments.sum(1) - 1, 0)[:, None, None], axis=1)[:, 0]
    weights = segments[..., None].astype(hidden.dtype)
    return jnp.sum(hidden * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1)
