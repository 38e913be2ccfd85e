"""Fill in the middle by hand: targets, bytes and middles of both orders; causal LM otherwise; and it learns."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import noise, objectives
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import DecoderConfig
from lmobj.objectives import CausalLM, Context, Example, FillInMiddle, _causal_lm, _fill_in_middle, step_keys
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import DECODER, FIRST, learn, vocabulary
from tests.objectives.uniform import Uniform

PRE, SUF, MID, EOS = 16, 17, 18, 3
VOCAB = Vocabulary(size=19, pad=0, eos=EOS, fim_prefix=PRE, fim_suffix=SUF, fim_middle=MID)
KEY = jax.random.key(0, impl="threefry2x32")
SMALL = DecoderConfig(layers=1, width=16, heads=2, max_length=64, vocab_multiple=1, init_std=0.3, remat="none")


def make_rows(rows: int = 2048) -> dict[str, Any]:
    """The end of a document, a whole one and the start of a third: x | a b c EOS | y z, and padding."""
    tokens = jnp.tile(jnp.asarray([7, 8, 9, 10, EOS, 11, 12, 0]), (rows, 1))
    segments = jnp.tile(jnp.asarray([1, 2, 2, 2, 2, 3, 3, 0]), (rows, 1))
    ids = jnp.stack([jnp.zeros(rows, jnp.int32), jnp.arange(rows, dtype=jnp.int32)], 1)
    bytes_ = jnp.tile(jnp.asarray([10, 20, 30, 40, 0, 50, 60, 0]), (rows, 1))
    positions = jnp.tile(jnp.asarray([0, 0, 1, 2, 3, 0, 1, 0]), (rows, 1))
    return {"tokens": tokens, "segment_ids": segments, "positions": positions, "row_ids": ids, "token_bytes": bytes_}


def corrupted(objective: Any, batch: dict[str, Any]) -> tuple[Example, Context]:
    keys, model = step_keys(KEY, batch["row_ids"], 0)
    ctx = Context(model, 0, VOCAB, train=False)
    return objective.corrupt(keys, batch, ctx), ctx


def found_rows(objective: FillInMiddle, *tokens: int) -> list[dict[str, list[Any]]]:
    """What the example has for those of many rows that became these tokens, each once; without padding."""
    example, _ = corrupted(objective, make_rows())
    padded = [*tokens, *[0] * (example.inputs.shape[1] - len(tokens))]
    where = np.flatnonzero((np.asarray(example.inputs) == padded).all(axis=1))
    arrays = {"targets": example.targets, "weights": example.weights, "positions": example.positions, **example.extra}
    assert example.mask.segment_ids is not None
    arrays["segments"] = example.mask.segment_ids
    found: list[dict[str, list[Any]]] = []
    for row in where:
        assert not np.asarray(example.weights)[row, len(tokens) :].any()
        one = {name: np.asarray(x)[row, : len(tokens)].astype(int).tolist() for name, x in arrays.items()}
        found += [one] if one not in found else []
    return found


def test_psm_by_hand() -> None:
    """x | PRE a SUF c MID b EOS | y z. The bytes are those of the targets; nothing is predicted across documents."""
    rows = found_rows(FillInMiddle(spm_rate=0.0), 7, PRE, 8, SUF, 10, MID, 9, EOS, 11, 12)
    assert rows == [
        {
            "segments": [1, 2, 2, 2, 2, 2, 2, 2, 3, 3],
            "positions": [0, 0, 1, 2, 3, 4, 5, 6, 0, 1],
            "targets": [PRE, 8, SUF, 10, MID, 9, EOS, 11, 12, 0],
            "weights": [0, 1, 1, 1, 1, 1, 1, 0, 1, 0],
            "target_bytes": [0, 20, 0, 40, 0, 30, 0, 50, 60, 0],
            "in_middle": [0, 0, 0, 0, 0, 1, 1, 0, 0, 0],
            "in_place": [0, 0, 0, 0, 0, 0, 0, 1, 1, 1],
        }
    ]


def test_spm_by_hand() -> None:
    """x | PRE SUF c MID a b EOS | y z. The row does not tell prefix and middle apart: that is b, a b or nothing."""
    tokens = (7, PRE, SUF, 10, MID, 8, 9, EOS, 11, 12)
    rows = found_rows(FillInMiddle(), *tokens)
    for row in rows:
        assert row["targets"] == [*tokens[1:], 0]
        assert row["weights"] == [0, 1, 1, 1, 1, 1, 1, 0, 1, 0]
        assert row["target_bytes"] == [0, 0, 40, 0, 20, 30, 0, 50, 60, 0]
        assert row["in_place"] == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    middles = [[0, 0, 0, 0, *ab, 1, 0, 0, 0] for ab in ((0, 0), (0, 1), (1, 1))]
    assert sorted(row["in_middle"] for row in rows) == middles


def test_a_document_without_its_end() -> None:
    """x | a b c EOS | PRE y z SUF MID: nothing is in the middle, and no end of it is predicted."""
    (row,) = found_rows(FillInMiddle(), 7, 8, 9, 10, EOS, PRE, 11, 12, SUF, MID)
    assert row["in_middle"] == [0] * 10
    assert row["weights"] == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0]
    assert row["in_place"] == [1, 1, 1, 1, 0, 0, 0, 0, 0, 1]


def test_joined_rows_run_on() -> None:
    """The middle is still the document's own; EOS is followed by the next document's first token."""
    (row,) = found_rows(FillInMiddle(spm_rate=0.0, documents="joined"), 7, PRE, 8, SUF, 10, MID, 9, EOS, 11, 12)
    assert row["segments"] == [1] * 10
    assert row["positions"] == list(range(10))
    assert row["weights"] == [1] * 9 + [0]
    assert row["in_middle"] == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]


def test_every_document_comes_back() -> None:
    example, _ = corrupted(FillInMiddle(fim_rate=0.8, max_documents=3), make_rows())
    assert example.mask.segment_ids is not None
    marks = {"prefix_id": PRE, "suffix_id": SUF, "middle_id": MID, "eos": EOS}
    for tokens, segments in zip(np.asarray(example.inputs), np.asarray(example.mask.segment_ids), strict=True):
        restored = [noise.join_middle(tokens[segments == s], **marks).tolist() for s in (1, 2, 3)]
        assert restored == [[7], [8, 9, 10, EOS], [11, 12]]


def losses_of(objective: Any, batch: dict[str, Any], gradient: bool = False) -> tuple[dict[str, float], Any]:
    """Metrics as quotients, and where asked for the gradient of the term, of a small decoder in float64."""
    with jax.enable_x64(True):
        config = dataclasses.replace(SMALL, dtype="float64", param_dtype="float64")
        graph, params = nnx.split(config.build(VOCAB, nnx.Rngs(params=0)))
        example, ctx = corrupted(objective, batch)

        def loss(params: Any) -> Any:
            terms = objective.terms({"model": nnx.merge(graph, params)}, example, (), ctx)
            return terms.sums["nll"], terms.metrics

        slope = None
        if gradient:
            (_, metrics), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        else:
            _, metrics = jax.jit(loss)(params)
        return {name: float(a) / float(b) for name, (a, b) in metrics.items() if b > 0}, slope


def assert_close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), a, b)


def test_without_moves_it_is_causal_lm() -> None:
    settings: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-3}
    batch = make_rows(4)
    plain, gradient = losses_of(CausalLM(**settings), batch, gradient=True)
    found, same = losses_of(FillInMiddle(fim_rate=0.0, **settings), batch, gradient=True)
    assert found.pop("moved") == 0
    assert found.keys() == plain.keys() == {"nll", "accuracy", "bits_per_byte"}
    assert_close(found, plain)
    assert_close(same, gradient)


def test_moved_rows_are_those_of_causal_lm_on_the_moved_text() -> None:
    """Every row's documents, rearranged by the noise alone, in rows of the causal LM; documents apart from each other,
    of which the figures of the middle and of those in place are sums."""
    objective, batch = FillInMiddle(fim_rate=0.6, max_documents=3), make_rows(16)
    found, _ = losses_of(objective, batch)
    keys, _ = step_keys(KEY, batch["row_ids"], 0)
    marks = {"prefix_id": PRE, "suffix_id": SUF, "middle_id": MID}
    rows = [
        noise.fill_in_middle(key, t, s, max_documents=3, fim_rate=0.6, eos=EOS, **marks)
        for key, t, s in zip(keys, batch["tokens"], batch["segment_ids"], strict=True)
    ]
    tokens, segments, positions, moved, middle, source = (np.stack(x) for x in zip(*rows, strict=True))
    text = {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(segments), "positions": jnp.asarray(positions)}
    text |= {"row_ids": batch["row_ids"]}
    plain, _ = losses_of(CausalLM(), text)
    assert_close({name: found[name] for name in plain}, plain)
    # The ends of those that were moved follow their middles.
    middle |= moved & (tokens == EOS)
    infilled, _ = losses_of(CausalLM(), text | {"loss_mask": jnp.asarray(middle, jnp.float32)})
    assert_close([found["middle_nll"], found["middle_accuracy"]], [infilled["nll"], infilled["accuracy"]])
    place = np.asarray([10, 20, 30, 40, 0, 50, 60, 0])[source] * ~moved
    text |= {"loss_mask": jnp.asarray(~moved, jnp.float32), "token_bytes": jnp.asarray(place)}
    assert_close(found["bits_per_byte"], losses_of(CausalLM(), text)[0]["bits_per_byte"])
    inside = segments == np.pad(segments[:, :-1], ((0, 0), (1, 0)))
    assert found["moved"] == pytest.approx(np.sum(inside & moved) / np.sum(inside & (segments > 0)))


def test_even_guesses_cost_what_they_should() -> None:
    """log 19 for each token; of those in place that is log2 19 bits for their mean bytes."""
    objective = FillInMiddle()
    example, ctx = corrupted(objective, make_rows(8))
    terms = objective.terms({"model": Uniform(VOCAB.size)}, example, (), ctx)
    values = {name: float(a / b) for name, (a, b) in terms.metrics.items()}
    assert values["nll"] == pytest.approx(math.log(19), rel=1e-6)
    assert values["middle_nll"] == pytest.approx(math.log(19), rel=1e-6)
    place = np.asarray(example.weights * example.extra["in_place"])
    size = np.sum(place * np.asarray(example.extra["target_bytes"])) / np.sum(place)
    assert values["bits_per_byte"] == pytest.approx(math.log2(19) / size, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"fim_rate": 1.5}, "fim_rate is 1.5"),
        ({"spm_rate": -0.5}, "spm_rate is -0.5"),
        ({"max_documents": 0}, "max_documents is 0"),
        ({"documents": "apart"}, "documents is 'apart'"),
        ({"z_loss": -1.0}, "z_loss is -1.0"),
    ],
    ids=["rate", "order", "none", "documents", "z-loss"],
)
def test_settings_that_cannot_be(settings: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=f"objective.{key}"):
        FillInMiddle(**settings)


def test_rows_leave_room_for_markers() -> None:
    rows = FillInMiddle(max_documents=5).rows(VOCAB, 64)
    assert (rows.layout, rows.length, rows.suffix, rows.fields) == ("packed", 49, (EOS,), ("token_bytes",))
    with pytest.raises(UserError, match=r"needs <fim_prefix> and .*set data.tokenizer.infilling_marks to true"):
        FillInMiddle().rows(Vocabulary(size=9, eos=3), 64)
    with pytest.raises(UserError, match="the vocabulary has none; set a tokenizer"):
        FillInMiddle().rows(dataclasses.replace(VOCAB, eos=None), 64)
    with pytest.raises(UserError, match=r"data.length is 13, .* a length of at least 14"):
        FillInMiddle().rows(VOCAB, 13)
    assert FillInMiddle().rows(VOCAB, 14).length == 2


def test_what_it_is_judged_by() -> None:
    assert FillInMiddle().judged_by == "bits_per_byte"
    assert FillInMiddle(fim_rate=1.0).judged_by == FillInMiddle(documents="joined").judged_by == "loss"
    assert FillInMiddle().causal
    assert objectives.REGISTRY["fill_in_middle"] is FillInMiddle


def _without_ends(f: Any) -> Any:
    return lambda *a, **k: (lambda x: x._replace(is_moved=jnp.zeros_like(x.is_moved)))(f(*a, **k))


MUTANTS = [
    Mutant("documents are said to be in place", noise, "fill_in_middle", _without_ends),
    Mutant(
        "bytes stay where they were",
        noise,
        "fill_in_middle",
        lambda f: lambda *a, **k: (lambda x: x._replace(source=jnp.arange(x.source.size) % 8))(f(*a, **k)),
    ),
    Mutant(
        "the end of a document moves with its middle",
        noise,
        "fill_in_middle",
        lambda f: lambda *a, **k: f(*a, **{**k, "eos": None}),
    ),
    Mutant("in the middle is the input", _fill_in_middle, "ahead", lambda _: lambda x: x),
    Mutant("targets are the inputs", _causal_lm, "ahead", lambda _: lambda x, places=1: x),
    Mutant("bytes of all documents", _fill_in_middle, "bits_per_byte", lambda f: lambda n, w, b: f(n, w + 1, b)),
]
CHECKS = [test_psm_by_hand, test_even_guesses_cost_what_they_should]


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, CHECKS)


@dataclass(frozen=True)
class Zeros:
    """Rows of four documents a b c EOS whose words add up to 0 modulo `words`: any one is told by the two others.

    What follows MID in a document whose middle has k words, and it has k = 0 .. 3 of cuts drawn from 0 .. 3 in 4, 6, 4
    and 2 of 16 cases: k words, of which the last is known to whoever sees prefix and suffix and the others are
    anybody's guess, and EOS, which is known by the number of words. Right of 16 x (20/16 + 1) = 36:

        ceiling = (12 + 8 / words + 16) / 36

    Who does not see the suffix knows the last word only where there is none, in 6 cases (a cut at the end, of whatever
    size but 0), and who does not see the prefix likewise: (6 + 14 / words + 16) / 36.
    """

    words: int = 5

    @property
    def vocab(self) -> Vocabulary:
        """Of the language, with markers."""
        size = FIRST + self.words
        marks = {"fim_prefix": size, "fim_suffix": size + 1, "fim_middle": size + 2}
        return dataclasses.replace(vocabulary(self.words), size=size + 3, **marks)

    @property
    def ceiling(self) -> float:
        """Best accuracy on middles and their ends."""
        return (12 + 8 / self.words + 16) / 36

    @property
    def one_sided(self) -> float:
        """That of who sees one side."""
        return (6 + 14 / self.words + 16) / 36

    def batches(self, steps: int, rows: int = 16, *, held_out: int = 32) -> tuple[dict[str, Any], dict[str, Any]]:
        """(training, held-out) batches [steps, rows, 16]."""
        draw = np.random.default_rng(0)
        return self._batches(draw, steps, rows), self._batches(draw, held_out, rows)

    def _batches(self, draw: np.random.Generator, steps: int, rows: int) -> dict[str, Any]:
        shape = (steps, rows)
        ab = draw.integers(0, self.words, (*shape, 4, 2))
        words = np.concatenate([ab, -ab.sum(-1, keepdims=True) % self.words], axis=-1) + FIRST
        tokens = np.concatenate([words, np.full((*shape, 4, 1), EOS)], axis=-1).reshape(*shape, 16)
        numbers = np.arange(steps * rows).reshape(shape)
        arrays = {
            "tokens": tokens,
            "segment_ids": np.broadcast_to(1 + np.arange(16) // 4, tokens.shape),
            "positions": np.broadcast_to(np.arange(16) % 4, tokens.shape),
            "row_ids": np.stack([np.zeros_like(numbers), numbers], axis=-1),
        }
        return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


def test_the_ceiling_by_enumeration() -> None:
    """Of all cuts: which words and ends of middles are known, from both sides and from one."""
    language, both, one, total = Zeros(), 0.0, 0.0, 0
    for cuts in itertools.product(range(4), repeat=2):
        low, high = sorted(cuts)
        k, guess = high - low, 1 / language.words
        total += k + 1
        both += 1 + (k > 0) * (1 + (k - 1) * guess)
        one += 1 + (k > 0) * ((1 if high == 3 else guess) + (k - 1) * guess)
    assert (both / total, one / total) == pytest.approx((language.ceiling, language.one_sided))


@pytest.mark.parametrize(
    ("spm_rate", "steps"),
    [
        pytest.param(0.5, 400, id="both orders"),
        # PSM alone takes longer: what goes before the middle is far from it.
        pytest.param(0.0, 1000, id="psm", marks=pytest.mark.slow),
        pytest.param(1.0, 600, id="spm", marks=pytest.mark.slow),
    ],
)
def test_it_learns_middles_from_both_sides(spm_rate: float, steps: int) -> None:
    language = Zeros()
    objective = FillInMiddle(fim_rate=0.9, spm_rate=spm_rate)
    metrics = learn(objective, DECODER, language.vocab, *language.batches(steps, held_out=64), lr=1e-2)
    assert abs(metrics["middle_accuracy"] - language.ceiling) < 0.04
