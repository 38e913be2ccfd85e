"""Model FLOPs of every family, against the products in the traced forward pass, and what of these does not count."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax
import pytest
from own_objective import BigramConfig, PredictPrevious

from lmobj.config import load
from lmobj.models import RowUse
from lmobj.train.assemble import Design, design
from lmobj.train.flops import model_flops
from lmobj.train.plan import planned_vocabulary

_TINY = pathlib.Path(__file__).parent.parent.parent / "configs" / "tiny"


def make(name: str, *overrides: str) -> Design:
    config = load(_TINY / f"{name}.yaml", ["model.vocab_multiple=1", *overrides])
    return design(config, planned_vocabulary(config.data.tokenizer))


def traced(parts: Design) -> int:
    """Operations of all matrix products of a forward pass over a batch, loops multiplied out, before any compiler."""
    carried = parts.abstract_state.objective.carried
    program = jax.make_jaxpr(parts.program.eval_step)(parts.abstract_state, {}, parts.abstract_batch, carried)
    return _products(program.jaxpr)


def _products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        values = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
        inner = [getattr(value, "jaxpr", value) for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]
        assert equation.primitive.name != "while" or not sum(map(_products, inner))
        total += sum(map(_products, inner)) * equation.params.get("length", 1)
    return total


# Of `configs/tiny`: layers, width, rows, tokens in a row, vocabulary.
_LAYERS, _D, _L, _V = 2, 64, 64, 2048
_PAIR_HEAD = 2 * (_D * _D + _D * 2)
"""Of a row: a dense layer and two classes."""
_HALF_OF_ATTENTION = _LAYERS * 4 * _D * _L * _L // 2
"""Of a row: what a causal mask hides is computed all the same, and then masked."""


def _xlnet_extra(rows: int, memory: int, predictions: int, ways: int, reach: int, segments: bool) -> int:
    """Products with distances that are out of sight, the distances' projection, and the two segments."""
    queries = _L + predictions
    unseen = 2 * _D * (reach - memory - _L) * queries * rows
    projection = 2 * ways * reach * _D * _D
    return _LAYERS * (unseen + projection + 2 * 2 * _D * queries * rows * segments)


@pytest.mark.parametrize(
    ("name", "overrides", "uncounted"),
    [
        ("masked_lm", (), 0),
        ("masked_lm", ("model.embedding_width=32", "model.share_layers=true"), 0),
        ("next_sentence", (), 16 * _PAIR_HEAD),
        ("causal_lm", (), 8 * _HALF_OF_ATTENTION),
        ("causal_lm", ("model.activation=swiglu", "model.kv_heads=1"), 8 * _HALF_OF_ATTENTION),
        # Experts with room for an even share, as many places as there are choices.
        ("causal_lm", ("model.moe={experts: 4, capacity_factor: 1.0}",), 8 * _HALF_OF_ATTENTION),
        ("causal_lm_gru", (), 0),
        # Two layers, and a block for each of three heads or of one; the latter has a map of 2 x 64 to 64 before it.
        ("multi_token", (), 8 * _HALF_OF_ATTENTION * 5 // 2),
        ("multi_token_sequential", (), 8 * (_HALF_OF_ATTENTION * 3 // 2 + 2 * _L * 2 * _D * _D)),
        # The generator's logits are computed once more to sample from: 19 slots, embeddings 64 wide.
        ("replaced_token_detection", (), 16 * 2 * 19 * _D * _V),
        # The border head: (2 x 64 + 200) x 64 and 64 x 64 weights, where the formula has another 64 x 64; 20 slots.
        ("span_boundary", (), 16 * 2 * 20 * ((2 * _D + 200) * _D + _D * _D - _D * _D)),
        # Half of the rows read backwards, so there are distances both ways: 2 x (memory + 2 x length) of them.
        ("permutation_lm", (), _xlnet_extra(8, 32, 32, ways=2, reach=32 + 2 * _L, segments=True)),
    ],
)
def test_the_formula_is_what_the_forward_pass_multiplies(name: str, overrides: tuple[str, ...], uncounted: int) -> None:
    parts = make(name, *overrides)
    # Backwards every product has two.
    assert model_flops(parts) == 3 * (traced(parts) - uncounted)


def test_members_of_a_mixture_count_by_their_rows() -> None:
    parts = make("mixture", "objective.combine=sample")
    assert parts.batch_sizes == {"lm": 8, "order": 8}
    assert model_flops(parts) == 3 * (traced(parts) - 8 * _PAIR_HEAD)


def test_a_memory_is_seen_whole_and_the_row_by_half() -> None:
    parts = make("transformer_xl")
    memory, rows = parts.config.model.memory_length, parts.config.train.batch_size  # type: ignore[attr-defined]
    reach = memory + _L + 1
    # Three products in attention for each pair of a token and a later one that it does not see.
    hidden = rows * _LAYERS * 6 * _D * _L * _L // 2
    extra = _xlnet_extra(rows, memory, 0, ways=1, reach=reach, segments=False)
    assert model_flops(parts) == 3 * (traced(parts) - extra - hidden)


def test_keys_in_sight() -> None:
    assert RowUse(64, 64).keys() == 64
    assert RowUse(64, 64, causal=True).keys() == 32
    # The mean of min(t, 16) over [0, 64): a quarter of the row at 8 on average, the rest at 16.
    assert RowUse(64, 64, causal=True).keys(16) == 0.25 * 8 + 0.75 * 16
    assert RowUse(64, 64, causal=True).keys(100) == 32


def test_a_model_of_ones_own_counts_by_its_parameters() -> None:
    config = make("masked_lm", "train.optimizer={name: sgd}").config
    parts = design(config, planned_vocabulary(config.data.tokenizer), objective=PredictPrevious(), model=BigramConfig())
    assert model_flops(parts) == 6 * (2 * _V * 16) * 16 * _L
