"""Models on a mesh: what the partitioner makes of the logical axes. Programs are compiled, not run."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from families import CAUSAL, CONFIGS, states
from flax import nnx
from jax.sharding import NamedSharding

from lmobj import masks, partition
from lmobj.batch import Vocabulary
from lmobj.train.sharding import MeshConfig, make_mesh

ROWS, LENGTH = 24, 10  # numbers that no parameter has


@pytest.mark.parametrize("name", CONFIGS)
def test_devices_never_gather_each_others_rows(name: str) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    graphdef, params = nnx.split(jax.eval_shape(lambda: CONFIGS[name].build(Vocabulary(4096), nnx.Rngs(0))))

    def loss(params: Any, tokens: Any, segments: Any, seeds: Any) -> Any:
        mask = (masks.causal() if name in CAUSAL else masks.bidirectional()).packed(segments)
        return jnp.sum(jnp.sin(states(nnx.merge(graphdef, params), tokens, mask=mask, dropout=seeds)))

    def placed(shape: Any, axes: tuple[str | None, ...]) -> Any:
        sharding = NamedSharding(mesh, partition.spec(axes, partition.DEFAULT_RULES, rank=shape.ndim))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    for _, variable in nnx.to_flat_state(params):
        variable.set_value(placed(variable.get_value(), variable.get_metadata()["axes"]))
    ids = placed(jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32), ("batch", "length"))
    seeds = placed(jax.ShapeDtypeStruct((ROWS,), jnp.uint32), ("batch",))
    with jax.set_mesh(mesh), partition.rules(partition.DEFAULT_RULES):
        text = jax.jit(jax.grad(loss)).lower(params, ids, ids, seeds).compile().as_text()
    found = re.findall(r"f\d+\[([\d,]+)\][^=\n]* all-gather(?:-start)?\(", text)
    gathered = [[int(n) for n in shape.split(",")] for shape in found]
    assert gathered, "parameters split over fsdp are gathered where they are used"
    activations = {ROWS, ROWS * LENGTH, ROWS // 2, ROWS * LENGTH // 2}
    assert not [shape for shape in gathered if activations & set(shape)]
