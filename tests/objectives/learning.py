"""Does an objective learn what it should, and no more? Languages of known structure, and one compiled training loop.

Every language here has a part that can be predicted and a part that cannot, so the best possible accuracy is known and
is below 1. A test asserts a range around it: a model that is blind to what it should see (a wrong mask, a target out
of reach) ends far below, and one that sees what it should not (a leak, a target that is its own input) ends far above.

    language = Sums()
    metrics = learn(CausalLM(), DECODER, language.vocab, *language.batches(steps=300), lr=1e-2)
    assert abs(metrics["accuracy"] - language.ceiling) < 0.04

Batches are trees of arrays with a leading axis of steps; held-out rows are drawn after the others. `DECODER` and
`ENCODER` learn these languages within 300 steps, in two or three seconds on a CPU once they are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from numpy.typing import NDArray

from lmobj.batch import Vocabulary
from lmobj.models import DecoderConfig, EncoderConfig, EncoderDecoderConfig, ModelBuilder
from lmobj.objectives import Objective, Role
from lmobj.train.step import Program

__all__ = ["DECODER", "ENCODER", "SEQ2SEQ", "PairTopics", "Repeats", "Reversals", "Sums", "Topics", "Twins", "learn"]

Batches = dict[str, Any]
"""Named arrays [steps, B, ...]; of mixtures, member name -> such a dict."""

DECODER = DecoderConfig(layers=2, width=32, heads=4, max_length=32, vocab_multiple=1, init_std=0.2, remat="none")
ENCODER = EncoderConfig(
    layers=2,
    width=32,
    heads=2,
    mlp_width=64,
    max_length=32,
    vocab_multiple=1,
    init_std=0.1,
    positions="rotary",
    pre_norm=True,
    remat="none",
)
SEQ2SEQ = EncoderDecoderConfig(
    layers=1,
    width=32,
    heads=2,
    head_width=16,
    mlp_width=64,
    max_length=32,
    positions="learned",
    scale_attention=True,
    vocab_multiple=1,
    remat="none",
)

FIRST = 7
"""The first id that is no special token."""


def vocabulary(words: int) -> Vocabulary:
    """`words` ordinary tokens after the special ones."""
    return Vocabulary(size=FIRST + words, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)


def learn(
    objective: Objective,
    builders: ModelBuilder | Mapping[str, ModelBuilder],
    vocab: Vocabulary,
    batches: Batches,
    held_out: Batches,
    *,
    lr: float = 1e-2,
    seed: int = 0,
) -> dict[str, float]:
    """Trains with Adam in float32 on each batch in turn, then measures on the held-out batches: one compiled program.

    Args:
      objective: the objective; a role `heads` is built by it from the model's style, as the trainer does.
      builders: one for the role `model`, or role -> builder, frozen roles included.
      vocab: of the language.
      batches, held_out: as a language makes them; carried state goes from batch to batch in both.
      lr: peak of a cosine that rises over the first tenth and ends at 0.
      seed: of the parameters and the noise.

    Returns:
      metrics over all held-out batches, each one quotient of sums; terms are under "term/NAME".
    """
    given = builders if isinstance(builders, Mapping) else {"model": builders}
    assert {*given, "heads"} >= set(objective.roles) >= set(given)

    def build() -> dict[str, nnx.Module]:
        models = {r: builder.build(vocab, nnx.Rngs(params=seed + i)) for i, (r, builder) in enumerate(given.items())}
        if "heads" in objective.roles:
            models["heads"] = objective.build_heads(models["model"].head_style, vocab, nnx.Rngs(params=seed + 100))
        return models

    steps = len(jax.tree.leaves(batches)[0])
    program = Program(
        objective=objective,
        graphs={role: nnx.split(model)[0] for role, model in nnx.eval_shape(build).items()},
        vocab=vocab,
        optimizer=optax.adam(optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps), b2=0.95),
        coefficients={name: _constant(value) for name, value in objective.coefficients.items()},
        seed=seed,
    )

    @jax.jit
    def run(batches: Batches, held_out: Batches) -> Any:
        params = {role: nnx.to_pure_dict(nnx.state(model)) for role, model in build().items()}
        frozen = {role: params.pop(role) for role, kind in objective.roles.items() if kind is Role.FROZEN}

        def train(state: Any, batch: Any) -> tuple[Any, Any]:
            state, metrics = program.train_step(state, frozen, batch)
            return state, metrics["loss"][0]

        def measure(carried: Any, batch: Any) -> tuple[Any, Any]:
            metrics, carried, _ = program.eval_step(state, frozen, batch, carried)
            return carried, metrics

        start = program.init(params, jax.tree.leaves(batches)[0].shape[1])
        state, losses = jax.lax.scan(train, start, batches)
        _, metrics = jax.lax.scan(measure, start.objective.carried, held_out)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), metrics), losses

    metrics, losses = jax.device_get(run(batches, held_out))
    assert np.all(np.isfinite(losses))
    return {name: float(total / weight) for name, (total, weight) in metrics.items() if weight > 0}


def _constant(value: float) -> Callable[[Any], Any]:
    return lambda step: jnp.asarray(value, jnp.float32)


@dataclass(frozen=True)
class _Language:
    """Rows of one document each, without special tokens. A language says how rows are drawn."""

    words: int = 8
    length: int = 16

    @property
    def vocab(self) -> Vocabulary:
        """Of the language."""
        return vocabulary(self.words)

    def batches(self, steps: int, rows: int = 16, *, held_out: int = 32, seed: int = 0) -> tuple[Batches, Batches]:
        """(training, held-out) batches of `rows` rows."""
        draw = np.random.default_rng(seed)
        return tuple(self._batches(draw, count, rows) for count in (steps, held_out))

    def _batches(self, draw: np.random.Generator, steps: int, rows: int) -> Batches:
        return _batch(FIRST + self._draw(draw, steps, rows))

    def _draw(self, draw: np.random.Generator, steps: int, rows: int) -> NDArray[np.integer]:
        """Words 0 .. words - 1 of [steps, rows, length] tokens."""
        raise NotImplementedError


def _batch(tokens: NDArray[np.integer], **more: NDArray[Any]) -> Batches:
    """Batches [steps, B, L] whose rows are one document each; every row of all steps has an address of its own."""
    steps, rows, length = tokens.shape
    numbers = np.arange(steps * rows).reshape(steps, rows)
    arrays = {
        "tokens": tokens,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(length), tokens.shape),
        "row_ids": np.stack([np.zeros_like(numbers), numbers], axis=-1),
        **more,
    }
    return {name: jnp.asarray(x, x.dtype if x.dtype == bool else jnp.int32) for name, x in arrays.items()}


@dataclass(frozen=True)
class Sums(_Language):
    """Each word is the sum of the last two modulo `words`, or with probability `surprise` any word at all.

    For models that read from the left. The best guess is the sum, right with probability (1 - surprise) +
    surprise / words; the row's first target has one word before it and is anybody's guess, 1 / words.

    Who sees one of the last two only is at 1 / words throughout, since adding an unknown uniform word leaves a uniform
    one: a mask that hides the last word, or the one before it. A target two ahead needs two lucky sums and is right
    with about (1 - surprise)^2. Who sees the target, by a mask that lets the next token through or by a target that is
    the input, is at 1.
    """

    words: int = 5
    surprise: float = 0.25

    @property
    def ceiling(self) -> float:
        """Best accuracy of next-token prediction, the mean over a row's length - 1 targets."""
        sure = (1 - self.surprise) + self.surprise / self.words
        return (1 / self.words + (self.length - 2) * sure) / (self.length - 1)

    def _draw(self, draw: np.random.Generator, steps: int, rows: int) -> NDArray[np.integer]:
        x = draw.integers(0, self.words, (steps, rows, self.length))
        lawful = draw.random(x.shape) >= self.surprise
        for t in range(2, self.length):
            x[..., t] = np.where(lawful[..., t], (x[..., t - 1] + x[..., t - 2]) % self.words, x[..., t])
        return x


@dataclass(frozen=True)
class Twins(_Language):
    """Words are drawn evenly; those of the second half repeat the first half, each `length` / 2 places after its twin.

    For models that read both sides: a hidden token is as good as known while its twin is seen, and anybody's guess
    while it is not. With k tokens hidden of L, evenly, the twin is hidden too with probability (k - 1) / (L - 1):

        ceiling = 1 - (k - 1) / (L - 1) * (1 - guess)

    where guess is the accuracy on twins both hidden: 1 / words if all hidden tokens become [MASK]. (With BERT's
    80/10/10 some still show their token, or a random one that may be it, and the ceiling is another.)

    Who cannot see the right side knows the second half at best, (ceiling + 1 / words) / 2; who sees only the tokens
    near by, or none, is at 1 / words; who sees the hidden tokens themselves, or whose targets are the inputs, at 1.
    """

    def masked_ceiling(self, hidden: int) -> float:
        """Best accuracy on `hidden` of the row's tokens, of which all are replaced by [MASK]."""
        both = (hidden - 1) / (self.length - 1)
        return 1 - both * (1 - 1 / self.words)

    def _draw(self, draw: np.random.Generator, steps: int, rows: int) -> NDArray[np.integer]:
        half = draw.integers(0, self.words, (steps, rows, self.length // 2))
        return np.concatenate([half, half], axis=-1)


@dataclass(frozen=True)
class Topics(_Language):
    """Each row has a topic, and its words are drawn evenly from those of the topic, of which no other topic has any.

    For models that tell apart what belongs: a hidden word is one of words / topics, 1 / words for who sees nothing
    else; a word put in evenly from the whole vocabulary is known if and only if it is not of the row's topic.
    """

    topics: int = 2

    @property
    def ceiling(self) -> float:
        """Best accuracy on hidden tokens."""
        return self.topics / self.words

    def _draw(self, draw: np.random.Generator, steps: int, rows: int) -> NDArray[np.integer]:
        own = self.words // self.topics
        topic = draw.integers(0, self.topics, (steps, rows, 1))
        return topic * own + draw.integers(0, own, (steps, rows, self.length))


@dataclass(frozen=True)
class Repeats(_Language):
    """Streams for models with a memory: row b of batch t goes on with the text of row b of batch t - 1.

    Batches come in twos, both with the same row of evenly drawn words: the second repeats the first, `length` tokens
    later. Every word lies out of reach of its repetition in the same row, so without the row before, or with another
    stream's in its place, or with a memory that is a step late, all words are at 1 / words. With it the second of each
    two is known, its first word included if that is predicted:

        ceiling = (1 + 1 / words) / 2

    A gradient into the memory or a wrong segment changes nothing here; other tests look at those.
    """

    @property
    def ceiling(self) -> float:
        """Best accuracy with a memory of at least `length` tokens."""
        return (1 + 1 / self.words) / 2

    def _batches(self, draw: np.random.Generator, steps: int, rows: int) -> Batches:
        return _batch(FIRST + self._draw(draw, steps, rows), backward=np.zeros((steps, rows), bool))

    def _draw(self, draw: np.random.Generator, steps: int, rows: int) -> NDArray[np.integer]:
        assert steps % 2 == 0
        return np.repeat(draw.integers(0, self.words, (steps // 2, rows, self.length)), 2, axis=0)


@dataclass(frozen=True)
class PairTopics(_Language):
    """Pairs [CLS] A [SEP] B [SEP]; a topic has its own words, of which some come early in a text and some late.

    `words` = topics x 2 x `synonyms`. A is drawn from the early words of a topic, B from the late ones, and then:
    `next_sentence`: label 1 for half the rows, whose B is of another topic (always another, so the ceiling is 1);
    `sentence_order`: label 1 for half the rows, whose A and B have changed places (ceiling 1);
    `labels` as well as `pair_labels` hold the same classes, for objectives that read labelled examples.

    Next sentences: whoever does not see both texts at once is at 1/2, for each alone is as likely under either label.
    Order: a bag of words, without segments or positions, is at 1/2, for it holds the same words in either order. A
    swapped label is as easily learned as the right one, so polarity is a matter for fixtures. A hidden word is one of
    `synonyms` that fit: 1 / synonyms for whoever sees its neighbours, against 1 / words for a unigram.
    """

    topics: int = 4
    synonyms: int = 2
    words: int = 16
    length: int = 15
    task: Literal["next_sentence", "sentence_order"] = "next_sentence"

    def _batches(self, draw: np.random.Generator, steps: int, rows: int) -> Batches:
        assert self.words == self.topics * 2 * self.synonyms
        assert self.length % 2
        each = (self.length - 3) // 2
        shape = (steps, rows)
        label = draw.integers(0, 2, shape)
        first = draw.integers(0, self.topics, shape)
        second = (first + draw.integers(1, self.topics, shape)) % self.topics
        if self.task == "sentence_order":
            second, swapped = first, label
        else:
            second, swapped = np.where(label == 1, second, first), np.zeros_like(label)

        def text(topic: NDArray[np.integer], late: NDArray[np.integer]) -> NDArray[np.integer]:
            group = (2 * topic + late)[..., None]
            return FIRST + group * self.synonyms + draw.integers(0, self.synonyms, (*shape, each))

        def special(token: int | None) -> NDArray[np.integer]:
            return np.full((*shape, 1), token)

        vocab = self.vocab
        sep, a, b = special(vocab.sep), text(first, swapped), text(second, 1 - swapped)
        tokens = np.concatenate([special(vocab.cls), a, sep, b, sep], axis=-1)
        types = np.broadcast_to(np.arange(self.length) >= each + 2, tokens.shape)
        return _batch(tokens, token_types=types.astype(np.int32), pair_labels=label, labels=label)


@dataclass(frozen=True)
class Reversals(_Language):
    """Pairs: a source of evenly drawn words and, as target, the source from its end, each word of which is with
    probability `surprise` any word at all. Rows are source EOS target EOS, both texts of 2 to `length` / 2 - 1 words.

    For an encoder with a decoder. A word is known if the source is seen whole, the end because the lengths are equal:

        ceiling = (n sure + 1) / (n + 1),   sure = (1 - surprise) + surprise / words,   of n words on average

    Without the source, words are at 1 / words. A source that is cut, or a decoder that sees no further than a part of
    it, leaves some words at 1 / words. Who sees the target is at 1: a surprise is told by nothing else.
    """

    length: int = 12
    surprise: float = 0.25

    @property
    def ceiling(self) -> float:
        """Best accuracy, ends included."""
        sure = (1 - self.surprise) + self.surprise / self.words
        mean = (2 + self.length // 2 - 1) / 2
        return (mean * sure + 1) / (mean + 1)

    def _batches(self, draw: np.random.Generator, steps: int, rows: int) -> Batches:
        shape, most = (steps, rows, self.length), self.length // 2 - 1
        count = draw.integers(2, most + 1, (steps, rows, 1))
        words = FIRST + draw.integers(0, self.words, shape)
        at = np.arange(self.length)
        source = np.take_along_axis(words, np.broadcast_to(np.clip(2 * count - at, 0, most), shape), axis=-1)
        surprises = draw.random(shape) < self.surprise
        target = np.where(surprises, FIRST + draw.integers(0, self.words, shape), source)
        tokens = np.where(at < count, words, target)
        tokens = np.where((at == count) | (at == 2 * count + 1), 3, tokens)
        real = at < 2 * count + 2
        types = real & (at > count)
        segments = real.astype(np.int32)
        return _batch(np.where(real, tokens, 0), token_types=types.astype(np.int32), segment_ids=segments)
