"""Weights from an earlier run: which are taken, which are new, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from lmobj import config
from lmobj.cli._main import main
from lmobj.errors import UserError
from lmobj.objectives import NextSentencePrediction
from lmobj.train import FitResult, assemble
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.initial import Init, inherited_state

Captured = pytest.CaptureFixture[str]


def going_on(masked: FitResult, *overrides: str) -> config.Experiment:
    """A config without model and tokenizer, that begins with the weights of a run of masked LM."""
    path = masked.run_dir.parent / "going_on.yaml"
    path.write_text(f"init: {{run: {json.dumps(str(masked.run_dir))}}}\nobjective: {{name: masked_lm}}\n")
    return config.load(path, ["data.length=16", "train.batch_size=8", *overrides])


def test_a_config_takes_over_model_and_tokenizer(masked: FitResult) -> None:
    experiment = going_on(masked, "model.dropout=0.25")
    assert experiment.model == dataclasses.replace(masked.assembly.builder, dropout=0.25)
    assert experiment.data.tokenizer.path == str(masked.run_dir / "tokenizer.model")
    run = assemble(experiment, quiet=True)
    assert run.dataset.tokenizer.fingerprint == masked.assembly.dataset.tokenizer.fingerprint
    # The resolved config is complete: it is read again when the earlier run is gone.
    again = masked.run_dir.parent / "resolved.yaml"
    again.write_text(run.config_yaml.replace(str(masked.run_dir), "/gone"))
    assert config.load(again).model == experiment.model


def test_the_weights_are_the_earlier_runs(masked: FitResult) -> None:
    run = assemble(going_on(masked, "train.seed=5"), quiet=True)
    assert run.config.init is not None
    state, note = inherited_state(run, run.config.init)
    assert note == f"Beginning with the weights of {masked.run_dir} at step {int(masked.state.step)}."
    jax.tree.map(np.testing.assert_array_equal, state.params, masked.state.weights)
    assert int(state.step) == 0
    fresh = run.initial_state()
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
    kernel = lambda state: state.params["model"]["stack"]["blocks"]["mlp"]["up"]["kernel"]  # noqa: E731
    assert np.abs(kernel(state) - kernel(fresh)).max() > 0.01


def test_heads_that_the_earlier_run_did_not_have_are_new(masked: FitResult) -> None:
    experiment = dataclasses.replace(going_on(masked), objective=NextSentencePrediction())
    run = assemble(experiment, quiet=True)
    state, note = inherited_state(run, Init(str(masked.run_dir)))
    assert note.endswith(", and new heads.")
    jax.tree.map(np.testing.assert_array_equal, state.params["model"], masked.state.weights["model"])
    jax.tree.map(np.testing.assert_array_equal, state.params["heads"], run.initial_state().params["heads"])


def test_a_moving_average_is_what_is_taken(masked: FitResult, tmp_path: pathlib.Path) -> None:
    ema = jax.tree.map(lambda x: x + 1, masked.state.params)
    (tmp_path / "config.yaml").write_text(masked.assembly.config_yaml)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, masked.state._replace(ema=ema))
    run = assemble(going_on(masked), quiet=True)
    state, _ = inherited_state(run, Init(str(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, state.params, ema)


def test_what_cannot_be_begun_with(masked: FitResult, tmp_path: pathlib.Path, capsys: Captured) -> None:
    run = assemble(going_on(masked, "model.width=32", "model.mlp_width=64"), quiet=True)
    with pytest.raises(UserError, match=r"a run of another model: params/model/\S+ is \[.*\] there and \[.*\] here"):
        inherited_state(run, Init(str(masked.run_dir)))
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(UserError, match="not a run folder"):
            inherited_state(run, Init(str(folder)))
    shutil.copy(masked.run_dir / "config.yaml", tmp_path)
    with pytest.raises(UserError, match="has no checkpoint yet"):
        inherited_state(run, Init(str(tmp_path)))
    with pytest.raises(UserError, match=r"init\.run is '  '"):
        Init("  ")

    path = tmp_path / "other.yaml"
    path.write_text(f"init: {{run: {tmp_path}}}\nobjective: {{name: masked_lm}}\n")
    assert main(["config", str(path)]) == 2
    assert "init.run is" in (err := capsys.readouterr().err)
    assert "has no tokenizer.model" in err
