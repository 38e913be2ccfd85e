"""The frozen-feature probe: what a linear classifier can read off a model's hidden states, the model left as it is.

A text is read as the model has read documents in training: with the same special tokens around it, the same view of
what comes later, and token types where it had them; of an encoder-decoder the encoder reads it. Its features are the
mean over its tokens of the last layer's hidden states (or those of one token). They are standardised, and a logistic
regression is fitted on them by scikit-learn, which is deterministic.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from numpy.typing import NDArray

from lmobj import _yaml, masks
from lmobj.bench._labelled import ProbeData
from lmobj.bench._probe_config import Features, Probe
from lmobj.bench._reading import Reading
from lmobj.data import TextRows, text_rows
from lmobj.errors import UserError
from lmobj.models import EncoderDecoderModel

__all__ = ["NotFinite", "Scores", "check_probe", "fit_and_score", "majority", "probe_model", "require_sklearn"]


class NotFinite(UserError):  # noqa: N818 - as `Halted`
    """A model whose hidden states are not finite: it diverged, and there is nothing to probe."""


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


def probe_model(probe: Probe, data: ProbeData, model: Any, reading: Reading) -> Scores:
    """Scores a language model.

    Raises:
      UserError: a model without hidden states, or texts that leave no room.
      NotFinite: hidden states that are not finite.
    """
    features = [
        _features(model, texts, reading, probe.features, probe.batch_size) for texts in _texts(probe, data, reading)
    ]
    labels = [[row.label for row in part] for part in (data.train, data.test)]
    return fit_and_score(features[0], labels[0], features[1], labels[1], probe.regularisation, probe.iterations)


def check_probe(probe: Probe, data: ProbeData, model: Any, reading: Reading) -> None:
    """Raises what `probe_model` would, before there is a trained model: of this one only shapes are read."""
    graph, params = _split(model)
    for texts in _texts(probe, data, reading):
        batch = [jax.ShapeDtypeStruct((probe.batch_size, texts.tokens.shape[1]), jnp.int32)] * 3
        read = functools.partial(_hidden_features, graph, probe.features, reading.causal, reading.typed)
        try:
            jax.eval_shape(read, params, *batch)
        except UserError as error:
            raise UserError(
                f"probe.length is {_yaml.show(probe.length)}, and the model cannot read the probe's texts in rows of "
                f"{texts.tokens.shape[1]} tokens: {error} Or accepted: a smaller probe.length."
            ) from None


def _texts(probe: Probe, data: ProbeData, reading: Reading) -> Iterator[TextRows]:
    """The rows to fit on, then those to score on."""
    for part in (data.train, data.test):
        texts = [(row.text, row.pair) for row in part]
        length = probe.length or reading.rows.length
        yield text_rows(texts, reading.tokenizer, reading.rows, length, key="probe.length")


def require_sklearn() -> None:
    """Raises UserError if scikit-learn is missing."""
    try:
        import sklearn.linear_model  # noqa: F401
    except ImportError as error:
        raise UserError(f"a probe needs scikit-learn ({error}); install it with `pip install scikit-learn`.") from None


def fit_and_score(
    train: NDArray, train_labels: Sequence[str], test: NDArray, test_labels: Sequence[str],
    regularisation: float = 1.0, iterations: int = 1000,
) -> Scores:  # fmt: skip
    """Fits on features [N, D] and scores on others.

    Raises:
      UserError: scikit-learn is missing.
      NotFinite: so it says.
    """
    require_sklearn()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not (np.isfinite(train).all() and np.isfinite(test).all()):
        raise NotFinite("the model's hidden states are not all finite, so there is nothing to probe.")
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


def _split(model: Any) -> tuple[nnx.GraphDef, Any]:
    if not hasattr(model, "hidden") and not isinstance(model, EncoderDecoderModel):
        raise UserError(f"probe is given, and the model {type(model).__name__} has no hidden states; accepted: null.")
    graph, params = nnx.split(model)
    return graph, params


def _features(
    model: Any, texts: TextRows, reading: Reading, features: Features, batch_size: int
) -> NDArray[np.float32]:
    """[N, D] of the texts, a batch at a time; the last batch is filled with padding so that all have one shape."""
    graph, params = _split(model)
    count = len(texts.tokens)
    found = []
    for start in range(0, count, batch_size):
        part = [x[start : start + batch_size] for x in (texts.tokens, texts.segments, texts.types)]
        part = [np.pad(x, ((0, batch_size - len(x)), (0, 0))) for x in part]
        found.append(np.asarray(_hidden_features(graph, features, reading.causal, reading.typed, params, *part)))
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
    if isinstance(model, EncoderDecoderModel):
        hidden = model.encode(tokens, mask=masks.bidirectional().packed(segments))
    else:
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
