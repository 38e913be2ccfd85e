"""Gradual unfreezing: when each parameter begins to learn, how large its first steps are, and resume."""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny_runs
from flax import nnx
from test_layer_decay import FAMILIES, VOCAB, WORDS_BELOW
from tiny_runs import STEPS, experiment, metric_lines, stored_bits

from lmobj import adapt
from lmobj.errors import UserError
from lmobj.models import ModelBuilder
from lmobj.train import TrainConfig, _depths, assemble, fit, unfreezing
from lmobj.train.optimizers import AdamW, make_optimizer
from lmobj.train.sharding import logical_axes
from lmobj.train.unfreezing import check_unfreezing, unfrozen_by_layer
from tests.mutants import Mutant, assert_killed


def first_updates(family: ModelBuilder, every: int) -> dict[str, np.ndarray]:
    """For every parameter by its path, or every layer of it, the first of nine updates that is not 0."""
    model = nnx.eval_shape(lambda: family.build(VOCAB, nnx.Rngs(0)))
    ones = {"model": jax.tree.map(lambda x: np.ones(x.shape, np.float32), nnx.to_pure_dict(nnx.state(model)))}
    ones["heads"] = {"classifier": {"kernel": np.ones((8, 3), np.float32)}}
    optimizer = unfrozen_by_layer(optax.identity(), every, logical_axes({"model": model}))
    state, seen = optimizer.init(ones), []
    for _ in range(9):
        updates, state = optimizer.update(ones, state, ones)
        seen.append({jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in
                     jax.tree_util.tree_flatten_with_path(updates)[0]})  # fmt: skip
    found = {}
    for name in seen[0]:
        history = np.stack([np.asarray(one[name]) for one in seen])
        assert set(np.unique(history)) <= {0.0, 1.0}, "whole or not at all"
        assert (np.diff(history, axis=0) >= 0).all(), "never frozen again"
        first = np.argmax(history, axis=0)
        found[name] = first.reshape(len(first), -1)[:, 0] if "stack/" in name or "layers/" in name else first.flat[0]
    return found


def check_order(family: ModelBuilder = FAMILIES[1]) -> None:
    # Three layers, every second update: the top layer from 2 on, the next from 4, the lowest from 6, embeddings from 8.
    kinds = set()
    for name, first in first_updates(family, 2).items():
        if "stack/" in name or "layers/" in name:
            np.testing.assert_array_equal(first, [6, 4, 2], err_msg=name)
            kinds.add("layers")
        elif any(word in name for word in WORDS_BELOW):
            assert first == 8, name
            kinds.add("below")
        else:
            assert first == 0, name
            kinds.add("above")
    assert kinds == {"layers", "below", "above"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_layers_join_from_the_top_down(family: ModelBuilder) -> None:
    check_order(family)


def test_the_first_steps_of_a_layer_are_as_large_as_the_others() -> None:
    """Adam's step for a gradient that does not change is the learning rate, at whatever update the layer thaws."""
    params = {"model": {"tokens": {"table": jnp.ones((4, 2))}, "head": {"kernel": jnp.ones((2, 2))}}}
    axes = {"model": {"tokens": {"table": ("vocab", "embed")}, "head": {"kernel": ("embed", None)}}}
    settings = AdamW(weight_decay=0.0, clip_norm=None)
    optimizer = unfrozen_by_layer(make_optimizer(settings, lambda step: 0.5, logical_axes=axes), 300, axes)
    state = optimizer.init(params)
    step = jax.jit(optimizer.update)
    for count in range(320):
        updates, state = step(params, state, params)
        frozen = 0.0 if count < 300 else -0.5
        np.testing.assert_allclose(updates["model"]["tokens"]["table"], frozen, rtol=1e-4)
        np.testing.assert_allclose(updates["model"]["head"]["kernel"], -0.5, rtol=1e-4)


def test_layers_that_are_frozen_apart_do_not_count() -> None:
    model = adapt.apply(FAMILIES[1].build(VOCAB, nnx.Rngs(0)), adapt.Freeze(layers=2), nnx.Rngs(0))
    params, _ = adapt.split(nnx.to_pure_dict(nnx.state(model)), adapt.trainable(model))
    axes = logical_axes({"model": model})
    check_unfreezing(5, 6, {"model": params}, axes)
    with pytest.raises(UserError, match=r"unfreeze_every is 6 and train\.steps is 6, and the lowest of 1 groups"):
        check_unfreezing(6, 6, {"model": params}, axes)


@pytest.mark.parametrize("every", [0, -1])
def test_values_that_are_none(every: int) -> None:
    with pytest.raises(UserError, match=r"train\.unfreeze_every is .*; accepted: 1 or more steps, or null"):
        TrainConfig(unfreeze_every=every)


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_and_its_resume(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Layers thaw at updates 3 and 6 and embeddings at 9; resumed after 8 of 12, it ends with the same bits."""
    config = experiment(corpus, tmp_path / "run", model={"tie_embeddings": False}, train={"unfreeze_every": 3})
    with pytest.raises(
        UserError, match=r"unfreeze_every is 4 and train\.steps is 12.*lowest of 3.*accepted: at most 3"
    ):
        assemble(dataclasses.replace(config, train=dataclasses.replace(config.train, unfreeze_every=4)), quiet=True)
    whole = fit(config, quiet=True)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole.run_dir, resumed)
    shutil.rmtree(resumed / "checkpoints" / str(STEPS))
    fit(dataclasses.replace(config, run=str(resumed)), resume=True, quiet=True)
    assert metric_lines(resumed) == metric_lines(whole.run_dir)
    stored = whole.assembly.abstract_state.stored
    assert stored_bits(resumed, stored) == stored_bits(whole.run_dir, stored)
    # At step 8 the embeddings are those of the beginning, and the lower layer has moved.
    with tiny_runs.Checkpoints(whole.run_dir / "checkpoints") as checkpoints:
        at_8 = checkpoints.restore(stored, step=8).state.params["model"]
    start = whole.assembly.initial_state().params["model"]
    np.testing.assert_array_equal(at_8["tokens"]["table"], start["tokens"]["table"])
    moved = np.abs(
        np.subtract(at_8["stack"]["blocks"]["mlp"]["up"]["kernel"], start["stack"]["blocks"]["mlp"]["up"]["kernel"])
    )
    assert (moved.max(axis=(1, 2)) > 0).all()
    assert np.abs(np.subtract(whole.state.params["model"]["tokens"]["table"], start["tokens"]["table"])).max() > 0


def _upward(arange: Callable[..., Any]) -> Callable[..., Any]:
    return lambda n, *more, **kwargs: arange(1, n + 1) if more == (0, -1) else arange(n, *more, **kwargs)


@pytest.mark.parametrize(
    "mutant",
    [
        Mutant("embeddings at once", _depths, "_BELOW", lambda _: ()),
        Mutant("from the bottom up", _depths.jnp, "arange", _upward),
        Mutant("twice as soon", unfreezing.optax, "safe_increment", lambda _: lambda count: count + 2),
    ],
    ids=str,
)  # fmt: skip
def test_mutants_are_noticed(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> None:
    assert_killed(monkeypatch, mutant, [check_order])
