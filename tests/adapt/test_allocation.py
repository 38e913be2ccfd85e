"""AdaLoRA: the forward pass, the regulariser, the budget and one allocation worked out by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from mutants import Mutant, assert_killed

from lmobj import adapt
from lmobj.adapt import _adalora
from lmobj.adapt._adalora import AdaLoRALinear
from lmobj.models._layers import Linear, zeros


def test_forward_and_merged() -> None:
    """x A = [1, 2] [[1, 0], [1, -1]] = [3, -2]; * e = [2, 0]: [6, 0]; times B = [[1], [5]]: 6; s = 8 / 2.00001."""
    base = Linear(
        2, 1, axes=("embed", "mlp"), init=zeros(), bias=False, param_dtype=jnp.float32, rngs=nnx.Rngs(params=0)
    )
    config = adapt.AdaLoRA(initial_rank=2, target_rank=1, alpha=8)
    adapted = AdaLoRALinear(base, config, nnx.Rngs(params=0))
    x = jnp.asarray([[1.0, 2.0]])
    np.testing.assert_array_equal(adapted(x), [[0]])
    for name, value in {"lora_a": [[1, 0], [1, -1]], "lora_e": [2, 0], "lora_b": [[1], [5]]}.items():
        getattr(adapted, name).set_value(jnp.asarray(value, jnp.float32))
    np.testing.assert_allclose(adapted(x), [[24]], rtol=1e-5)
    np.testing.assert_allclose(adapted.merged()(x), adapted(x), rtol=1e-6)


def test_regulariser() -> None:
    """A = [[2, 0], [0, 1]]: A^T A - 1 = diag(3, 0), of norm 3.

    B = [[1, 1], [0, 1]]: B B^T - 1 = [[1, 1], [1, 0]], of norm sqrt(3). The other layer is orthogonal, so that its
    norms and their gradients are 0. The mean of four.
    """
    eye = np.eye(2)
    params = {
        "frozen": np.ones(3),
        "query": {
            "lora_a": jnp.asarray([[[2.0, 0], [0, 1]], eye]),
            "lora_e": jnp.zeros((2, 2)),
            "lora_b": jnp.asarray([[[1.0, 1], [0, 1]], eye]),
        },
    }
    np.testing.assert_allclose(adapt.orthogonality(params), (3 + np.sqrt(3)) / 4, rtol=1e-6)
    grads = jax.grad(adapt.orthogonality)(params)["query"]["lora_a"]
    np.testing.assert_allclose(grads, [[[1, 0], [0, 0]], np.zeros((2, 2))], atol=1e-6)  # d/da of (a^2 - 1) / 4 at 2


def test_budget() -> None:
    """Two matrices of ranks 4 -> 1, so 8 -> 2, over steps 2 to 6: 8, then 2 + 6 (1 - (t - 2) / 4)^3 rounded down.

    t = 3: 2 + 6 * 27/64 = 4.53; t = 4: 2 + 6/8 = 2.75; t = 5: 2 + 6/64 = 2.09.
    """
    config = adapt.AdaLoRA(total_steps=9, initial_steps=2, final_steps=3, initial_rank=4, target_rank=1)
    budget = jax.jit(lambda t: adapt.rank_budget(config, 2, t))
    assert [int(budget(t)) for t in range(11)] == [8, 8, 8, 4, 2, 2, 2, 2, 2, 2, 2]


def test_budget_of_many_steps() -> None:
    """Every step of a long schedule is that of the formula in Python's numbers, whatever the budget's size."""
    config = adapt.AdaLoRA(total_steps=3000, initial_steps=100, final_steps=500, initial_rank=12, target_rank=8)
    steps = np.arange(3001)
    budgets = np.asarray(jax.vmap(lambda t: adapt.rank_budget(config, 72, t))(steps))
    expected = [int((12 - 8) * 72 * min(1.0, 1 - (t - 100) / 2400) ** 3 + 8 * 72) for t in range(2501)] + [576] * 500
    np.testing.assert_array_equal(budgets, expected)


def tree(a: Any, e: Any, b: Any) -> dict[str, Any]:
    """One adapter [1, 2] x [2, 1] beside a parameter of another kind."""
    return {
        "query": {"lora_a": jnp.asarray([a]), "lora_e": jnp.asarray(e), "lora_b": jnp.asarray(b)[:, None]},
        "norm": {"bias": jnp.asarray([5.0])},
    }


CONFIG = adapt.AdaLoRA(total_steps=4, final_steps=1, initial_rank=2, target_rank=1, interval=2, beta1=0.5, beta2=0.75)


def test_score() -> None:
    """5 * 1 + mean(1, 3) * 2 + mean(1, 2, 3) * 10 = 29, and 6 * 0 + mean(2, 4) * 2 + mean(4, 5, 6) * 10 = 56."""
    importance = {"lora_a": [[1, 2], [3, 4]], "lora_e": [5, 6], "lora_b": [[1, 2, 3], [4, 5, 6]]}
    uncertainty = {"lora_a": 2, "lora_e": [1, 0], "lora_b": 10}
    scores = _adalora._score(*({name: jnp.asarray(x) for name, x in t.items()} for t in (importance, uncertainty)))
    np.testing.assert_allclose(scores, [29, 56], rtol=1e-6)


def test_one_allocation() -> None:
    """Two steps by hand. Step 1 allocates nothing (the interval is 2), step 2 leaves one of two triples.

    Importances I = |w g| of A, e, B: (1, 1), (2, 1), (3, 1) and again. I_bar = I / 2, then 3/4 I.
    U_bar = 1/4 (I - I_bar) = I / 8, then 3/4 * I / 8 + I / 16 = 5/32 I.
    Scores I_bar U_bar = 15/128 I^2, of the triples 15/128 (14, 3).
    """
    params = tree([1.0, -1], [2.0, 1], [3.0, 1])
    grads = tree([1.0, 1], [-1.0, 1], [1.0, 1])
    state = adapt.init_allocation(params)
    same, state = adapt.allocate(CONFIG, params, grads, state, 1)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    np.testing.assert_allclose(state.importance["query"]["lora_e"], [1, 0.5])
    np.testing.assert_allclose(state.uncertainty["query"]["lora_e"], [1 / 4, 1 / 8])
    assert state.kept["query"].tolist() == [True, True]
    cut, state = adapt.allocate(CONFIG, params, grads, state, 2)
    np.testing.assert_allclose(state.importance["query"]["lora_b"][:, 0], [9 / 4, 3 / 4])
    np.testing.assert_allclose(state.uncertainty["query"]["lora_b"][:, 0], [15 / 32, 5 / 32])
    assert cut["query"]["lora_e"].tolist() == [2, 0]
    jax.tree.map(np.testing.assert_array_equal, {**cut, "query": None}, {**params, "query": None})


def test_the_last_allocation_holds() -> None:
    """Step 3 = 4 - 1 allocates by what was there before, its own gradients aside; step 4 keeps to it."""
    params = tree([1.0, 1], [1.0, 1], [1.0, 1])
    state = adapt.init_allocation(params)
    _, state = adapt.allocate(CONFIG, params, tree([0.0, 1], [0.0, 1], [0.0, 1]), state, 1)
    others = tree([9.0, 0], [9.0, 0], [9.0, 0])
    for step in (3, 4):
        cut, state = adapt.allocate(CONFIG, params, others, state, step)
        assert cut["query"]["lora_e"].tolist() == [0, 1]
        np.testing.assert_allclose(state.importance["query"]["lora_e"], [0, 0.5])


def test_equal_triples_are_dropped_together() -> None:
    params = tree([1.0, 1], [1.0, 1], [1.0, 1])
    cut, _ = adapt.allocate(CONFIG, params, params, adapt.init_allocation(params), 2)
    assert cut["query"]["lora_e"].tolist() == [0, 0]


def _by_importance(score: Any) -> Any:
    return lambda importance, uncertainty: score(importance, {name: jnp.ones(()) for name in importance})


def _by_alpha(config: adapt.AdaLoRA) -> float:
    return config.alpha


MUTANTS = [
    (Mutant("no uncertainty", _adalora, "_score", _by_importance), test_score),
    (Mutant("a linear schedule", _adalora, "_falls", lambda _: lambda *_: np.asarray([3, 3, 3, 4, 4, 5])), test_budget),
    (
        Mutant("no rank in the scale", adapt.AdaLoRA, "scale", lambda _: property(lambda s: s.alpha)),
        test_forward_and_merged,
    ),
]


@pytest.mark.parametrize(("mutant", "check"), MUTANTS, ids=lambda x: str(x) if isinstance(x, Mutant) else "")
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant, check: Any) -> None:
    assert_killed(monkeypatch, mutant, [check])
