"""The objective signature, tried on the shapes of later objectives: memory, a frozen partner, a baseline over the
batch, a sampled partner, a penalty on parameters, weights of its own, and inner updates.

Each toy keeps only what strains the contract. All run in float64 through the real training step.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lmobj import losses, masks, noise
from lmobj.batch import Vocabulary
from lmobj.config import Experiment
from lmobj.data import DataConfig, SentencePieceConfig, TextFiles
from lmobj.errors import UserError
from lmobj.models import DecoderConfig
from lmobj.objectives import CausalLM, Context, Example, Objective, ObjectiveState, Role, TermKind, Terms
from lmobj.train import fit
from lmobj.train.step import Program, State

VOCAB = Vocabulary(size=12, pad=0, mask=1)
ROWS, LENGTH, WIDTH = 8, 6, 4


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


class Tables(nnx.Module):
    """Two tables: the logits of the next token are out[v] . embed[token]."""

    def __init__(self, seed: int) -> None:
        embed, out = jax.random.normal(jax.random.key(seed), (2, VOCAB.size, WIDTH), jnp.float64)
        self.embed, self.out = nnx.Param(embed), nnx.Param(out)

    def nll(self, tokens: Any, targets: Any, memory: Any = 0) -> Any:
        return losses.token_nll((self.embed[...][tokens] + memory) @ self.out[...].T, targets)


class Pair(nnx.Module):
    """A generator and a discriminator in one tree."""

    def __init__(self, seed: int) -> None:
        self.generator, self.discriminator = Tables(seed), Tables(seed + 1)


def make_batch(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(2, VOCAB.size, (ROWS, LENGTH)), jnp.int32)
    lengths = rng.integers(2, LENGTH + 1, (ROWS, 1))
    return {
        "tokens": tokens,
        "segment_ids": jnp.asarray(np.arange(LENGTH) < lengths, jnp.int32),
        "row_ids": jnp.stack([jnp.zeros(ROWS, jnp.int32), jnp.arange(ROWS, dtype=jnp.int32)], 1),
        "label": jnp.asarray(rng.integers(0, 2, ROWS)),
    }


def start(
    objective: Objective, models: Mapping[str, nnx.Module], accumulate: int = 1, rate: float = 0.1
) -> tuple[Program, State, dict[str, Any]]:
    split = {role: nnx.split(model) for role, model in models.items()}
    params = {role: nnx.to_pure_dict(state) for role, (_, state) in split.items()}
    trainable = {role for role, kind in objective.roles.items() if kind is Role.TRAINABLE}
    program = Program(
        objective=objective,
        graphs={role: graph for role, (graph, _) in split.items()},
        vocab=VOCAB,
        optimizer=optax.sgd(rate),
        coefficients={name: lambda step, value=value: value for name, value in objective.coefficients.items()},
        seed=0,
        accumulate=accumulate,
    )
    state = program.init({role: p for role, p in params.items() if role in trainable}, ROWS)
    return program, state, {role: p for role, p in params.items() if role not in trainable}


def train(objective: Objective, models: Mapping[str, nnx.Module], accumulate: int = 1, steps: int = 2) -> Any:
    program, state, frozen = start(objective, models, accumulate)
    step, metrics = jax.jit(program.train_step), {}
    for i in range(steps):
        state, metrics = step(state, frozen, make_batch(i))
    return state, frozen, metrics


def assert_split_changes_nothing(objective: Objective, models: Mapping[str, nnx.Module]) -> None:
    whole, *_ = train(objective, models)
    split, *_ = train(objective, models, accumulate=4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), whole, split)


@dataclass(frozen=True)
class Base(Objective):
    """Next-token rows for the toys."""

    def corrupt(self, keys: Any, batch: Any, ctx: Context) -> Example:
        tokens, inside = batch["tokens"], batch["segment_ids"]
        extra = {k: v for k, v in batch.items() if k not in ("tokens", "segment_ids", "row_ids")}
        weights = jnp.pad(inside[:, 1:], ((0, 0), (0, 1))).astype(float)
        return Example(tokens, jnp.roll(tokens, -1, 1), weights, masks.causal().packed(inside), extra=extra)


@dataclass(frozen=True)
class WithMemory(Base):
    """XLNet's and Transformer-XL's shape: what a row read is carried to the same row of the next batch."""

    def init(self, models: Any, key: Any, batch_size: int) -> ObjectiveState:
        return ObjectiveState(carried={"memory": jnp.zeros((batch_size, WIDTH))})

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        model = models["model"]
        nll = model.nll(example.inputs, example.targets, carried["memory"][:, None])
        memory = jax.lax.stop_gradient(model.embed[...][example.inputs[:, -1]])
        return Terms({"nll": jnp.sum(nll * example.weights)}, {}, {"memory": memory})


def test_memory_is_carried_by_row() -> None:
    state, *_ = train(WithMemory(), {"model": Tables(0)}, steps=1)
    last = make_batch(0)["tokens"][:, -1]
    np.testing.assert_array_equal(state.objective.carried["memory"], Tables(0).embed[...][last])
    assert_split_changes_nothing(WithMemory(), {"model": Tables(0)})


def sequence_logp(model: Any, tokens: Any, weights: Any) -> Any:
    return -jnp.sum(model.nll(tokens, jnp.roll(tokens, -1, 1)) * weights, axis=1)


@dataclass(frozen=True)
class Preference(Base):
    """DPO's shape: a frozen reference whose log-probabilities are computed in `prepare`."""

    roles: ClassVar[Mapping[str, Role]] = {"policy": Role.TRAINABLE, "reference": Role.FROZEN}
    coefficients: ClassVar[Mapping[str, float]] = {"dpo": 1.0}

    def prepare(self, models: Any, batch: Any, ctx: Context) -> Any:
        weights = jnp.ones((LENGTH,)).at[-1].set(0)
        pair = (batch["tokens"], batch["tokens"][:, ::-1])
        return {**batch, "reference": jnp.stack([sequence_logp(models["reference"], t, weights) for t in pair], 1)}

    def weights(self, example: Example) -> dict[str, Any]:
        return {"dpo": jnp.asarray(float(example.inputs.shape[0]))}

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        weights = jnp.ones((LENGTH,)).at[-1].set(0)
        chosen, rejected = (
            sequence_logp(models["policy"], t, weights) for t in (example.inputs, example.inputs[:, ::-1])
        )
        reference = example.extra["reference"]
        margin = 0.1 * ((chosen - reference[:, 0]) - (rejected - reference[:, 1]))
        return Terms({"dpo": jnp.sum(jax.nn.softplus(-margin))}, {})


def test_a_frozen_partner_is_read_and_never_changed() -> None:
    models = {"policy": Tables(0), "reference": Tables(0)}
    state, frozen, metrics = train(Preference(), models, steps=1)
    # Policy and reference agree at the start, so every margin is 0 and the loss is log 2.
    np.testing.assert_allclose(metrics["loss"][0], np.log(2), rtol=1e-12)
    np.testing.assert_array_equal(frozen["reference"]["embed"], Tables(0).embed[...])
    assert set(state.params) == {"policy"}
    assert not np.array_equal(state.params["policy"]["embed"], frozen["reference"]["embed"])
    assert_split_changes_nothing(Preference(), models)


def test_fit_names_the_roles_it_cannot_build(tmp_path: pathlib.Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Number {i} comes before {i + 1}." for i in range(300)))
    data = DataConfig(
        source=TextFiles(files=(str(tmp_path / "text.txt"),), documents="blocks"),
        tokenizer=SentencePieceConfig(vocab_size=300),
        length=16,
        cache=str(tmp_path / "cache"),
    )
    model = DecoderConfig(layers=1, width=8, heads=2)
    config = Experiment(run=str(tmp_path / "run"), data=data, model=model, objective=CausalLM())

    @dataclass(frozen=True)
    class Paired(CausalLM):
        roles: ClassVar[Mapping[str, Role]] = Preference.roles

    with pytest.raises(UserError, match=r"Paired, which needs the models policy \(trainable\), reference \(frozen\)"):
        fit(config, objective=Paired(), quiet=True)
    assert not (tmp_path / "run").exists()


@dataclass(frozen=True)
class WithBaseline(Base):
    """KTO's shape: a detached baseline that needs the whole batch, so it is made in `prepare`."""

    def prepare(self, models: Any, batch: Any, ctx: Context) -> Any:
        logp = sequence_logp(models["model"], batch["tokens"], jnp.ones((LENGTH,)))
        return {**batch, "baseline": jnp.broadcast_to(jnp.maximum(jnp.mean(logp), -5.0), (ROWS,))}

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        logp = sequence_logp(models["model"], example.inputs, example.weights)
        sign = 2 * example.extra["label"] - 1
        return Terms({"nll": jnp.sum(jax.nn.sigmoid(-sign * 0.1 * (logp - example.extra["baseline"])))}, {})


def test_a_baseline_over_the_batch_is_the_same_for_every_microbatch() -> None:
    assert_split_changes_nothing(WithBaseline(), {"model": Tables(0)})


@dataclass(frozen=True)
class Replaced(Base):
    """ELECTRA's shape: a generator fills masked tokens, a discriminator judges its samples; two terms, 1 : 50."""

    coefficients: ClassVar[Mapping[str, float]] = {"mlm": 1.0, "rtd": 50.0}

    def corrupt(self, keys: Any, batch: Any, ctx: Context) -> Example:
        tokens, inside = batch["tokens"], batch["segment_ids"] > 0
        masked = jax.vmap(
            lambda key, row, ok, n: noise.mask_tokens(
                key, row, ok, length=n, num_predictions=2, mask_id=VOCAB.mask, vocab_size=VOCAB.size, mask_rate=0.3
            )
        )(keys, tokens, inside, jnp.sum(inside, 1))
        extra = {"original": tokens, "inside": inside.astype(float)}
        mask = masks.bidirectional()
        return Example(masked.tokens, masked.targets, masked.weights, mask, predict=masked.positions, extra=extra)

    def weights(self, example: Example) -> dict[str, Any]:
        return {"mlm": jnp.sum(example.weights), "rtd": jnp.sum(example.extra["inside"])}

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        generator, discriminator = models["model"].generator, models["model"].discriminator
        at = jnp.take_along_axis(example.inputs, example.predict, 1)
        logits = generator.embed[...][at] @ generator.out[...].T
        sampled = jax.vmap(jax.random.categorical)(ctx.keys, jax.lax.stop_gradient(logits))
        rows = jnp.arange(at.shape[0])[:, None]
        where = jnp.where(example.weights > 0, example.predict, LENGTH)
        filled = example.extra["original"].at[rows, where].set(sampled.astype(jnp.int32), mode="drop")
        verdict = discriminator.embed[...][filled] @ discriminator.out[...][0]
        rtd = losses.binary_nll(verdict, filled != example.extra["original"])
        mlm = losses.token_nll(logits, example.targets)
        return Terms(
            {"mlm": jnp.sum(mlm * example.weights), "rtd": jnp.sum(rtd * example.extra["inside"])},
            {"replaced": (jnp.sum(filled != example.extra["original"]), jnp.sum(example.weights))},
        )


def test_a_sampled_partner_splits_exactly_and_gets_no_gradient_back() -> None:
    assert_split_changes_nothing(Replaced(), {"model": Pair(0)})

    @dataclass(frozen=True)
    class OnlyDiscriminator(Replaced):
        coefficients: ClassVar[Mapping[str, float]] = {"mlm": 0.0, "rtd": 50.0}

    state, _, metrics = train(OnlyDiscriminator(), {"model": Pair(0)}, steps=1)
    assert metrics["replaced"][0] > 0
    np.testing.assert_array_equal(state.params["model"]["generator"]["embed"], Pair(0).generator.embed[...])
    assert not np.array_equal(state.params["model"]["discriminator"]["embed"], Pair(0).discriminator.embed[...])


@dataclass(frozen=True)
class Penalised(WithMemory):
    """AdaLoRA's shape: a term of the parameters alone. It counts once per step, however the batch is split."""

    coefficients: ClassVar[Mapping[str, float]] = {"nll": 1.0, "norm": 0.5}
    term_kinds: ClassVar[Mapping[str, TermKind]] = {"norm": TermKind.PARAMETER}

    def weights(self, example: Example) -> dict[str, Any]:
        return {"nll": jnp.sum(example.weights), "norm": jnp.ones(())}

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        terms = super().terms(models, example, carried, ctx)
        return terms._replace(sums={**terms.sums, "norm": jnp.sum(models["model"].out[...] ** 2)})


def test_a_penalty_on_parameters_counts_once() -> None:
    assert_split_changes_nothing(Penalised(), {"model": Tables(0)})
    _, _, metrics = train(Penalised(), {"model": Tables(0)}, accumulate=4, steps=1)
    penalty = metrics["term/norm"][0] / metrics["term/norm"][1]
    np.testing.assert_allclose(penalty, jnp.sum(Tables(0).out[...] ** 2), rtol=1e-12)


@dataclass(frozen=True)
class Contrastive(WithMemory):
    """InfoNCE's shape: every row is a negative of every other."""

    term_kinds: ClassVar[Mapping[str, TermKind]] = {"nll": TermKind.BATCH}


def test_a_term_over_the_whole_batch_refuses_microbatches() -> None:
    with pytest.raises(UserError, match=r"train\.accumulate is 2, and the term 'nll' of Contrastive"):
        start(Contrastive(), {"model": Tables(0)}, accumulate=2)


@dataclass(frozen=True)
class Uncertain(Base):
    """Uncertainty weighting's shape: the objective trains a number of its own. d/ds [exp(-s) L + s] = 1 - exp(-s) L."""

    def init(self, models: Any, key: Any, batch_size: int) -> ObjectiveState:
        return ObjectiveState(params={"log_variance": jnp.zeros(())})

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        nll = models["model"].nll(example.inputs, example.targets)
        s = ctx.params["log_variance"]
        return Terms({"nll": jnp.sum((jnp.exp(-s) * nll + s) * example.weights)}, {})


def test_an_objective_trains_weights_of_its_own() -> None:
    state, _, metrics = train(Uncertain(), {"model": Tables(0)}, steps=1)
    expected = -0.1 * (1 - float(metrics["loss"][0]))  # SGD at rate 0.1 from s = 0, where L is the loss itself
    np.testing.assert_allclose(state.objective.params["log_variance"], expected, rtol=1e-12)
    assert_split_changes_nothing(Uncertain(), {"model": Tables(0)})


@dataclass(frozen=True)
class Inner(Base):
    """PPO's shape: several updates over one prepared batch."""

    updates: ClassVar[int] = 3

    def prepare(self, models: Any, batch: Any, ctx: Context) -> Any:
        return {**batch, "before": jnp.broadcast_to(models["model"].embed[...].sum(), (ROWS,))}

    def terms(self, models: Any, example: Example, carried: Any, ctx: Context) -> Terms:
        nll = models["model"].nll(example.inputs, example.targets)
        drift = models["model"].embed[...].sum() - example.extra["before"][0]
        return Terms({"nll": jnp.sum(nll * example.weights)}, {"drift": (drift, jnp.ones(()))})


def test_inner_updates_share_one_prepared_batch() -> None:
    state, _, metrics = train(Inner(), {"model": Tables(0)}, steps=1)
    assert int(state.step) == 1
    # The last update sees the parameters after two updates, and `before` from before the first.
    assert abs(float(metrics["drift"][0])) > 1e-6
