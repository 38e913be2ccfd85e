"""SimCSE by hand: two views of a sentence, what each is told from, the head, and hard negatives; and what is learnt.

That meshes, microbatches and mapped parts give the loss and the gradient of the whole batch is in the contract test.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj.batch import RowSpec, Vocabulary
from lmobj.errors import UserError
from lmobj.models import DecoderConfig, EncoderConfig, GRUConfig, HeadStyle
from lmobj.objectives import (
    Context,
    MaskedLM,
    Member,
    Mixture,
    Role,
    SimCSE,
    _bi_encoder,
    _simcse,
    denominators,
    step_keys,
    total_loss,
)
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import ENCODER, Topics, learn
from tests.objectives.test_matching import nll, texts

VOCAB = Vocabulary(size=16, pad=9, eos=3, cls=4, sep=5, mask=6)
PLAIN = SimCSE(head="none", temperature=0.5)


def sentences() -> dict[str, Any]:
    """Sentences 4 7 5, 4 8 8 5 and 4 5, and an empty row; room for 5 tokens."""
    tokens = np.asarray([[4, 7, 5, 9, 9], [4, 8, 8, 5, 9], [4, 5, 9, 9, 9], [9] * 5], np.int32)
    inside = tokens != VOCAB.pad
    places = np.arange(4)
    batch = {
        "tokens": tokens,
        "segment_ids": inside,
        "positions": np.where(inside, np.arange(5), 0),
        "row_ids": np.stack([0 * places, places], 1),
    }
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}


def context(rows: dict[str, Any], train: bool = False) -> tuple[Any, Context]:
    noise_keys, model = step_keys(jax.random.key(0, impl="threefry2x32"), rows["row_ids"], 0)
    return noise_keys, Context(model, 0, VOCAB, train=train)


class Model:
    """The state of each token of text t of row b: (cos a, sin a) with the angle that a table [B, T] has for it."""

    def __init__(self, angles: list[list[float]]):
        self.angles = jnp.asarray(angles)

    def hidden(self, tokens: Any, *, mask: Any, **given: Any) -> Any:
        segment = jnp.maximum(mask.segment_ids - 1, 0)
        angle = jnp.take_along_axis(self.angles, segment, axis=1)
        return 3 * jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)


def found(objective: SimCSE, rows: dict[str, Any], angles: list[list[float]], train: bool = True) -> tuple[Any, Any]:
    """(terms, loss)."""
    noise_keys, ctx = context(rows, train)
    example = objective.corrupt(noise_keys, rows, ctx)
    models: Any = {"model": Model(angles), "heads": lambda x: x[..., ::-1] * jnp.asarray([1.0, -2.0])}
    terms = objective.terms(models, example, (), ctx)
    return terms, total_loss(terms, denominators(objective, example), objective.coefficients)


def test_a_sentence_is_in_its_row_twice() -> None:
    rows = sentences()
    noise_keys, ctx = context(rows)
    example = PLAIN.corrupt(noise_keys, rows, ctx)
    np.testing.assert_array_equal(
        example.inputs,
        [[4, 7, 5, 4, 7, 5, 9, 9, 9, 9], [4, 8, 8, 5, 4, 8, 8, 5, 9, 9], [4, 5, 4, 5] + [9] * 6, [9] * 10],
    )
    np.testing.assert_array_equal(
        example.mask.segment_ids,
        [[1, 1, 1, 2, 2, 2, 0, 0, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 1, 2, 2] + [0] * 6, [0] * 10],
    )
    np.testing.assert_array_equal(example.positions[1], [0, 1, 2, 3, 0, 1, 2, 3, 0, 0])
    np.testing.assert_array_equal(example.weights[:, 0], [1, 1, 1, 0])


ANGLES = [[0.0, 0.3], [1.0, 1.5], [2.0, 1.9], [0.0, 0.0]]
"""Of the two views of each sentence. The cosine of two is that of the difference of their angles."""


def test_the_loss_by_hand() -> None:
    # First view b looks for second view b among the second views of the three sentences, and of nothing else: view
    # (0, 0.3) has cosines cos 0.3, cos 1.5, cos 1.9, each over 1/2, and so on. The empty row is nowhere.
    s = lambda x, *each: [2 * math.cos(x - y) for y in each]  # noqa: E731
    expected = [nll(s(0.0, 0.3, 1.5, 1.9)), nll(s(1.0, 1.5, 0.3, 1.9)), nll(s(2.0, 1.9, 0.3, 1.5))]
    terms, loss = found(PLAIN, sentences(), ANGLES)
    np.testing.assert_allclose(loss, sum(expected) / 3, rtol=1e-5)
    np.testing.assert_allclose(terms.metrics["accuracy"], (3, 3))
    # Sentence 1 is nearer to the second view of sentence 0 once that is at 1.2.
    terms, _ = found(PLAIN, sentences(), [[0.0, 1.2], *ANGLES[1:]])
    np.testing.assert_allclose(terms.metrics["accuracy"], (2, 3))


def test_the_paper_by_hand() -> None:
    """Temperature 0.05: a view at cosine 1 against one at cosine 0.9 costs log(1 + e^-2)."""
    angle = math.acos(0.9)
    _, loss = found(SimCSE(head="none"), sentences(), [[0.0, 0.0], [angle, angle], [math.pi, math.pi], [0.0, 0.0]])
    # The third stands opposite: cosines -1, and -0.9 to the second, which e^-38 and e^-36 makes nothing of.
    np.testing.assert_allclose(loss, 2 * math.log1p(math.exp(-2)) / 3, rtol=1e-4)


def test_equal_sentences_are_negatives() -> None:
    """Two rows with the same sentence at the same vector: each finds either as near, log 2."""
    rows = sentences()
    rows = jax.tree.map(lambda x: x[jnp.asarray([0, 0])], rows)
    _, loss = found(PLAIN, rows, [[0.0, 0.0], [0.0, 0.0]])
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)


def test_hard_negatives_by_hand() -> None:
    # Rows (x, y, z) at angles; candidates of each x are y and z of both rows, those spelt alike too (text 1 is the
    # text of both rows). Twice each cosine, and 0.7 more for the row's own z.
    rows = texts([[0, 1, 2], [4, 1, 3]], [[2, 3, 2], [2, 2, 2]])
    angles = [[0.0, 0.2, 0.9], [1.1, 1.3, 0.4]]
    objective = SimCSE(supervised=True, negatives=1, hard_negative_weight=0.7, temperature=0.5, head="none")
    s = lambda x, y: 2 * math.cos(x - y)  # noqa: E731
    first = [s(0.0, 0.2), s(0.0, 0.9) + 0.7, s(0.0, 1.3), s(0.0, 0.4)]
    second = [s(1.1, 1.3), s(1.1, 0.4) + 0.7, s(1.1, 0.2), s(1.1, 0.9)]
    _, loss = found(objective, rows, angles)
    np.testing.assert_allclose(loss, (nll(first) + nll(second)) / 2, rtol=1e-5)
    # Left out are texts spelt as the row's own: the other row's text 1.
    _, loss = found(dataclasses.replace(objective, equal_texts="left_out"), rows, angles)
    kept = [first[:2] + first[3:], second[:2] + second[3:]]
    np.testing.assert_allclose(loss, sum(map(nll, kept)) / 2, rtol=1e-5)
    # Without a weight, and a row that has no hard negative.
    rows = texts([[0, 1, 2], [4, 5, 3]], [[2, 3, 2], [2, 2]])
    _, loss = found(dataclasses.replace(objective, hard_negative_weight=0.0), rows, angles)
    expected = [[s(0.0, 0.2), s(0.0, 0.9), s(0.0, 1.3)], [s(1.1, 1.3), s(1.1, 0.2), s(1.1, 0.9)]]
    np.testing.assert_allclose(loss, sum(map(nll, expected)) / 2, rtol=1e-5)


def test_the_loss_is_that_of_the_released_code() -> None:
    """Its steps in PyTorch: cosines of first vectors to second and third ones side by side, over the temperature, the
    weight added on the diagonal of the third, and cross-entropy with the row's number as class."""
    torch = pytest.importorskip("torch")
    z = np.random.default_rng(0).normal(size=(5, 3, 4)).astype(np.float32)
    z1, z2, z3 = (torch.tensor(z[:, i]) for i in range(3))
    cosine = torch.nn.CosineSimilarity(dim=-1)
    plain = cosine(z1[:, None], z2[None]) / 0.05
    hard = torch.cat([plain, cosine(z1[:, None], z3[None]) / 0.05], 1)
    hard[:, 5:] += 0.7 * torch.eye(5)
    labels = torch.arange(5)

    def loss(objective: SimCSE, vectors: Any) -> Any:
        rows, count = vectors.shape[:2]
        ids = jnp.arange(rows * count).reshape(rows, count)
        unit = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
        found, _ = objective.query_losses(_bi_encoder.Texts(jnp.asarray(unit), ids, jnp.ones_like(ids)))
        return jnp.mean(found)

    expected = torch.nn.functional.cross_entropy(plain, labels)
    np.testing.assert_allclose(loss(SimCSE(), z[:, :2]), expected, rtol=1e-5)
    expected = torch.nn.functional.cross_entropy(hard, labels)
    objective = SimCSE(supervised=True, negatives=1, hard_negative_weight=0.7)
    np.testing.assert_allclose(loss(objective, z), expected, rtol=1e-5)


def test_where_the_head_is() -> None:
    """The head of `found` maps (c, s) to (s, -2 c)."""

    def vector(objective: SimCSE, train: bool) -> Any:
        rows = sentences() if not objective.supervised else texts([[0, 1]], [[2, 2]])
        return found(objective, rows, [[0.5, 0.5]] * len(rows["tokens"]), train)[0].outputs["embeddings"][0, 0]

    bare = np.asarray([math.cos(0.5), math.sin(0.5)])
    headed = np.asarray([math.sin(0.5), -2 * math.cos(0.5)])
    headed /= np.linalg.norm(headed)
    for settings, in_training, in_evaluation in (
        ({}, headed, bare),
        ({"supervised": True}, headed, headed),
        ({"pooling": "mean"}, bare, bare),
        ({"head": "always"}, headed, headed),
        ({"head": "none"}, bare, bare),
        ({"supervised": True, "head": "train_only", "pooling": "mean"}, headed, bare),
    ):
        objective = SimCSE(**settings)
        np.testing.assert_allclose(vector(objective, True), in_training, rtol=1e-5)
        np.testing.assert_allclose(vector(objective, False), in_evaluation, rtol=1e-5)
        assert ("heads" in objective.roles) == (in_training is headed)


def test_the_head_is_dense_and_tanh() -> None:
    style = HeadStyle(2, "gelu", 1e-5, nnx.initializers.normal(1.0), jnp.float32)
    head: Any = SimCSE().build_heads(style, VOCAB, nnx.Rngs(params=0))
    x = jnp.asarray([[[0.3, -0.2], [0.1, 0.5]]])
    (kernel,) = [leaf for leaf in jax.tree.leaves(nnx.to_pure_dict(nnx.state(head))) if leaf.ndim == 2]
    np.testing.assert_allclose(head(x), np.tanh(np.asarray(x) @ np.asarray(kernel)), rtol=1e-6)
    assert SimCSE().roles == {"model": Role.TRAINABLE, "heads": Role.TRAINABLE}


def test_views_differ_by_dropout_alone() -> None:
    """A sentence's two vectors: equal without dropout, and with it as different as those of two draws."""
    rows = sentences()
    config = EncoderConfig(layers=1, width=16, heads=2, max_length=16, vocab_multiple=1, init_std=0.3)
    noise_keys, ctx = context(rows, train=True)
    model = config.build(VOCAB, nnx.Rngs(params=0))

    @jax.jit
    def vectors(ctx: Any) -> Any:
        return PLAIN.embed({"model": model}, PLAIN.corrupt(noise_keys, rows, ctx), ctx)[:3]

    still = vectors(dataclasses.replace(ctx, train=False))
    np.testing.assert_allclose(still[:, 0], still[:, 1], atol=1e-6)
    views = vectors(ctx)
    cosines = np.sum(np.asarray(views[:, 0] * views[:, 1]), -1)
    assert np.all(cosines < 0.99)
    assert np.all(cosines > 0.3)


def test_rows_asked_for() -> None:
    assert SimCSE().rows(VOCAB, 65) == RowSpec("examples", 32, (4,), (5,))
    assert SimCSE(supervised=True, negatives=1).rows(VOCAB, 32) == RowSpec(
        "texts", 32, (4,), (5,), ("text_ids",), texts=3
    )
    assert (SimCSE().task, SimCSE().judged_by) == (None, "loss")
    assert (SimCSE(supervised=True).task, SimCSE(supervised=True).judged_by) == ("retrieval", "mrr_at_10")


def test_a_model_without_dropout_is_refused() -> None:
    silent = EncoderConfig(dropout=0.0, attention_dropout=0.0, embedding_dropout=0.0)
    with pytest.raises(UserError, match=r"model\.dropout, model\.attention_dropout, .* are 0.*model\.dropout=0\.1"):
        SimCSE().check_model(silent)
    member = Mixture(members={"a": Member(SimCSE()), "b": Member(MaskedLM())})
    with pytest.raises(UserError, match=r"objective\.members\.a: model\.dropout"):
        member.check_model(silent)
    with pytest.raises(UserError, match=r"model\.dropout, model\.embedding_dropout are 0"):
        SimCSE().check_model(GRUConfig())
    SimCSE().check_model(dataclasses.replace(silent, embedding_dropout=0.1))
    SimCSE().check_model(object())  # a model of one's own that does not say
    SimCSE(supervised=True).check_model(DecoderConfig())


def test_what_cannot_be_done_is_refused() -> None:
    for settings, message in (
        ({"temperature": 0.0}, r"temperature is 0\.0"),
        ({"head": "sometimes"}, "head is 'sometimes'; accepted: train_only, always, none"),
        ({"equal_texts": "kept", "supervised": True}, "equal_texts is 'kept'; accepted: negatives, left_out"),
        ({"equal_texts": "left_out"}, "equal_texts is 'left_out' and objective.supervised is false"),
        ({"negatives": 1}, "negatives is 1 and objective.supervised is false"),
        ({"supervised": True, "hard_negative_weight": 1.0}, r"hard_negative_weight is 1\.0 and objective\.negatives"),
        (
            {"supervised": True, "negatives": 1, "hard_negative_weight": math.inf},
            "hard_negative_weight is inf; it must be a finite",
        ),
        ({"attention": "causal"}, "first token sees nothing"),
    ):
        with pytest.raises(UserError, match=message):
            SimCSE(**settings)
    with pytest.raises(UserError, match=r"data.length is 5, half of which is a sentence; accepted: 6 or more"):
        SimCSE().rows(VOCAB, 5)
    with pytest.raises(UserError, match=r"no \[CLS\]"):
        SimCSE().rows(dataclasses.replace(VOCAB, cls=None), 32)


@pytest.mark.slow
def test_sentences_are_told_apart() -> None:
    """Held-out rows are measured without dropout, where views are equal: the loss is how near the others are. A model
    that knows sentences by their words pushes them apart: far below log 16, that of vectors that are all alike."""
    language = Topics(words=24, topics=4, length=8)
    batches, held_out = language.batches(steps=150)
    builder = dataclasses.replace(ENCODER, dropout=0.1, attention_dropout=0.1)
    metrics = learn(SimCSE(), builder, language.vocab, batches, held_out, lr=3e-3)
    assert metrics["accuracy"] > 0.97
    assert metrics["term/contrastive"] < 0.3


def _symmetric(losses_of: Callable[..., Any]) -> Callable[..., Any]:
    def changed(self: Any, texts: Any) -> Any:
        loss, correct = losses_of(self, texts)
        back, _ = losses_of(self, texts._replace(embeddings=texts.embeddings[:, ::-1]))
        return (loss + back) / 2, correct

    return changed


def _same_place(twice: Callable[..., Any]) -> Callable[..., Any]:
    """Both views at the same places of rows of their own, with the row's dropout: the second is a copy of the first."""

    def changed(self: Any, models: Any, example: Any, ctx: Any) -> Any:
        views = twice(self, models, example, ctx)
        return jnp.broadcast_to(views[:, :1], views.shape)

    return changed


BY_HAND = (test_the_loss_by_hand, test_the_paper_by_hand)
MUTANTS = [
    (Mutant("the same dropout for both views", SimCSE, "embed", _same_place), (test_views_differ_by_dropout_alone,)),
    (
        Mutant(
            "temperature is ignored",
            _bi_encoder.losses,
            "similarity_stats",
            lambda stats: lambda s, t, *, temperature, **more: stats(s, t, **more),
        ),
        BY_HAND,
    ),
    (Mutant("both directions", SimCSE, "query_losses", _symmetric), BY_HAND),
    (
        Mutant("first views are candidates too", _simcse, "similarities", lambda f: lambda t: _with_first(f, t)),
        BY_HAND,
    ),
    (Mutant("no unit vectors", _simcse.losses, "unit_vectors", lambda _: lambda x: x), BY_HAND),
    (
        Mutant("equal texts are left out", SimCSE, "__post_init__", lambda _: _left_out),
        (test_equal_sentences_are_negatives, test_hard_negatives_by_hand),
    ),
    (
        Mutant(
            "a hard negative has no weight",
            SimCSE,
            "query_losses",
            lambda f: lambda self, t: f(dataclasses.replace(self, hard_negative_weight=0.0), t),
        ),
        (test_hard_negatives_by_hand,),
    ),
]


def _with_first(similarities: Callable[..., Any], texts: Any) -> Any:
    """The first view of the next row in place of its second."""
    rolled = jnp.roll(texts.embeddings[:, :1], 1, axis=0)
    mixed = texts._replace(embeddings=jnp.concatenate([texts.embeddings[:, :1], rolled], 1))
    size = len(texts.embeddings)
    return jnp.where(jnp.eye(size, dtype=bool)[..., None], similarities(texts), similarities(mixed))


def _left_out(self: Any) -> None:
    object.__setattr__(self, "equal_texts", "left_out")


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
