"""Replaced token detection by hand: what is drawn, labelled, weighed and seen; where gradients stop; what is learnt."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import stats

from lmobj import losses, masks, noise
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import ElectraConfig, EncoderConfig, OutputHead
from lmobj.models import _electra as electra_module
from lmobj.objectives import (
    Context,
    Example,
    ReplacedTokenDetection,
    Terms,
    denominators,
    loss_fn,
    step_keys,
    total_loss,
)
from tests.mutants import Mutant, assert_killed
from tests.objectives import contract
from tests.objectives.learning import ENCODER, Topics, learn

VOCAB = Vocabulary(size=16, pad=0, eos=3, cls=4, sep=5, mask=6)
CHANGED = 15
"""An id that no row has."""
KEY = jax.random.key(0, impl="threefry2x32")
OBJECTIVE = ReplacedTokenDetection(mask_rate=0.3)


class Pair:
    """A generator for which every token is equally likely but for `favourite`, and a discriminator that names CHANGED
    tokens, with a log-odds of 4, and [CLS]."""

    def __init__(self, favourite: float = 0.0) -> None:
        self.bias = jnp.zeros(VOCAB.size).at[9].set(favourite)

    def generator_hidden(self, tokens: Any, **given: Any) -> Any:
        self.generator_read = tokens, given
        return jnp.zeros((*tokens.shape, 4))

    def generator_head_hidden(self, hidden: Any) -> Any:
        self.head_read = hidden
        return hidden

    def generator_head_table(self) -> OutputHead:
        return OutputHead(jnp.ones((VOCAB.size, 4)), self.bias)

    def discriminator_hidden(self, tokens: Any, **given: Any) -> Any:
        self.discriminator_read = tokens, given
        return tokens[..., None]

    def discriminate(self, hidden: Any) -> Any:
        named = (hidden[..., 0] == CHANGED) | (hidden[..., 0] == VOCAB.cls)
        return jnp.where(named, 4.0, -4.0)


def batch() -> dict[str, Any]:
    """Row 0: [CLS] 8 words [SEP]. Row 1: [CLS] 2 words [SEP] and padding. All samples are CHANGED."""
    words = jnp.asarray([[4, 7, 8, 9, 10, 11, 12, 13, 14, 5], [4, 7, 8, 5, 0, 0, 0, 0, 0, 0]])
    segments = jnp.asarray([[1] * 10, [1] * 4 + [0] * 6])
    return {
        "tokens": words,
        "segment_ids": segments,
        "positions": jnp.arange(10) * segments,
        "row_ids": jnp.asarray([[0, 0], [0, 1]]),
        "sampled": jnp.full((2, 3), CHANGED),
    }


def run(
    objective: ReplacedTokenDetection, rows: dict[str, Any], model: Pair, *, train: bool = False
) -> tuple[Example, Terms]:
    noise_keys, model_keys = step_keys(KEY, rows["row_ids"], 0)
    ctx = Context(model_keys, 0, VOCAB, train=train)
    example = objective.corrupt(noise_keys, rows, ctx)
    return example, objective.terms({"model": model}, example, (), ctx)


def test_the_generator_reads_masks_and_predicts_what_was_drawn() -> None:
    """round(0.3 * 10) = 3 slots, of which all and round(0.3 * 4) = 1 are used."""
    model, rows = Pair(), batch()
    example, terms = run(ReplacedTokenDetection(mask_rate=0.3, mask_share=1.0), rows, model)
    np.testing.assert_array_equal(example.weights, [[1, 1, 1], [1, 0, 0]])
    original = jnp.take_along_axis(rows["tokens"], example.predict, axis=1)
    np.testing.assert_array_equal(example.targets[0], original[0])
    assert int(example.targets[1, 0]) == original[1, 0] >= 7
    assert int(example.targets[0].min()) >= 7
    drawn = [
        set(np.asarray(p)[np.asarray(w) > 0].tolist()) for p, w in zip(example.predict, example.weights, strict=True)
    ]
    hidden = [set(np.flatnonzero(row).tolist()) for row in np.asarray(model.generator_read[0] != rows["tokens"])]
    assert hidden == drawn
    assert (model.generator_read[0] == VOCAB.mask).sum() == sum(map(len, drawn))
    assert model.head_read.shape == (2, 3, 4)  # the vocabulary head runs on the slots alone
    np.testing.assert_allclose(terms.sums["mlm"], 4 * math.log(16), rtol=1e-6)
    np.testing.assert_allclose(terms.metrics["mlm_nll"], (4 * math.log(16), 4), rtol=1e-6)


def test_the_discriminator_judges_every_token_that_is_no_padding() -> None:
    model, rows = Pair(), batch()
    example, terms = run(OBJECTIVE, rows, model)
    tokens, given = model.discriminator_read
    changed = np.zeros((2, 10), bool)
    for row, slots in ((0, 3), (1, 1)):
        changed[row, np.asarray(example.predict)[row, :slots]] = True
    # It reads the samples in the original row, no mask and no padding slot, by the same mask and positions.
    np.testing.assert_array_equal(tokens, np.where(changed, CHANGED, rows["tokens"]))
    assert set(given) == {"mask", "positions", "token_types", "dropout"}
    assert given["mask"] is model.generator_read[1]["mask"]
    sees = np.broadcast_to(given["mask"].dense(10, 10), (2, 1, 10, 10))[:, 0]
    assert sees[0].all()
    assert sees[1, :4, :4].all()
    assert not sees[1, :4, 4:].any()
    # 14 tokens, all judged rightly at a log-odds of 4 but both [CLS], which are named at a log-odds of 4.
    right, wrong = math.log1p(math.exp(-4)), math.log1p(math.exp(4))
    np.testing.assert_allclose(terms.sums["disc"], 12 * right + 2 * wrong, rtol=1e-6)
    count = int(changed.sum())
    metrics = {name: tuple(map(float, terms.metrics[name])) for name in terms.metrics}
    assert metrics["disc_accuracy"] == (12, 14)
    assert metrics["disc_precision"] == (count, count + 2)
    assert metrics["disc_recall"] == (count, count)
    assert metrics["replaced"] == (count, 14)
    # L = (4 log 16) / (4 + 1e-6) + 50 (12 right + 2 wrong) / (14 + 1e-6); epsilons of this size show in float64 alone.
    shared = denominators(OBJECTIVE, example)
    loss = total_loss(terms, shared, OBJECTIVE.coefficients)
    np.testing.assert_allclose(loss, math.log(16) + 50 * (12 * right + 2 * wrong) / 14, rtol=1e-5)
    with jax.enable_x64(True):
        wide = dataclasses.replace(
            example,
            weights=np.asarray(example.weights, float),
            extra={"present": np.asarray(example.extra["present"], float)},
        )
        assert denominators(OBJECTIVE, wide) == {"mlm": 4 + 1e-6, "disc": 14 + 1e-6}


def test_a_sample_that_is_the_original_is_not_replaced() -> None:
    rows = batch()
    example, _ = run(OBJECTIVE, rows, Pair())
    model = Pair()
    _, terms = run(OBJECTIVE, rows | {"sampled": example.targets}, model)
    np.testing.assert_array_equal(model.discriminator_read[0], rows["tokens"])
    assert float(terms.metrics["replaced"][0]) == 0
    right, wrong = math.log1p(math.exp(-4)), math.log1p(math.exp(4))
    np.testing.assert_allclose(terms.sums["disc"], 12 * right + 2 * wrong, rtol=1e-6)


def test_recorded_samples_replay_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    sample = losses.linear_gumbel_sample
    monkeypatch.setattr(losses, "linear_gumbel_sample", lambda *a, **k: drawn.append(sample(*a, **k)) or drawn[-1])
    rows = batch()
    del rows["sampled"]
    first, again, other = Pair(), Pair(), Pair()
    _, terms = run(OBJECTIVE, rows, first)
    _, replayed = run(OBJECTIVE, rows | {"sampled": drawn[0]}, again)
    assert len(drawn) == 1
    np.testing.assert_array_equal(first.discriminator_read[0], again.discriminator_read[0])
    assert terms.sums == replayed.sums
    run(OBJECTIVE, rows | {"sampled": (drawn[0] + 1) % 16}, other)
    assert (first.discriminator_read[0] != other.discriminator_read[0]).any()


def many_rows(rows: int = 34_000) -> dict[str, Any]:
    """Rows of [CLS] 8 words [SEP], without recorded samples."""
    one = {name: x[:1] for name, x in batch().items() if name != "sampled"}
    many = {name: jnp.broadcast_to(x, (rows, *x.shape[1:])) for name, x in one.items()}
    return many | {"row_ids": jnp.stack([jnp.zeros(rows, jnp.int32), jnp.arange(rows, dtype=jnp.int32)], 1)}


def sampled_by(objective: ReplacedTokenDetection, model: Pair) -> tuple[np.ndarray, np.ndarray]:
    """(originals, samples) of all positions that were drawn: 102,000 slots."""
    rows = many_rows()
    example, _ = run(objective, rows, model)
    at = np.asarray(example.predict)
    return tuple(np.take_along_axis(np.asarray(x), at, 1) for x in (rows["tokens"], model.discriminator_read[0]))


def test_samples_follow_the_generator_and_its_temperature() -> None:
    # Special tokens are tokens too. Without replacement, so that no sample counts twice.
    objective = dataclasses.replace(OBJECTIVE, replacement=False)
    _, even = sampled_by(objective, Pair())
    assert even.size > 1e5
    assert stats.chisquare(np.bincount(even.ravel(), minlength=16)).pvalue > 1e-3
    # Token 9 with a logit of 2: e^2 / (e^2 + 15) = 0.330 of the draws at temperature 1, e / (e + 15) = 0.153 at 2.
    for temperature, share in ((1.0, 1 / (1 + 15 * math.exp(-2))), (2.0, 1 / (1 + 15 * math.exp(-1))), (0.01, 1.0)):
        _, drawn = sampled_by(dataclasses.replace(objective, temperature=temperature), Pair(favourite=2.0))
        assert abs(np.mean(drawn == 9) - share) <= 4 * math.sqrt(share * (1 - share) / drawn.size)


def test_the_correct_token_can_be_ruled_out() -> None:
    original, drawn = sampled_by(OBJECTIVE, Pair())
    assert 0 < np.mean(original == drawn) < 0.2  # 1 / 16
    original, drawn = sampled_by(dataclasses.replace(OBJECTIVE, disallow_correct=True), Pair(favourite=9.0))
    assert (original != drawn).all()
    assert np.mean(drawn == 9) > 0.7  # all but where 9 itself was hidden, 1 / 8


def test_dropout_reaches_both_and_samples_have_seeds_of_their_own() -> None:
    model, rows = Pair(), many_rows()
    run(OBJECTIVE, rows, model, train=True)
    seeds = [read[1]["dropout"] for read in (model.generator_read, model.discriminator_read)]
    np.testing.assert_array_equal(*seeds)  # the model tells its trunks apart
    run(OBJECTIVE, rows, model)
    assert model.generator_read[1]["dropout"] is None
    # Equal rows, keys of their own: 400 of C(8, 3) 16^3 = 229,376 outcomes and more, hardly two alike.
    assert len(np.unique(np.asarray(model.discriminator_read[0][:400]), axis=0)) > 390


@pytest.mark.parametrize(
    ("settings", "vocab", "length", "message"),
    [
        ({"mask_rate": 0.0}, VOCAB, 16, r"mask_rate is 0\.0"),
        ({"mask_share": 1.2}, VOCAB, 16, r"mask_share is 1\.2"),
        ({"max_predictions": 0}, VOCAB, 16, "max_predictions is 0"),
        ({"temperature": 0.0}, VOCAB, 16, r"temperature is 0\.0"),
        ({"mask_rate": 0.9}, VOCAB, 8, r"selects 7 of the 6 ordinary tokens in a row of data\.length 8"),
        ({}, VOCAB, 3, "selects 1 of the 1 ordinary tokens"),
        ({}, Vocabulary(size=16), 16, r"needs \[MASK\]"),
    ],
)
def test_what_cannot_be_done_is_refused(settings: dict[str, Any], vocab: Vocabulary, length: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ReplacedTokenDetection(**settings).rows(vocab, length)


def test_rows_and_models() -> None:
    rows = ReplacedTokenDetection(layout="single").rows(VOCAB, 16)
    assert (rows.layout, rows.prefix, rows.suffix, rows.fields) == ("single", (4,), (5,), ())
    encoder = nnx.eval_shape(lambda: EncoderConfig(layers=1, width=8, heads=1).build(VOCAB, nnx.Rngs(0)))
    with pytest.raises(UserError, match=r"Encoder is one model; set model\.name to electra"):
        run(OBJECTIVE, batch(), encoder)  # type: ignore[arg-type]


REAL = ReplacedTokenDetection(mask_rate=0.3)


@functools.cache
def real_pair() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(graphs, params, batch) of the contract's tiny pair, which samples for itself."""
    builder = dataclasses.replace(contract.ELECTRA, layers=1, remat="none")
    graphs, params = contract.Case(REAL, {"model": builder}).models("float32")
    return graphs, params, contract.make_batch(rows=4)


def gradients() -> tuple[Any, Any, str]:
    """Gradients of `disc` alone and of `mlm` alone, and the compiled text."""
    graphs, params, rows = real_pair()

    def loss(params: Any, mlm: Any, disc: Any) -> Any:
        loss = loss_fn(REAL, graphs, contract.VOCAB, coefficients={"mlm": mlm, "disc": disc}, train=False)
        return loss(params, rows, KEY)[0]

    compiled = jax.jit(jax.grad(loss)).lower(params, 0.0, 1.0).compile()
    return compiled(params, 0.0, 1.0)["model"], compiled(params, 1.0, 0.0)["model"], str(compiled.as_text())


def largest(tree: Any) -> float:
    return max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(tree))


def test_no_gradient_passes_from_the_discriminator_to_the_generator() -> None:
    disc, mlm, text = gradients()
    for part in ("generator", "generator_head"):
        assert largest(disc[part]) == 0
        assert largest(mlm[part]) > 1e-4
    for part in ("discriminator", "discriminator_head"):
        assert largest(disc[part]) > 1e-4
        assert largest(mlm[part]) == 0
    assert largest(disc["embeddings"]) > 1e-4  # shared by both
    assert largest(mlm["embeddings"]) > 1e-4
    # round(0.3 * 16) = 5 slots in 4 rows: logits of 20 slots, and nowhere of all 64 tokens.
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    tokens = {math.prod(shape[:-1]) for shape in shapes if shape[-1] in (40, 128)}  # 40 ids, padded to 128
    assert 4 * 5 in tokens
    assert 4 * contract.LENGTH not in tokens


def test_documents_of_a_row_do_not_see_one_another() -> None:
    """What the two terms of one document are worth depends on all of its own tokens and on no other."""
    graphs, params, rows = real_pair()
    noise_keys, model_keys = step_keys(KEY, rows["row_ids"], 0)
    ctx = Context(model_keys, 0, contract.VOCAB, train=False)
    segments = rows["segment_ids"]
    (row,) = np.flatnonzero(np.asarray(segments).max(1) > 1)[:1]
    example = REAL.corrupt(noise_keys, rows, ctx)
    sampled = jnp.full_like(example.predict, 39)
    of_first = jnp.zeros_like(segments).at[row].set(segments[row] == 1)
    example = dataclasses.replace(
        example,
        weights=example.weights * jnp.take_along_axis(of_first, example.predict, 1),
        extra=example.extra | {"present": of_first.astype(jnp.float32), "sampled": sampled},
    )
    model = {"model": nnx.merge(graphs["model"], params["model"])}

    @jax.jit
    def sums(inputs: Any, original: Any) -> Any:
        changed = dataclasses.replace(example, inputs=inputs, extra=example.extra | {"original": original})
        return REAL.terms(model, changed, (), ctx).sums

    reference = sums(example.inputs, rows["tokens"])
    assert float(reference["disc"]) > 0
    for at in range(contract.LENGTH):
        inputs, original = (x.at[row, at].set(38) for x in (example.inputs, rows["tokens"]))
        inside = bool(of_first[row, at])
        read = sums(inputs, rows["tokens"]), sums(example.inputs, original)
        assert (read[0]["mlm"] != reference["mlm"]) == (inside and float(jnp.sum(example.weights)) > 0), at
        if at not in np.asarray(example.predict)[row]:  # there the sample hides it, and the label says so
            assert (read[1]["disc"] != reference["disc"]) == inside, at


LEARNER = ElectraConfig(
    **{f.name: getattr(ENCODER, f.name) for f in dataclasses.fields(EncoderConfig) if f.name != "name"},
    generator_fraction=1.0,
    generator_heads=2,
)


def test_both_learn_topics() -> None:
    """Of 12 tokens 6 are drawn, and at so high a temperature replaced evenly from all 15 ids.

    Drawn, a token becomes special (7/15) or of the other topic (4/15), and whoever sees the rest of the row knows that
    it was replaced; it becomes another word of the topic (3/15), which nothing gives away and which is best left
    unnamed, as 5 of 6 words of the topic are original; or it stays. So accuracy is 1 - 1/2 3/15 = 0.9, precision 1 and
    recall 11/14. Who sees single tokens is at 1 - 1/2 7/15 = 0.767; who sees the original, at 1.
    """
    language = Topics(length=12)
    objective = ReplacedTokenDetection(
        mask_rate=0.5, max_predictions=6, mask_share=1.0, replacement=False, temperature=1e4
    )
    metrics = learn(objective, LEARNER, language.vocab, *language.batches(steps=150, held_out=64), lr=1e-2)
    assert abs(metrics["mlm_accuracy"] - language.ceiling) < 0.03
    assert abs(metrics["disc_accuracy"] - 0.9) < 0.015
    assert metrics["disc_precision"] > 0.98
    assert abs(metrics["disc_recall"] - 11 / 14) < 0.03
    assert abs(metrics["replaced"] - 1 / 2 * 14 / 15) < 0.02


def _relabelled(label: Callable[[Any, Any, Any], Any]) -> Callable[[Any], Any]:
    """A replacement of `replace_tokens` with labels label(result, positions, weights)."""

    def mutated(replace: Any) -> Any:
        def new(tokens: Any, positions: Any, weights: Any, sampled: Any) -> Any:
            result = replace(tokens, positions, weights, sampled)
            return result._replace(replaced=label(result, positions, weights))

        return new

    return mutated


def _selected(result: Any, positions: Any, weights: Any) -> Any:
    return jnp.zeros_like(result.replaced).at[jnp.where(weights > 0, positions, 99)].set(True, mode="drop")


def _example(change: Callable[[Example], Example]) -> Callable[[Any], Any]:
    return lambda corrupt: lambda self, keys, batch, ctx: change(corrupt(self, keys, batch, ctx))


def _only_drawn(example: Example) -> Example:
    present = jax.vmap(_selected)(
        noise.ReplacedTokens(example.inputs, example.inputs < 0), example.predict, example.weights
    )
    return dataclasses.replace(example, extra=example.extra | {"present": present.astype(jnp.float32)})


def _original_masked(example: Example) -> Example:
    return dataclasses.replace(example, extra=example.extra | {"original": example.inputs})


def _nothing_excluded(sample: Any) -> Any:
    return lambda *args, excluded=None, **options: sample(*args, **options)


def _targets_shifted(mask: Any) -> Any:
    def mutated(*args: Any, **options: Any) -> Any:
        masked = mask(*args, **options)
        return masked._replace(targets=jnp.roll(args[1], -1)[masked.positions])

    return mutated


def _reads_the_generator(discriminator_hidden: Any) -> Any:
    """A discriminator that adds the generator's mean hidden state to its own."""

    def mutated(self: Any, tokens: Any, **options: Any) -> Any:
        return discriminator_hidden(self, tokens, **options) + jnp.mean(self.generator_hidden(tokens, **options))

    return mutated


BY_HAND = (
    test_the_generator_reads_masks_and_predicts_what_was_drawn,
    test_the_discriminator_judges_every_token_that_is_no_padding,
    test_a_sample_that_is_the_original_is_not_replaced,
    test_the_correct_token_can_be_ruled_out,
)
MUTANTS = [
    (Mutant("labels flipped", noise, "replace_tokens", _relabelled(lambda r, *_: ~r.replaced)), BY_HAND),
    (Mutant("label from selection", noise, "replace_tokens", _relabelled(_selected)), BY_HAND),
    (
        Mutant("weights over what was drawn", ReplacedTokenDetection, "corrupt", _example(_only_drawn)),
        BY_HAND,
    ),
    (
        Mutant("compared with the masked row", ReplacedTokenDetection, "corrupt", _example(_original_masked)),
        BY_HAND,
    ),
    (Mutant("target shifted", noise, "mask_tokens_electra", _targets_shifted), BY_HAND),
    (Mutant("no epsilon", ReplacedTokenDetection, "epsilon", lambda _: {}), BY_HAND),
    (Mutant("the correct token allowed", losses, "linear_gumbel_sample", _nothing_excluded), BY_HAND),
    (
        Mutant("a gradient to the generator", electra_module.Electra, "discriminator_hidden", _reads_the_generator),
        (test_no_gradient_passes_from_the_discriminator_to_the_generator,),
    ),
    (Mutant("documents see one another", masks.AttentionMask, "packed", lambda _: lambda mask, _: mask), BY_HAND),
    (Mutant("a mask of the left side", masks, "bidirectional", lambda _: masks.causal), BY_HAND),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: tuple[Callable[[], None], ...]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
