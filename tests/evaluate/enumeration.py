"""Masked diffusion of a language that is small enough to write down: all texts of LENGTH words, all ways to hide some.

every = Enumeration.of(model)
every.probabilities        exp of what `diffusion_bounds` bounds: p(x) of the model that unmasks in random order
every.bounds()             the bound itself
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.evaluate import output_logits
from lmobj.models import DecoderConfig
from lmobj.objectives import MaskedDiffusion, loss_fn

__all__ = ["LENGTH", "MASK", "TEXTS", "VOCAB", "WORDS", "Enumeration", "language", "random_model", "train"]

WORDS, LENGTH, MASK = 3, 4, 3
VOCAB = Vocabulary(size=WORDS + 1, mask=MASK)
TEXTS = np.array(list(itertools.product(range(WORDS), repeat=LENGTH)))
"""[T, L]"""
FULL = 2**LENGTH - 1


def language() -> NDArray[np.float64]:
    """[T] probabilities: a chain that stays with probability 0.8, and begins with its three words 1/2, 1/3 and 1/6."""
    follows = np.where(np.eye(WORDS, dtype=bool), 0.8, 0.1)
    p = np.array([1 / 2, 1 / 3, 1 / 6])[TEXTS[:, 0]]
    for t in range(1, LENGTH):
        p = p * follows[TEXTS[:, t - 1], TEXTS[:, t]]
    return p


def random_model(seed: int = 0) -> nnx.Module:
    """A model with random weights, large enough that what it predicts depends on all that it sees."""
    config = DecoderConfig(layers=2, width=32, heads=4, max_length=8, vocab_multiple=1, init_std=0.3, remat="none")
    return config.build(VOCAB, nnx.Rngs(params=seed))


def train(model: nnx.Module, steps: int, rows: int = 64, lr: float = 5e-3) -> list[nnx.Module]:
    """The model after a tenth of the steps and after all of them, trained by masked diffusion on the language."""
    graph, state = nnx.split(model)
    loss = loss_fn(MaskedDiffusion(), {"model": graph}, VOCAB)
    optimizer = optax.adam(optax.cosine_decay_schedule(lr, steps), b2=0.95)
    drawn = np.random.default_rng(0).choice(len(TEXTS), (steps, rows), p=language())
    batches = jnp.asarray(TEXTS[drawn], jnp.int32)

    def step(carry: Any, now: Any) -> Any:
        params, moments = carry
        number, tokens = now
        ids = jnp.stack([jnp.zeros(rows, jnp.int32), number * rows + jnp.arange(rows)], 1)
        ones = jnp.ones_like(tokens)
        batch = {"tokens": tokens, "segment_ids": ones, "positions": jnp.cumsum(ones, 1) - 1, "row_ids": ids}
        gradient = jax.grad(lambda p: loss({"model": p}, batch, jax.random.key(0, impl="threefry2x32"))[0])(params)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(params, updates), moments), None

    @jax.jit
    def run(params: Any) -> Any:
        early, late = steps // 10, steps
        numbers = jnp.arange(steps)
        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), (numbers[:early], batches[:early]))
        first = carry[0]
        carry, _ = jax.lax.scan(step, carry, (numbers[early:late], batches[early:late]))
        return first, carry[0]

    return [nnx.merge(graph, params) for params in run(nnx.to_pure_dict(state))]


@jax.jit(static_argnums=0)
def _log_q(graph: nnx.GraphDef, state: nnx.State, rows: jax.Array) -> jax.Array:
    model = nnx.merge(graph, state)
    hidden = model.hidden(rows, mask=masks.bidirectional().packed(jnp.ones_like(rows)))
    return output_logits(model, hidden)[..., :WORDS]


@dataclass(frozen=True)
class Enumeration:
    """Of one model."""

    log_q: NDArray[np.float64]
    """[2^L, T, L, W]: ln q(word at i | those of the text that the set shows); bit i of the set: i is shown."""

    @classmethod
    def of(cls, model: nnx.Module) -> Enumeration:
        """Asks the model for every prediction that there is, without [MASK]."""
        shown = (np.arange(2**LENGTH)[:, None] >> np.arange(LENGTH)) & 1
        rows = np.where(shown[:, None], TEXTS, MASK)
        logits = np.asarray(_log_q(*nnx.split(model), jnp.asarray(rows.reshape(-1, LENGTH))), np.float64)
        log_q = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return cls(log_q.reshape(*rows.shape, WORDS))

    @property
    def nll(self) -> NDArray[np.float64]:
        """[2^L, T, L]: -ln q of the text's own words."""
        return -np.take_along_axis(self.log_q, TEXTS[None, ..., None], axis=-1)[..., 0]

    def probabilities(self, prompt: int = 0) -> NDArray[np.float64]:
        """[T] p(words from `prompt` on | those before): one word after the other, the next any of those hidden."""
        follows, nll = np.ones((2**LENGTH, len(TEXTS))), self.nll
        for shown in range(FULL - 1, -1, -1):
            hidden = _hidden(shown)
            follows[shown] = np.mean([np.exp(-nll[shown, :, i]) * follows[shown | 1 << i] for i in hidden], axis=0)
        return follows[2**prompt - 1]

    def bounds(self, prompt: int = 0) -> NDArray[np.float64]:
        """[T] mean over k from 1 to n, and over the C(n, k) sets of k hidden words, of n / k times their losses."""
        n = LENGTH - prompt
        return self._sum(prompt, lambda k: n / k / (n * math.comb(n, k)))

    def bounds_over_time(self, prompt: int = 0) -> NDArray[np.float64]:
        """[T] the integral over t from 0 to 1 of 1 / t times the losses, each word hidden with chance t."""
        n = LENGTH - prompt
        nodes, weights = np.polynomial.legendre.leggauss(n)  # exact: a polynomial of degree n - 1
        t, dt = (nodes + 1) / 2, weights / 2
        return self._sum(prompt, lambda k: float(np.sum(dt * t ** (k - 1) * (1 - t) ** (n - k))))

    def _sum(self, prompt: int, weight: Any) -> NDArray[np.float64]:
        total, nll, read = np.zeros(len(TEXTS)), self.nll, 2**prompt - 1
        for shown in range(FULL):
            if shown & read == read:
                hidden = _hidden(shown)
                total += weight(len(hidden)) * nll[shown][:, hidden].sum(axis=1)
        return total


def _hidden(shown: int) -> list[int]:
    return [i for i in range(LENGTH) if not shown >> i & 1]
