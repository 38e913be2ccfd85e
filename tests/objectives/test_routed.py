"""The losses of routers: their values by hand, and that they are those of the whole batch however it is split."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from lmobj import objectives
from lmobj.config import Experiment
from lmobj.data import DataConfig
from lmobj.errors import UserError
from lmobj.models import MoEConfig, RouterSums, recorded_routing
from lmobj.objectives import CausalLM, Context, Objective, Routed, with_router_losses
from lmobj.train import TrainConfig
from lmobj.train.assemble import Design, design
from lmobj.train.sharding import MeshConfig
from lmobj.train.step import Program
from tests.objectives.contract import BATCH, DECODER, LENGTH, VOCAB, Bench, Case, make_batch, norm_gap

MOE = MoEConfig(experts=4, capacity_factor=1.0)
CASE = Case(Routed(CausalLM()), {"model": dataclasses.replace(DECODER, moe=MOE)})


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        bench()  # not while a function is traced
        yield


@functools.cache
def bench() -> Bench:
    return Bench(CASE)


def sums_of(batch: Any) -> tuple[Any, RouterSums]:
    """The terms of a batch, and what the routers did with it, dropout off."""
    made = bench()
    noise, model = objectives.step_keys(made.key, batch["row_ids"], 0)
    ctx = Context(model, 0, VOCAB, train=False)
    example = made.objective.corrupt(noise, batch, ctx)
    models = {"model": _merged()}
    with recorded_routing() as calls:
        made.objective.objective.terms(models, example, (), ctx)
    return made.objective.terms(models, example, (), ctx), calls[0].sums


def _merged() -> Any:
    return nnx.merge(bench().graphs["model"], bench().params["model"])


def balance(counts: Any, probabilities: Any, tokens: float) -> float:
    """Fedus et al. 2021, eq. 4, mean over layers; f of pairs of token and choice."""
    layers = zip(counts, probabilities, strict=True)
    return float(np.mean([len(f) * np.sum((f / np.sum(f)) * (p / tokens)) for f, p in layers]))


def test_the_balance_by_hand() -> None:
    # Two experts, four tokens: three went to the first, mean probabilities 0.6 and 0.4: 2 (3/4 * 0.6 + 1/4 * 0.4).
    assert balance(np.array([[3.0, 1.0]]), np.array([[2.4, 1.6]]), 4.0) == pytest.approx(1.1)
    assert balance(np.array([[2.0, 2.0]]), np.array([[2.0, 2.0]]), 4.0) == pytest.approx(1.0)
    batch = make_batch()
    terms, sums = jax.jit(sums_of)(batch)
    tokens = float(np.sum(np.asarray(batch["segment_ids"]) > 0))
    assert np.sum(sums.counts, axis=1) == pytest.approx([2 * tokens] * 2)
    assert np.sum(sums.probabilities, axis=1) == pytest.approx([tokens] * 2)
    for name, value in {
        "load_balance": balance(sums.counts, sums.probabilities, tokens),
        "router_z": float(np.mean(sums.squares)) / tokens,
    }.items():
        total, weight = terms.metrics[name]
        assert float(total / weight) == pytest.approx(value, rel=1e-12)
        assert float(terms.sums[name]) == pytest.approx(value * tokens, rel=1e-12)
    dropped, pairs = terms.metrics["dropped"]
    assert 0 < float(dropped) < float(pairs) == 4 * tokens


def test_the_balance_is_the_whole_batchs_in_microbatches() -> None:
    """Dropout on. The mean of the microbatches' own balances is another number, and its gradient another gradient."""
    made = bench()
    weighty = {"nll": 1.0, "load_balance": 5.0, "router_z": 1.0}

    def program(parts: int) -> Program:
        fixed = {name: (lambda step, value=value: jnp.asarray(value)) for name, value in weighty.items()}
        return dataclasses.replace(made.program(parts), coefficients=fixed)

    whole, losses = made.train(program(1))
    split, split_losses = made.train(program(4))
    np.testing.assert_allclose(split_losses, losses, rtol=1e-12)
    change = lambda state: jax.tree.map(jnp.subtract, state.params, made.params)  # noqa: E731
    assert norm_gap(change(split), change(whole)) < 1e-10  # the difference of parameters loses two digits

    parts = [jax.jit(sums_of)(jax.tree.map(lambda x, i=i: x[i::4], make_batch()))[1] for i in range(4)]
    tokens = [float(np.sum(p.probabilities[0])) for p in parts]
    of_each = [balance(p.counts, p.probabilities, n) for p, n in zip(parts, tokens, strict=True)]
    together = jax.tree.map(lambda *x: sum(x), *parts)
    of_all = balance(together.counts, together.probabilities, sum(tokens))
    assert abs(np.average(of_each, weights=tokens) - of_all) > 1e-4 * of_all


def test_every_other_hook_is_the_objectives_own() -> None:
    """One that is added to the contract and forgotten in Routed would be the default's, in silence."""
    hooks = {name for name in vars(Objective) if not name.startswith("_")} - {"summary", "paper"}
    assert hooks <= set(vars(Routed))


def test_a_program_without_router_losses_is_refused() -> None:
    made = bench()
    with pytest.raises(ValueError, match=r"whose routers collapse .*Routed\(objective\)"):
        dataclasses.replace(made.program(), objective=CausalLM()).init(made.params, BATCH)
    models = {"model": _merged()}
    assert with_router_losses(CausalLM(), models) == Routed(CausalLM())
    assert with_router_losses(Routed(CausalLM()), models) == Routed(CausalLM())


def designed(mesh: MeshConfig, **moe: Any) -> Design:
    model = dataclasses.replace(DECODER, moe=MoEConfig(**{"experts": 8, **moe}), dtype="float64", param_dtype="float64")
    train = TrainConfig(batch_size=BATCH, mesh=mesh)
    config = Experiment(data=DataConfig(length=LENGTH), model=model, objective=CausalLM(), train=train)
    return design(config, VOCAB)


@pytest.mark.slow
def test_experts_over_devices() -> None:
    """One device's losses; each device has its experts' weights, to which tokens come by all-to-all."""
    one, run = designed(MeshConfig(data=1)), designed(MeshConfig(data=1, fsdp=2, expert=2, tensor=2))
    start = jax.device_get(one.initial_state())
    compiled = run.lower_train_step().compile()
    alone, together = start, jax.device_put(start, run.shardings)
    for step in range(2):
        rows = make_batch(first_row=BATCH * step)
        batch = {name: np.asarray(rows[name], shape.dtype) for name, shape in one.abstract_batch.items()}
        alone, expected = one.train_step(alone, batch)
        together, metrics = run.run_compiled(compiled, together, run.on_devices(batch))
        for name in ("loss", "load_balance", "router_z", "dropped", "grad_norm"):
            values = [float(total / weight) for total, weight in (metrics[name], expected[name])]
            np.testing.assert_allclose(*values, rtol=1e-10, err_msg=name)

    kernel = run.shardings.params["model"]["stack"]["blocks"]["mlp"]["experts"]["up"]["kernel"]
    assert kernel.spec == PartitionSpec(None, ("expert",), ("fsdp",), ("tensor",))
    text = compiled.as_text() or ""
    assert " all-to-all(" in text
    gathered = [
        sorted(int(n) for n in dims.split(",") if n != "1")
        for dims in re.findall(r"f64\[([\d,]+)\][^=\n]* all-gather(?:-start)?\(", text)
    ]
    assert sorted([4, 16, 32]) in gathered  # a device's half of the experts and of their width, whole over fsdp
    assert sorted([8, 16, 32]) not in gathered  # all experts


def test_meshes_that_do_not_divide_the_experts() -> None:
    with pytest.raises(UserError, match=r"train\.mesh\.expert"):
        designed(MeshConfig(data=1, expert=8), experts=4)
