"""Runs with an adapter: what is trained, what is kept, and what a run goes on with."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest
import tiny_runs

from lmobj import adapt, config
from lmobj.errors import UserError
from lmobj.train import FitResult, fit
from lmobj.train.assemble import assemble
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.initial import fingerprint, fresh_state
from lmobj.train.sharding import MeshConfig
from lmobj.train.trained import open_run

LORA = adapt.LoRA(rank=2)


def adapted(masked: FitResult, run: pathlib.Path, **changes: Any) -> config.Experiment:
    """Four steps on from the masked LM, of LoRA alone."""
    path = run.parent / "adapted.yaml"
    path.write_text(f"init: {{run: {json.dumps(str(masked.run_dir))}}}\nobjective: {{name: masked_lm}}\n")
    settings = dataclasses.replace(masked.assembly.config.train, steps=4, checkpoint_every=2, evaluate_every=4)
    experiment = config.load(path, ["adapter={name: lora, rank: 2}", "sample=['the [MASK] fox']"])
    data = dataclasses.replace(masked.assembly.config.data, tokenizer=experiment.data.tokenizer)
    return dataclasses.replace(experiment, run=str(run), data=data, train=settings, **changes)


def paths(tree: Any) -> set[str]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in flat}


@pytest.fixture(scope="module")
def tuned(masked: FitResult, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    with tiny_runs.quick_compilation():
        return fit(adapted(masked, tmp_path_factory.mktemp("adapted") / "run"), quiet=True)


def test_adapters_are_all_that_is_trained_and_stored(masked: FitResult, tuned: FitResult) -> None:
    width, layers = 16, masked.assembly.builder.layers
    # Queries and values of each layer: [16, 2] and [2, 16].
    assert tuned.assembly.parameter_count == layers * 2 * (2 * 2 * width)
    assert all(path.rpartition("/")[2] in ("lora_a", "lora_b") for path in paths(tuned.state.params))
    state = tuned.state.whole(tuned.state.params)["model"]
    base = masked.state.params["model"]
    assert paths(base) == {path for path in paths(state) if "lora" not in path}
    jax.tree.map(np.testing.assert_array_equal, tuned.state.frozen["model"], base)
    moved = [x for path, x in jax.tree_util.tree_flatten_with_path(state)[0] if "lora_b" in str(path)]
    assert all(np.abs(x).max() > 0 for x in moved), "they begin at zero"
    moments = [x for x in jax.tree.leaves(tuned.state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * tuned.assembly.parameter_count
    with Checkpoints(tuned.run_dir / "checkpoints") as checkpoints:
        stored = [path for path in checkpoints.arrays(4) if path.startswith("params/")]
    assert {path.removeprefix("params/") for path in stored} == paths(tuned.state.params)


def test_it_resumes_bit_for_bit_and_opens(tuned: FitResult, tmp_path: pathlib.Path) -> None:
    shutil.copytree(tuned.run_dir, tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    stopped = dataclasses.replace(tuned.assembly.config, run=str(tmp_path / "stopped"))
    with tiny_runs.quick_compilation():
        again = fit(stopped, resume=True, quiet=True)
        jax.tree.map(np.testing.assert_array_equal, again.state, tuned.state)
        opened = open_run(tuned.assembly.config, quiet=True)
        assert opened.evaluate()["loss"] == tuned.metrics["eval/loss"]
    jax.tree.map(np.testing.assert_array_equal, opened.state.frozen, tuned.state.frozen)


def test_the_first_loss_is_that_of_the_earlier_run(masked: FitResult, tuned: FitResult) -> None:
    """Adapters change nothing until they are trained, and dropout is off in evaluation."""
    run = tuned.assembly
    state, _ = fresh_state(run)
    batch = next(run.batches("validation", steps=1))
    with tiny_runs.quick_compilation():
        total, weight = run.eval_step(state, batch)[0]["nll"]
        expected, same = masked.assembly.eval_step(masked.state, batch)[0]["nll"]
    assert (float(total), float(weight)) == (pytest.approx(float(expected), rel=1e-6), float(same))


def test_frozen_weights_that_have_changed_are_refused(masked: FitResult, tmp_path: pathlib.Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(masked.run_dir, base)
    run = adapted(masked, tmp_path / "run", init=config.Init(str(base)))
    with tiny_runs.quick_compilation():
        fit(run, quiet=True)
    with Checkpoints(base / "checkpoints") as checkpoints:
        changed = jax.tree.map(lambda x: x.at[(0,) * x.ndim].add(1e-3), masked.state.params)
        checkpoints.save(13, masked.state._replace(params=changed))
    with pytest.raises(UserError, match=r"frozen weights, which are made from init\.run, .* are not those"):
        open_run(run, quiet=True)


def test_a_fingerprint_tells_every_bit_and_every_place() -> None:
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float64(1.5) * np.ones(2, np.float32)}
    assert fingerprint({}) is None
    one = fingerprint(tree)
    assert one == fingerprint(jax.tree.map(np.copy, tree))
    others = [{**tree, "a": tree["a"][::-1]}, {**tree, "b": np.nextafter(tree["b"], 2, dtype=np.float32)}]
    assert len({one, *map(fingerprint, others), fingerprint({"a": tree["b"], "b": tree["a"]})}) == 4


def test_without_an_earlier_run_the_seed_says_what_is_frozen(masked: FitResult, tmp_path: pathlib.Path) -> None:
    run = assemble(adapted(masked, tmp_path / "run", init=None), quiet=True)
    plain = assemble(dataclasses.replace(run.config, adapter=None), quiet=True)
    jax.tree.map(np.testing.assert_array_equal, run.initial_state().frozen, plain.initial_state().params)


@pytest.mark.slow
def test_adalora_ends_with_its_budget(masked: FitResult, tmp_path: pathlib.Path) -> None:
    """Of 3 ranks in each matrix one is left; allocation goes through a stop to the bit; zeros stay zeros."""
    adapter = adapt.AdaLoRA(initial_rank=3, target_rank=1, total_steps=4, initial_steps=1, final_steps=1)
    config = adapted(masked, tmp_path / "run", adapter=adapter)
    with tiny_runs.quick_compilation():
        whole = fit(config, quiet=True)
        shutil.copytree(tmp_path / "run", tmp_path / "stopped")
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
        again = fit(dataclasses.replace(config, run=str(tmp_path / "stopped")), resume=True, quiet=True)
    jax.tree.map(np.testing.assert_array_equal, again.state, whole.state)
    singular = [x for path, x in jax.tree_util.tree_flatten_with_path(whole.state.params)[0] if "lora_e" in str(path)]
    matrices = sum(x.shape[0] for x in singular)
    assert sum(int((np.asarray(x) != 0).sum()) for x in singular) == matrices
    assert whole.state.opt_state.step == 4


@pytest.mark.slow
def test_the_regulariser_is_counted_once_whatever_the_microbatches(masked: FitResult, tmp_path: pathlib.Path) -> None:
    adapter = adapt.AdaLoRA(initial_rank=3, target_rank=1, total_steps=9, orthogonality=5.0)

    def stepped(accumulate: int) -> Any:
        config = adapted(masked, tmp_path / "run", adapter=adapter)
        train = dataclasses.replace(config.train, accumulate=accumulate, mesh=MeshConfig(data=1))
        run = assemble(dataclasses.replace(config, train=train), quiet=True)
        state, _ = run.train_step(fresh_state(run)[0], next(run.batches("train", steps=1)))
        return state.opt_state.allocation.importance

    with tiny_runs.quick_compilation():
        one, four = stepped(1), stepped(4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9), one, four)
