"""Multi-token prediction: targets by hand, both variants against NumPy document by document, who sees what; it learns.

The NumPy side reads every document by itself and only the positions that predict something, with full logits.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lmobj import masks
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.models import EncoderConfig, GRUConfig, MoEConfig, ParallelHeads, RowUse, SequentialHeads, _further_tokens
from lmobj.models._further_tokens import SequentialHead
from lmobj.objectives import (
    CausalLM,
    Context,
    Example,
    MultiTokenPrediction,
    Terms,
    _multi_token,
    denominators,
    loss_fn,
    step_keys,
    total_loss,
)
from tests.models.families import CONFIGS, VOCAB, build
from tests.models.plain_blocks import block, norm
from tests.mutants import Mutant, assert_killed
from tests.objectives.learning import DECODER, Sums, learn

KEY = jax.random.key(0, impl="threefry2x32")
VARIANTS = ["parallel", "sequential"]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def batch_of(*rows: list[int]) -> dict[str, Any]:
    """Rows of documents of these lengths, with 10 tokens each; what is left is padding."""
    segments, positions = np.zeros((2, len(rows), 10), np.int32)
    for row, lengths in enumerate(rows):
        start = 0
        for number, length in enumerate(lengths):
            segments[row, start : start + length] = number + 1
            positions[row, start : start + length] = np.arange(length)
            start += length
    tokens = np.random.default_rng(1).integers(7, VOCAB.size, segments.shape) * (segments > 0)
    ids = np.stack([np.zeros(len(rows), np.int32), np.arange(len(rows))], 1)
    arrays = {"tokens": tokens, "segment_ids": segments, "positions": positions, "row_ids": ids}
    return {name: jnp.asarray(x, jnp.int32) for name, x in arrays.items()}


BATCH = batch_of([6, 3], [2, 8])


def corrupted(objective: Any, batch: dict[str, Any] = BATCH, *, train: bool = False) -> tuple[Example, Context]:
    noise, model = step_keys(KEY, batch["row_ids"], 0)
    ctx = Context(model, 0, VOCAB, train=train)
    return objective.corrupt(noise, batch, ctx), ctx


def made(objective: MultiTokenPrediction, family: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(graphs, parameters) of the model and the heads in float64, none of them zero."""
    graph, params = build(dataclasses.replace(CONFIGS[family], dtype="float64", param_dtype="float64"))
    style = nnx.merge(graph, params).head_style
    heads, shapes = nnx.split(nnx.eval_shape(lambda: objective.build_heads(style, VOCAB, nnx.Rngs(0))))
    draw = np.random.default_rng(2)

    def values(path: Any, shape: Any) -> Any:
        return jnp.asarray(draw.normal("scale" in jax.tree_util.keystr(path), 0.3, shape.shape))

    drawn = jax.tree_util.tree_map_with_path(values, nnx.to_pure_dict(shapes))
    return {"model": graph, "heads": heads}, {"model": params, "heads": drawn}


def terms_of(objective: MultiTokenPrediction, family: str) -> tuple[Terms, Example]:
    """The terms of the batch, compiled anew."""
    (graphs, params), (example, ctx) = made(objective, family), corrupted(objective)

    @jax.jit
    def terms(params: Any) -> Terms:
        return objective.terms({role: nnx.merge(graphs[role], params[role]) for role in graphs}, example, (), ctx)

    return terms(params), example


def test_targets_and_weights_by_hand() -> None:
    """a b c d | e f g | padding: of two ahead a, b and e have targets, c, d, f and g have none in their document."""
    batch = batch_of([4, 3])
    batch["tokens"] = jnp.asarray([[11, 12, 13, 14, 21, 22, 23, 0, 0, 0]])
    objective = MultiTokenPrediction(tokens=4)
    example, _ = corrupted(objective, batch)
    np.testing.assert_array_equal(example.inputs, batch["tokens"])
    np.testing.assert_array_equal(example.targets, [[12, 13, 14, 21, 22, 23, 0, 0, 0, 0]])
    np.testing.assert_array_equal(example.weights, [[1, 1, 1, 0, 1, 1, 0, 0, 0, 0]])
    expected = {
        2: ([13, 14, 21, 22, 23, 0, 0, 0, 0, 0], [1, 1, 0, 0, 1, 0, 0, 0, 0, 0]),
        3: ([14, 21, 22, 23, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        4: ([21, 22, 23, 0, 0, 0, 0, 0, 0, 0], [0] * 10),
    }
    for k, (targets, weights) in expected.items():
        np.testing.assert_array_equal(example.extra[f"targets_{k}"], [targets])
        np.testing.assert_array_equal(example.extra[f"weights_{k}"], [weights])
    assert objective.weights(example) == {"nll": 5, "nll_2": 3, "nll_3": 1, "nll_4": 0}


def test_a_loss_mask_names_the_tokens_that_are_predicted() -> None:
    batch = batch_of([4, 3]) | {"loss_mask": jnp.asarray([[0, 0, 1, 0, 1, 0, 1, 0, 0, 0]])}
    example, _ = corrupted(MultiTokenPrediction(tokens=2), batch)
    np.testing.assert_array_equal(example.weights, [[0, 1, 0, 0, 0, 1, 0, 0, 0, 0]])
    np.testing.assert_array_equal(example.extra["weights_2"], [[1, 0, 0, 0, 1, 0, 0, 0, 0, 0]])


def test_coefficients_are_those_of_the_papers() -> None:
    """A sum over heads; and lambda / D with lambda = 0.3."""
    assert MultiTokenPrediction().coefficients == {"nll": 1, "nll_2": 1, "nll_3": 1, "nll_4": 1}
    assert MultiTokenPrediction(variant="sequential").coefficients == {"nll": 1, "nll_2": 0.3}
    three = MultiTokenPrediction(variant="sequential", tokens=3, further_weight=0.5)
    assert three.coefficients == {"nll": 1, "nll_2": 0.25, "nll_3": 0.25}


def plain_states(objective: MultiTokenPrediction, family: str, params: Any, text: np.ndarray) -> dict[int, np.ndarray]:
    """Distance -> the states of one document that predict the token so far ahead, as far as it has one."""
    model, heads, llama = params["model"], params["heads"], family == "llama"

    def at(tree: Any, index: int) -> Any:
        return jax.tree.map(lambda x: x[index], tree)

    def last_norm(p: Any, x: np.ndarray) -> np.ndarray:
        return norm(p, x, 1e-5, llama)

    embedded = model["tokens"]["table"][text][None]
    embedded = embedded if llama else embedded + model["positions"]["table"][: len(text)]
    before_last = block(family, at(model["stack"]["blocks"], 0), embedded)
    states = {1: last_norm(model["norm"], block(family, at(model["stack"]["blocks"], 1), before_last))}
    for index, k in enumerate(objective.further):
        if objective.variant == "parallel":
            y = block(family, at(heads["stack"]["blocks"], index), before_last)
            states[k] = last_norm(model["norm"], y)
        elif len(text) >= k:
            p = at(heads["heads"], index)
            h = norm(p["hidden_norm"], states[k - 1][:, : len(text) - k + 1], 1e-5, True)
            e = norm(p["token_norm"], embedded[:, k - 1 :], 1e-5, True)
            y = block(family, p["block"], np.concatenate([h, e], axis=-1) @ p["join"]["kernel"])
            states[k] = last_norm(p["norm"], y)
    return states


def plain_nll(objective: MultiTokenPrediction, family: str, params: Any) -> dict[int, tuple[float, int]]:
    """Distance -> sum of losses and number of targets, document by document, with full logits."""
    params = jax.tree.map(np.asarray, params)
    table = params["model"]["head" if family == "llama" else "tokens"]["table"][: VOCAB.size]
    losses: dict[int, list[float]] = {k: [] for k in (1, *objective.further)}
    for tokens, segments in zip(np.asarray(BATCH["tokens"]), np.asarray(BATCH["segment_ids"]), strict=True):
        for number in range(1, segments.max() + 1):
            text = tokens[segments == number]
            for k, states in plain_states(objective, family, params, text).items():
                for t in range(len(text) - k):
                    logits = table @ states[0, t]
                    losses[k].append(math.log(np.exp(logits).sum()) - logits[text[t + k]])
    return {k: (sum(found), len(found)) for k, found in losses.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_equal_those_of_each_document_in_numpy(variant: Any, family: str) -> None:
    """By its own parts: blocks, shared norm and table, documents of 6, 3, 2 and 8 tokens, of which the last three have
    fewer targets three ahead than two."""
    objective = MultiTokenPrediction(variant=variant, tokens=3)
    terms, example = terms_of(objective, family)
    _, params = made(objective, family)
    expected = plain_nll(objective, family, params)
    assert [count for _, count in expected.values()] == [15, 11, 8]
    for k, (total, count) in expected.items():
        name = "nll" if k == 1 else f"nll_{k}"
        np.testing.assert_allclose(terms.sums[name], total, rtol=1e-12)
        np.testing.assert_allclose(terms.metrics[name], (total, count), rtol=1e-12)
        assert float(terms.metrics[name.replace("nll", "accuracy")][1]) == count
    means = [total / count for total, count in expected.values()]
    weight = 2 if variant == "parallel" else 0.3
    loss = total_loss(terms, denominators(objective, example), objective.coefficients)
    np.testing.assert_allclose(loss, means[0] + weight * (means[1] + means[2]) / 2, rtol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_next_token_is_the_models_own(variant: Any) -> None:
    objective = MultiTokenPrediction(variant=variant, tokens=2)
    terms, _ = terms_of(objective, "gpt2")
    graphs, params = made(objective, "gpt2")
    example, ctx = corrupted(CausalLM())
    alone = jax.jit(lambda p: CausalLM().terms({"model": nnx.merge(graphs["model"], p)}, example, (), ctx))
    causal = alone(params["model"])
    np.testing.assert_allclose(terms.sums["nll"], causal.sums["nll"], rtol=1e-12)
    for name, metric in causal.metrics.items():
        np.testing.assert_allclose(terms.metrics[name], metric, rtol=1e-12)


def test_a_head_like_the_models_last_block_says_what_the_model_says() -> None:
    """The parallel heads are in that block's place. With dropout they are not alike: each draws for itself."""
    objective = MultiTokenPrediction(tokens=3)
    graphs, params = made(objective, "llama")
    last = jax.tree.map(lambda x: jnp.stack([x[-1], x[-1]]), params["model"]["stack"]["blocks"])
    example, ctx = corrupted(objective, train=True)

    @jax.jit
    def run(params: Any) -> Any:
        model, heads = (nnx.merge(graphs[role], params[role]) for role in ("model", "heads"))
        given = {"mask": example.mask, "positions": example.positions}
        quiet, noisy = (model.block_states(example.inputs, **given, dropout=seeds) for seeds in (None, ctx.dropout))
        return quiet.hidden, heads(model, quiet), noisy.hidden, heads(model, noisy)

    quiet, same, noisy, others = run(params | {"heads": {"stack": {"blocks": last}}})
    np.testing.assert_allclose(same, jnp.stack([quiet, quiet]), rtol=1e-12)
    assert all(np.max(np.abs(a - b)) > 0.1 for a, b in [(noisy, others[0]), (noisy, others[1]), tuple(others)])


def seen(objective: MultiTokenPrediction) -> tuple[Any, Example]:
    """Distance -> [B, slots, L]: whether the loss of one slot depends on what stands at a place of its row.

    By gradient with respect to the vectors of positions, of which every place of a row has one of its own.
    """
    (graphs, params), (example, ctx) = made(objective, "gpt2"), corrupted(objective)
    example = dataclasses.replace(example, positions=jnp.broadcast_to(jnp.arange(10), example.inputs.shape))

    def losses(table: Any, row: Any, slot: Any) -> Any:
        weights = jnp.zeros_like(example.weights).at[row, slot].set(1.0)
        further = {f"weights_{k}": weights for k in objective.further}
        one = dataclasses.replace(example, weights=weights, extra={**example.extra, **further})
        model = {**params["model"], "positions": {"table": table}}
        models = {"model": nnx.merge(graphs["model"], model), "heads": nnx.merge(graphs["heads"], params["heads"])}
        sums = objective.terms(models, one, (), ctx).sums
        return jnp.stack([sums["nll"], *(sums[f"nll_{k}"] for k in objective.further)])

    slots = jnp.arange(20)
    sizes = jax.jit(jax.vmap(jax.jacrev(losses), (None, 0, 0)))(
        params["model"]["positions"]["table"], slots // 10, slots % 10
    )
    reach = np.linalg.norm(sizes, axis=-1)[:, :, :10] > 0
    return {k: reach[:, i].reshape(2, 10, 10) for i, k in enumerate((1, *objective.further))}, example


@pytest.mark.parametrize("variant", VARIANTS)
def test_who_sees_what(variant: Any) -> None:
    """The token k ahead is predicted from the tokens of its document up to where it is predicted, or in sequence up to
    the one before it; never from another document's."""
    reach, example = seen(MultiTokenPrediction(variant=variant, tokens=3))
    segments, place = np.asarray(BATCH["segment_ids"]), np.arange(10)
    checked = 0
    for k, found in reach.items():
        weights = example.weights if k == 1 else example.extra[f"weights_{k}"]
        for row, t in zip(*np.nonzero(np.asarray(weights)), strict=True):
            last = t if variant == "parallel" else t + k - 1
            allowed = (segments[row] == segments[row, t]) & (place <= last)
            np.testing.assert_array_equal(found[row, t], allowed, err_msg=f"row {row}, place {t}, {k} ahead")
            checked += 1
    assert checked == 15 + 11 + 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_with_experts_are_run_once(variant: Any) -> None:
    """The losses of their routers are of the model's own blocks: heads have none."""
    objective = MultiTokenPrediction(variant=variant, tokens=3)
    config = dataclasses.replace(CONFIGS["llama"], moe=MoEConfig(experts=4))
    model = nnx.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0)))
    heads = nnx.eval_shape(lambda: objective.build_heads(model.head_style, VOCAB, nnx.Rngs(0)))
    graphs, params = {}, {}
    for role, module in {"model": model, "heads": heads}.items():
        graphs[role], state = nnx.split(module)
        params[role] = nnx.to_pure_dict(state)
    loss, metrics = jax.eval_shape(loss_fn(objective, graphs, VOCAB), params, BATCH, KEY)
    assert loss.shape == ()
    assert {"load_balance", "nll", "nll_2", "nll_3"} <= set(metrics)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"objective.variant is 'medusa'; accepted: parallel, sequential"):
        MultiTokenPrediction(variant="medusa")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"objective.tokens is 1; accepted: at least 2, or objective.name=causal_lm"):
        MultiTokenPrediction(tokens=1)
    with pytest.raises(UserError, match=r"objective.further_weight is 0; it must be above 0"):
        MultiTokenPrediction(further_weight=0)
    with pytest.raises(UserError, match=r"data.length is 4; .* up to 4 tokens ahead and needs at least 5"):
        MultiTokenPrediction().rows(VOCAB, 4)


@pytest.mark.parametrize("config", [GRUConfig(layers=1, width=8), EncoderConfig(layers=1, width=8, heads=2)], ids=str)
def test_models_that_cannot_be(config: Any) -> None:
    style = nnx.eval_shape(lambda: config.build(VOCAB, nnx.Rngs(0))).head_style
    with pytest.raises(UserError, match=r"none that others can stand beside; accepted: model.name=decoder"):
        MultiTokenPrediction().build_heads(style, VOCAB, nnx.Rngs(0))


def test_what_it_asks_of_rows_and_models() -> None:
    objective = MultiTokenPrediction()
    assert (objective.causal, objective.judged_by) == (True, "bits_per_byte")
    spec = objective.rows(Vocabulary(9, eos=3), 5)
    assert (spec, objective.rows(Vocabulary(9), 5).suffix) == (CausalLM().rows(Vocabulary(9, eos=3), 5), ())
    # The vocabulary's table is held against every position once for each token; three blocks are run besides.
    assert objective.use(64) == RowUse(64, 4 * 64, causal=True, further_blocks=3)


def check_losses(variant: str) -> None:
    test_losses_equal_those_of_each_document_in_numpy(variant, "llama")


def _heads_read(**fields: str) -> Any:
    """A replacement of a head's call that reads other states of the model."""

    def replacement(call: Any) -> Any:
        return lambda self, model, states: call(
            self, model, states._replace(**{name: getattr(states, other) for name, other in fields.items()})
        )

    return replacement


def _crossing(targets_ahead: Any) -> Any:
    def mutated(batch: Any, segments: Any, places: int) -> Any:
        return targets_ahead(batch, (segments > 0).astype(segments.dtype), places)

    return mutated


def _one_denominator(_: Any) -> Any:
    return lambda self, example: dict.fromkeys(self.coefficients, jnp.sum(example.weights))


def _not_shared_out(_: Any) -> Any:
    return property(lambda self: {"nll": 1.0} | {f"nll_{k}": 0.3 for k in self.further})


def _swapped(call: Any) -> Any:
    return lambda head, hidden, tokens, *more: call(head, tokens, hidden, *more)


def _from_the_first_layer(init: Any) -> Any:
    def mutated(self: Any, *given: Any) -> None:
        init(self, *given)
        self.stack.first = 0

    return mutated


BY_HAND = [test_targets_and_weights_by_hand]
PARALLEL, SEQUENTIAL = [lambda: check_losses("parallel")], [lambda: check_losses("sequential")]
MUTANTS = [
    (Mutant("one denominator for all", MultiTokenPrediction, "weights", _one_denominator), BY_HAND),
    (Mutant("targets cross documents", _multi_token, "targets_ahead", _crossing), BY_HAND),
    (Mutant("a place too near", _multi_token, "targets_ahead", lambda f: lambda b, s, k: f(b, s, k - 1)), BY_HAND),
    (
        Mutant("the weight of all for each", MultiTokenPrediction, "coefficients", _not_shared_out),
        [test_coefficients_are_those_of_the_papers],
    ),
    (Mutant("heads on the final states", ParallelHeads, "__call__", _heads_read(before_last="hidden")), PARALLEL),
    (Mutant("heads on the embeddings", ParallelHeads, "__call__", _heads_read(before_last="embedded")), PARALLEL),
    (
        Mutant("dropout of the model's layers", ParallelHeads, "__init__", _from_the_first_layer),
        [test_a_head_like_the_models_last_block_says_what_the_model_says],
    ),
    (Mutant("documents see one another", masks.AttentionMask, "packed", lambda _: lambda mask, _: mask), PARALLEL),
    (Mutant("states before the last", SequentialHeads, "__call__", _heads_read(hidden="before_last")), SEQUENTIAL),
    (Mutant("the token that is there", _further_tokens, "_next", lambda _: lambda x: x), SEQUENTIAL),
    (Mutant("the token to predict", _further_tokens, "_next", lambda f: lambda x: f(f(x))), SEQUENTIAL),
    (Mutant("token before state", SequentialHead, "__call__", _swapped), SEQUENTIAL),
]


@pytest.mark.parametrize(("mutant", "checks"), MUTANTS, ids=[str(mutant) for mutant, _ in MUTANTS])
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, checks: list[Any]) -> None:
    assert_killed(monkeypatch, mutant, checks)


@pytest.mark.parametrize("variant", ["parallel", pytest.param("sequential", marks=pytest.mark.slow)])
def test_it_learns_sums(variant: Any) -> None:
    """In parallel x_{t+k} is F_k x_t + F_{k-1} x_{t-1} if all k words up to it are lawful, with Fibonacci's F_3 = 2,
    which 5 does not divide: else it is anybody's guess, as it is at the row's first place. In sequence it is the sum of
    two words that are read, as lawful as the next one, from the first place on. Blind to one of them it is a guess."""
    language, sure = Sums(), 1 - Sums().surprise
    with jax.enable_x64(False):
        objective = MultiTokenPrediction(variant=variant, tokens=3)
        metrics = learn(objective, DECODER, language.vocab, *language.batches(steps=500), lr=1e-2)
    assert abs(metrics["accuracy"] - language.ceiling) < 0.04
    for k in (2, 3):
        if variant == "sequential":
            ceiling = sure + (1 - sure) / 5
        else:
            lawful = sure**k + (1 - sure**k) / 5
            ceiling = (1 / 5 + (language.length - k - 1) * lawful) / (language.length - k)
        assert abs(metrics[f"accuracy_{k}"] - ceiling) < 0.04
