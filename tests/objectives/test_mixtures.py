"""Mixtures: what is summed, how rows are shared, uncertainty weighting, and sources of one's own."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import config, objectives
from lmobj.errors import UserError
from lmobj.models import OutputHead, PairHead, XLNetConfig
from lmobj.objectives import (
    MaskedLM,
    Member,
    Mixture,
    ReplacedTokenDetection,
    SentenceOrderPrediction,
    TransformerXL,
    _mixture,
)
from lmobj.train import fit
from tests.mutants import Mutant, assert_killed
from tests.objectives.contract import BATCH, CASES, ENCODER, VOCAB, Bench, make_batch, make_pairs, norm_gap
from tests.train.tiny_runs import quick_compilation, stored_bits, write_corpus

LM = MaskedLM(mask_rate=0.3, max_predictions=6)
ORDER = SentenceOrderPrediction(masked_lm=None)
MEMBERS = {"lm": Member(LM, weight=2.0), "order": Member(ORDER, weight=0.5)}


SMALL = dataclasses.replace(CASES["mixture"], builders={"model": dataclasses.replace(ENCODER, layers=1, remat="none")})
"""The contract's mixture with a model of one layer."""


def test_the_sum_is_that_of_each_member_alone() -> None:
    """Each member's loss by itself, on its own batch and with its own keys, times its weight."""
    with jax.enable_x64(True):
        bench = Bench(dataclasses.replace(SMALL, objective=Mixture(members=MEMBERS)))
        noise_keys, model_keys = objectives.step_keys(bench.key, objectives.row_ids_of(bench.batch), 0)

        @jax.jit
        def alone(params: Any, batch: Any) -> Any:
            models = {role: nnx.merge(graph, params[role]) for role, graph in bench.graphs.items()}
            found = {}
            for name, member in MEMBERS.items():
                own = {"model": models["model"]} | ({"heads": models["heads"].members[name]} if name == "order" else {})
                ctx = objectives.Context(model_keys[name], 0, VOCAB)
                example = member.objective.corrupt(noise_keys[name], batch[name], ctx)
                terms = member.objective.terms(own, example, (), ctx)
                shared = objectives.denominators(member.objective, example)
                total = objectives.total_loss(terms, shared, member.objective.coefficients)
                found[name] = total, terms.metrics
            return found

        loss, metrics = jax.jit(bench.loss)(bench.params, bench.batch, bench.key)
        each = alone(bench.params, bench.batch)
    assert float(loss) == pytest.approx(2.0 * float(each["lm"][0]) + 0.5 * float(each["order"][0]), rel=1e-12)
    assert metrics.keys() == {f"{name}/{metric}" for name, (_, own) in each.items() for metric in own}


class Even:
    """Models for which all tokens, and all labels, are equally likely; they keep what they read."""

    def __init__(self) -> None:
        self.read: list[Any] = []

    def hidden(self, tokens: Any, **_: Any) -> Any:
        self.read.append(tokens)
        return jnp.zeros((*tokens.shape, 16))

    def head_hidden(self, hidden: Any) -> Any:
        return hidden

    def head_table(self) -> OutputHead:
        return OutputHead(jnp.ones((VOCAB.size, 16)))

    def discriminate(self, hidden: Any) -> Any:
        return hidden[..., 0]

    generator_hidden = discriminator_hidden = hidden
    generator_head_hidden, generator_head_table = head_hidden, head_table


def keys_for(batch: Any) -> tuple[Any, Any]:
    """(noise keys, model keys) by member."""
    return objectives.step_keys(jax.random.key(0, impl="threefry2x32"), objectives.row_ids_of(batch), 0)


def test_uncertainty_weighting_is_its_formula() -> None:
    """With s: sum of w exp(-s) L + s / 2; its gradient with respect to s is 1 / 2 - w exp(-s) L."""
    batch = {"lm": make_batch(rows=2), "order": make_pairs(rows=3)}
    noise_keys, model_keys = keys_for(batch)
    pairs = PairHead(ENCODER.head_style, 2, nnx.Rngs(params=0))
    models: Any = {"model": Even(), "heads": _mixture._Heads({"order": pairs})}

    def total(weighting: Any, params: Any) -> Any:
        mixture = Mixture(members=MEMBERS, weighting=weighting)
        ctx = objectives.Context(model_keys, 0, VOCAB, params)
        example = mixture.corrupt(noise_keys, batch, ctx)
        found = mixture.terms(models, example, {"lm": (), "order": ()}, ctx)
        return objectives.total_loss(found, objectives.denominators(mixture, example), mixture.coefficients)

    lm, order = 2 * math.log(VOCAB.size), 0.5 * math.log(2)  # all logits are 0; means over tokens and over pairs
    assert float(total("fixed", ())) == pytest.approx(lm + order, rel=1e-5)
    value, gradient = jax.value_and_grad(lambda s: total("uncertainty", {"lm": (), "order": (), "uncertainty": s}))(
        {"lm": 0.7, "order": -0.4}
    )
    assert float(value) == pytest.approx(math.exp(-0.7) * lm + math.exp(0.4) * order + 0.15, rel=1e-5)
    assert float(gradient["lm"]) == pytest.approx(0.5 - math.exp(-0.7) * lm, rel=1e-5)
    assert float(gradient["order"]) == pytest.approx(0.5 - math.exp(0.4) * order, rel=1e-5)


def test_members_sample_for_themselves() -> None:
    """Two of replaced token detection on the same rows: each with its own draws, samples and labels."""
    member = ReplacedTokenDetection(mask_rate=0.3)
    mixture = Mixture(members={"a": Member(member), "b": Member(member), "c": Member(member)})
    recorded = jnp.full((BATCH, 5), 39)
    batch = {"a": make_batch(), "b": make_batch(), "c": make_batch() | {"sampled": recorded}}
    noise_keys, model_keys = keys_for(batch)
    ctx = objectives.Context(model_keys, 0, VOCAB)
    together: Any = Even()
    alone: Any = Even()
    example = mixture.corrupt(noise_keys, batch, ctx)
    terms = mixture.terms({"model": together}, example, dict.fromkeys(batch, ()), ctx)
    assert terms.sums.keys() == {f"{name}/{term}" for name in "abc" for term in ("mlm", "disc")}
    for name in "abc":
        own = objectives.Context(model_keys[name], 0, VOCAB)
        one = member.corrupt(noise_keys[name], batch[name], own)
        for term, value in member.terms({"model": alone}, one, (), own).sums.items():
            assert float(value) == float(terms.sums[f"{name}/{term}"])
    for one, other in zip(together.read, alone.read, strict=True):
        np.testing.assert_array_equal(one, other)
    a, b, c = together.read[1::2]  # what the discriminator read
    assert (a != b).any()
    original, drawn = make_batch()["tokens"], c == 39
    np.testing.assert_array_equal(c, jnp.where(drawn, 39, original))
    assert drawn.sum() > BATCH > (a == 39).sum()


def test_sampled_rows_are_shared_in_proportion() -> None:
    mixture = Mixture(members=MEMBERS, combine="sample")
    # 2.0 : 0.5 of 8 rows is 6.4 : 1.6, which rounds by largest remainder to 6 : 2.
    assert mixture.member_rows(8) == {"lm": 6, "order": 2}
    assert mixture.member_rows(2) == {"lm": 1, "order": 1}
    assert Mixture(members=MEMBERS).member_rows(8) == {"lm": 8, "order": 8}
    assert mixture.coefficients == pytest.approx({"lm/nll": 0.8, "order/sop": 0.2})
    assert Mixture(members=MEMBERS).coefficients == {"lm/nll": 2.0, "order/sop": 0.5}
    with pytest.raises(UserError, match=r"train\.batch_size is 1, which 2 members share"):
        mixture.member_rows(1)


@pytest.mark.slow
def test_members_of_other_sizes_train_alike() -> None:
    """Batches of six and two rows: microbatches give the update of the whole, that of each s, from 0, included."""
    case = dataclasses.replace(
        SMALL,
        objective=Mixture(members=MEMBERS, combine="sample", weighting="uncertainty"),
        make=lambda first_row=0: {
            "lm": make_batch(rows=6, first_row=first_row),
            "order": make_pairs(rows=2, first_row=first_row),
        },
    )
    with jax.enable_x64(True):
        bench = Bench(case)
        assert bench.program().init(bench.params, 8).objective.params["uncertainty"] == {"lm": 0, "order": 0}
        whole, losses = bench.train(bench.program())
        split, split_losses = bench.train(bench.program(accumulate=2))
    np.testing.assert_allclose(split_losses, losses, rtol=1e-10)
    assert norm_gap(split.params, whole.params) < 1e-10
    assert norm_gap(split.objective.params, whole.objective.params) < 1e-10
    assert all(float(s) != 0 for s in whole.objective.params["uncertainty"].values())


def test_members_draw_apart() -> None:
    """Two members on the same rows corrupt them independently."""
    members = {"a": Member(LM), "b": Member(LM)}
    batch = {"a": make_batch(), "b": make_batch()}
    noise_keys, model_keys = keys_for(batch)
    example = Mixture(members=members).corrupt(noise_keys, batch, objectives.Context(model_keys, 0, VOCAB))
    assert not np.array_equal(example["a"].predict, example["b"].predict)
    assert not np.array_equal(jax.random.key_data(model_keys["a"]), jax.random.key_data(model_keys["b"]))


def test_what_a_mixture_refuses() -> None:
    with pytest.raises(UserError, match=r"objective\.members is empty"):
        Mixture()
    with pytest.raises(UserError, match=r"objective\.members\.lm\.weight is -1"):
        Mixture(members={"lm": Member(LM, weight=-1)})
    with pytest.raises(UserError, match=r"objective\.members has 'a/b'; accepted: names of letters"):
        Mixture(members={"a/b": Member(LM)})
    remembering = Mixture(members={"xl": Member(TransformerXL()), "lm": Member(LM)}, combine="sample")
    builder = XLNetConfig(layers=1, width=8, heads=2, memory_length=4)
    model = nnx.eval_shape(lambda: builder.build(VOCAB, nnx.Rngs(params=0)))
    with pytest.raises(UserError, match=r"objective\.members\.xl carries a memory"):
        remembering.init({"model": model}, jax.random.key(0), 4)
    greedy = Mixture(members={"lm": Member(MaskedLM(mask_rate=0.9))})
    with pytest.raises(UserError, match=r"^objective\.members\.lm\.objective\.mask_rate 0\.9 selects"):
        greedy.rows(VOCAB, 8)
    reversed_members = dict(reversed(MEMBERS.items()))
    assert Mixture(members=MEMBERS) == Mixture(members=reversed_members)
    assert hash(Mixture(members=MEMBERS)) == hash(Mixture(members=reversed_members))


YAML = """
data:
  source:
    name: mixture
    sources:
      left: {{source: {{name: text, files: ["{left}"], documents: blocks}}}}
      right: {{source: {{name: text, files: ["{right}"], documents: blocks}}}}
  tokenizer: {{vocab_size: 320}}
  length: 32
  validation: 0.15
  cache: "{cache}"
model: {{name: encoder, layers: 1, width: 16, heads: 2, max_length: 32}}
objective:
  name: mixture
  members:
    lm: {{objective: {{name: masked_lm}}, source: left}}
    order: {{objective: {{name: sentence_order_prediction, masked_lm: null}}, weight: 0.5, source: right}}
train:
  steps: 4
  batch_size: 8
  log_every: 1
  checkpoint_every: 2
  coefficients: {{order/sop: {{name: linear, peak: 1.0, warmup_steps: 4}}}}
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., config.Experiment]:
    folder = tmp_path_factory.mktemp("mixture")
    left, right = write_corpus(folder / "left.txt"), write_corpus(folder / "right.txt", seed=1)
    file = folder / "mixture.yaml"
    file.write_text(YAML.format(left=left, right=right, cache=folder / "cache"))
    return lambda run, *overrides: config.load(file, [f"run={run}", *overrides])


@pytest.mark.slow
def test_a_run_reads_each_source_and_resumes_to_the_bit(
    settings: Callable[..., config.Experiment], tmp_path: pathlib.Path
) -> None:
    with quick_compilation():
        result = fit(settings(tmp_path / "whole"), quiet=True)
        (batch,) = result.assembly.batches("train", steps=1)
        # Sources are numbered in the order of their names.
        assert {name: set(part["row_ids"][:, 0].tolist()) for name, part in batch.items()} == {"lm": {0}, "order": {1}}
        assert {"eval/lm/nll", "eval/order/sop_accuracy", "eval/term/order/sop", "eval/loss"} < set(result.metrics)
        # Linear warm-up over 4 steps: the coefficient of update s is s / 4.
        assert [result.assembly.coefficients(step)["order/sop"] for step in (0, 2)] == [0.0, 0.5]
        (tmp_path / "whole" / "checkpoints" / "4" / "manifest.json").unlink()
        again = fit(settings(tmp_path / "whole"), resume=True, quiet=True)
    state = result.assembly.abstract_state
    assert stored_bits(tmp_path / "whole", state, step=4) == {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_flatten_with_path(result.state)[0]
    }
    assert again.metrics["eval/loss"] == result.metrics["eval/loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.combine=sample", r"members\.lm's share of train\.batch_size is 5, .* over 8 devices"),
        ("objective.members.lm.source=middle", r"members\.lm: RowSpec\.source is 'middle'; accepted: .*left, right"),
        ("objective.members.lm.objective.name=causal", r"objective\.members\.lm\.objective\.name"),
        ("train.coefficients={order/nll: 1}", r"train\.coefficients\.order/nll"),
    ],
)
def test_mistakes_in_a_config(
    settings: Callable[..., config.Experiment], tmp_path: pathlib.Path, override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        fit(settings(tmp_path / "run", override), quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_member_without_held_out_text_is_refused_before_training(
    settings: Callable[..., config.Experiment], tmp_path: pathlib.Path
) -> None:
    """`right` is one document, which is trained on; `left` has documents in both splits."""
    (tmp_path / "one.txt").write_text("The cat sat down. The dog ran. A bird sang. It rained. The sun rose. We ate.")
    right = f'data.source.sources.right.source.files=["{tmp_path / "one.txt"}"]'
    with pytest.raises(UserError, match=r"objective\.members\.order: the validation split holds no documents"):
        fit(settings(tmp_path / "run", right), quiet=True)
    assert not (tmp_path / "run").exists()


def _reversed_denominators(weights: Any) -> Any:
    def mixed(self: Mixture, example: Any) -> dict[str, Any]:
        found = weights(self, example)
        return dict(zip(found, reversed(found.values()), strict=True))

    return mixed


def _without_half_s(terms: Any) -> Any:
    def mutated(*given: Any) -> Any:
        found = terms(*given)
        return found._replace(sums={name: (name != "uncertainty") * x for name, x in found.sums.items()})

    return mutated


def _first_keys_for_all(corrupt: Any) -> Any:
    return lambda self, keys, batch, ctx: corrupt(self, dict.fromkeys(keys, next(iter(keys.values()))), batch, ctx)


MUTANTS = [
    (
        Mutant("a weight is dropped", Mixture, "coefficients", lambda real: property(lambda self: _ones(real, self))),
        [test_sampled_rows_are_shared_in_proportion],
    ),
    (Mutant("one member's keys for all", Mixture, "corrupt", _first_keys_for_all), [test_members_draw_apart]),
    (
        Mutant("the sign of s", _mixture, "_precision", lambda real: lambda s: real(-s)),
        [test_uncertainty_weighting_is_its_formula],
    ),
    (Mutant("s / 2 dropped", Mixture, "terms", _without_half_s), [test_uncertainty_weighting_is_its_formula]),
    (
        Mutant("denominators mixed", Mixture, "weights", _reversed_denominators),
        [test_uncertainty_weighting_is_its_formula],
    ),
    (
        Mutant(
            "one context for all",
            _mixture,
            "_context_of",
            lambda real: lambda ctx, name: real(ctx, next(iter(ctx.keys))),
        ),
        [test_members_sample_for_themselves],
    ),
]


def _ones(real: Any, mixture: Mixture) -> dict[str, float]:
    return dict.fromkeys(real.fget(mixture), 1.0)


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(
    monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: list[functools.partial[None]]
) -> None:
    assert_killed(monkeypatch, mutant, checks)
