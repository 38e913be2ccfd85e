"""Runs of an encoder-decoder: trained with an adapter, on a mesh, forecast and measured; and what refuses them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest
from test_model_flops import traced
from tiny_runs import LENGTH, experiment, quick_compilation

from lmobj import adapt, config, speed
from lmobj.batch import Vocabulary
from lmobj.errors import UserError
from lmobj.evaluate import GenerationConfig, SamplingConfig, ScoredText, continuation_log_probs
from lmobj.models import EncoderDecoderConfig
from lmobj.objectives import PrefixLM
from lmobj.train import FitResult, fit
from lmobj.train.assemble import Design, design
from lmobj.train.flops import model_flops
from lmobj.train.forecast import forecast
from lmobj.train.generation import check_generation
from lmobj.train.mesh_search import _layers
from lmobj.train.optimizers import SGD
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig
from lmobj.train.trained import TrainedRun, open_run

ROWS, HEADS, HEAD_WIDTH = 8, 2, 8
MODEL = EncoderDecoderConfig(
    layers=2, decoder_layers=1, width=16, heads=HEADS, head_width=HEAD_WIDTH, mlp_width=32, max_length=32,
    vocab_multiple=8, dropout=0.1,
)  # fmt: skip
VOCAB = Vocabulary(320, eos=3)


def tiny(corpus: pathlib.Path | str = "unread.txt", run: str = "unwritten", **train: Any) -> config.Experiment:
    """A run that goes on after prefixes, in 8 rows of 16 tokens."""
    settings = {"steps": 4, "evaluate_every": 4, "checkpoint_every": 4, "mesh": MeshConfig(data=1), **train}
    written = experiment(pathlib.Path(corpus), run, train=settings, sample=())
    return dataclasses.replace(written, model=MODEL, objective=PrefixLM())


def designed(**train: Any) -> Design:
    """What it computes, without any data."""
    return design(tiny(**train), VOCAB)


@pytest.fixture(scope="module")
def tuned(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    run = tiny(corpus, str(tmp_path_factory.mktemp("seq2seq") / "run"), layer_decay=0.5)
    with quick_compilation():
        return fit(dataclasses.replace(run, adapter=adapt.LoRA(rank=2)), quiet=True)


@pytest.fixture(scope="module")
def opened(tuned: FitResult) -> TrainedRun:
    return open_run(tuned.assembly.config, quiet=True)  # type: ignore[arg-type]


def test_an_adapter_is_trained_and_opened_again(tuned: FitResult, opened: TrainedRun) -> None:
    # Queries and values of five attentions (two layers and one, and that over the encoder): [16, 2] and [2, 16].
    assert tuned.assembly.parameter_count == (2 + 1 + 1) * 2 * (2 * 2 * 16)
    moved = [x for path, x in jax.tree_util.tree_leaves_with_path(tuned.state.params) if "lora_b" in str(path)]
    assert all(np.abs(x).max() > 0 for x in moved), "they begin at zero"
    with quick_compilation():
        assert opened.evaluate()["nll"] == tuned.metrics["eval/nll"]


def test_a_prompt_is_written_on(opened: TrainedRun) -> None:
    ((written,),) = opened.continue_text(["the quick"], SamplingConfig(max_new_tokens=4))
    assert 1 <= len(written.tokens) <= 4


def test_a_mesh_of_eight_learns_what_one_device_does() -> None:
    """The gradient by a step of SGD with a rate of 1, dropout on, over rows, widths, heads and length."""
    found = []
    for mesh in (MeshConfig(data=1), MeshConfig(data=1, fsdp=2, sequence=2, tensor=2)):
        parts = designed(mesh=mesh, optimizer=SGD(schedule=ConstantSchedule(peak=1.0), clip_norm=None, momentum=0.0))
        state = parts.initial_state()
        before = parts.gathered(state)
        with quick_compilation():
            state, metrics = parts.train_step(state, speed.synthetic_batch(parts.spec, ROWS, VOCAB, 0))
        gradients = jax.tree.map(np.subtract, before, parts.gathered(state))
        found.append((jax.device_get(metrics["nll"]), gradients["model"]))
    (one, alone), (eight, together) = found
    np.testing.assert_allclose(one, eight, rtol=1e-5)
    for path, x in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x, y: np.stack([x, y]), alone, together)):
        assert np.linalg.norm(x[0]) > 1e-3, path
        assert np.linalg.norm(x[1] - x[0]) <= 1e-4 * np.linalg.norm(x[0]), path


def test_model_flops_are_what_the_forward_pass_multiplies() -> None:
    parts = designed()
    hidden = ROWS * 1 * 4 * HEADS * HEAD_WIDTH * LENGTH * LENGTH // 2  # of the decoder's own attention, by its mask
    assert model_flops(parts) == 3 * (traced(parts) - hidden)


def test_a_forecast() -> None:
    told = forecast(tiny(mesh=MeshConfig(data=1, fsdp=8)), "h100", 8)
    attention, mlp = 4 * 16 * HEADS * HEAD_WIDTH, 3 * 16 * 32
    encoder, decoder = attention + mlp + 2 * 16, 2 * attention + mlp + 3 * 16
    assert told.parameters == 2 * 320 * 16 + 2 * (32 * HEADS + 16) + 2 * encoder + decoder
    assert told.model_flops == model_flops(designed())
    assert told.counted_flops is not None
    assert told.counted_flops > told.model_flops, "what masks hide is computed, and attention twice"
    assert told.fits


def test_layers_for_the_estimates_of_a_search() -> None:
    """Two of the encoder, and one of the decoder as 16 width^2 weights beside 12, over as many tokens."""
    assert _layers(designed()) == pytest.approx(2 + 16 / 12)


@pytest.mark.slow
def test_steps_are_measured() -> None:
    row = speed.measure(tiny(), steps=2)["contenders"][0]
    assert row["error"] is None
    assert row["attention"] == "xla"


# --- what is refused ----------------------------------------------------------------------------------------------

WRITES = "model is EncoderDecoder, whose decoder writes a row of its own beside the one that is read; accepted"


def test_commands_that_read_one_row_refuse_the_run(tuned: FitResult, opened: TrainedRun) -> None:
    with pytest.raises(UserError, match="the objective of this run is prefix_lm, which does not teach"):
        opened.fill_text("the [MASK]")
    with pytest.raises(UserError, match=WRITES):
        continuation_log_probs(opened.model, [ScoredText(np.arange(4), 2)])
    with pytest.raises(UserError, match="the objective prefix_lm with the model encoder_decoder trains none that"):
        check_generation(tuned.assembly, GenerationConfig(prompts=("the",)))


@pytest.mark.parametrize("name", ["causal_lm", "masked_lm", "classification", "permutation_lm", "simcse"])
def test_objectives_of_one_row_refuse_the_model(name: str) -> None:
    written = config.load(
        pathlib.Path(__file__).parent.parent.parent / "configs" / "tiny" / f"{name}.yaml",
        ["model={name: encoder_decoder, layers: 1, width: 16, heads: 2, dropout: 0.1}"],
    )
    vocab = Vocabulary(64, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6)
    with pytest.raises(UserError, match=r"set model\.name to (a decoder or an encoder|xlnet)"):
        design(written, vocab).lower_train_step()
