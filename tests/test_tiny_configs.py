"""Every file of configs/tiny is trained to its last step, resumed from an earlier one to the same bits, and evaluated.

A new config states in `EXPECTED` what its run must reach.
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import make_tiny_data
import numpy as np
import pytest

from lmobj import config
from lmobj.train import FitResult, fit
from lmobj.train.trained import open_run
from tests.train.tiny_runs import metric_lines, quick_compilation

FOLDER = pathlib.Path(__file__).parent.parent / "configs" / "tiny"
FILES = sorted(FOLDER.glob("*.yaml"))


class Expected(NamedTuple):
    """A figure of the held-out text at the end, and the least or most that it may be."""

    metric: str
    below: float | None = None
    above: float | None = None

    def check(self, metrics: dict[str, float]) -> None:
        value = metrics[f"eval/{self.metric}"]
        assert np.isfinite(value)
        assert self.below is None or value < self.below
        assert self.above is None or value > self.above


UNIGRAM = 2.958
"""Bits per byte of the stdlib corpus under its token frequencies, which each run's baselines.json has."""

EXPECTED = {
    "causal_lm": Expected("bits_per_byte", below=UNIGRAM),
    "causal_lm_gru": Expected("bits_per_byte", below=UNIGRAM),
    "causal_lm_experts": Expected("bits_per_byte", below=UNIGRAM),
    "multi_token": Expected("bits_per_byte", below=UNIGRAM),
    "multi_token_sequential": Expected("bits_per_byte", below=UNIGRAM),
    # Of the documents that stay as they are, or of all: what is held out is not rearranged with the data.
    "fill_in_middle": Expected("bits_per_byte", below=UNIGRAM),
    "fill_in_middle_documents": Expected("bits_per_byte", below=UNIGRAM),
    # The frequencies of the training text give 6.264 nats per ordinary token of the held-out one.
    "masked_lm": Expected("nll", below=6.264),
    "masked_diffusion": Expected("nll", below=6.264),  # a bound
    "masked_lm_ngram": Expected("nll", below=6.264),
    # Of a row's 62 targets at a mean 2 are <s> and </s>: with these for nothing 6.264 * 60 / 62 by frequencies.
    "denoising_autoencoder": Expected("nll", below=6.06),
    "span_boundary": Expected("nll", below=6.264),
    # Targets of 14 tokens: 10 words, and 3 sentinels and the end, which cost what it takes to say where 10 words are
    # cut in 3, in one of 36 ways: (10 * 6.264 + log 36) / 14.
    "span_corruption": Expected("nll", below=4.73),
    "prefix_lm": Expected("nll", below=6.264),
    "mixture_of_denoisers": Expected("nll", below=6.264),  # of tokens some of which are no words, and cost less
    # Three classes, as many pairs of each.
    "classification": Expected("accuracy", above=0.9),
    # Of four topics each text has 1.4 at a mean, 0 to 3 and most often one.
    "multi_label": Expected("micro_f1", above=0.9),
    # Four choices.
    "multiple_choice": Expected("accuracy", above=0.9),
    # Half of the texts say something, of either direction as often.
    "relation": Expected("micro_f1", above=0.9),
    "regression": Expected("mse", below=0.15),  # a tenth of the variance, 6/4
    "token_classification": Expected("entity_f1", above=0.95),
    "extractive_qa": Expected("f1", above=0.95),
    "matching": Expected("mrr_at_10", above=0.6),  # BM25 reaches 0.31
    "simcse": Expected("loss", below=1.5),  # log 32 of vectors that are all alike
    "simcse_supervised": Expected("mrr_at_10", above=0.9),  # BM25 reaches 0.61
    # Who reads no source has to guess half of a target's words: those of "sale of car by Bob" but two, say.
    "translation": Expected("accuracy", above=0.9),
    "summarisation": Expected("accuracy", above=0.9),
    "mixture": Expected("lm/nll", below=6.264),
    "next_sentence": Expected("nll", below=6.264),
    "sentence_order": Expected("nll", below=6.264),
    "replaced_token_detection": Expected("mlm_nll", below=6.264),  # the same tokens
    # Half of the ordinary tokens at a time, from the rest and from memory.
    "permutation_lm": Expected("nll", below=6.264),
    "transformer_xl": Expected("bits_per_byte", below=UNIGRAM),
}


QUICK = ("causal_lm",)
"""The others are slow tests."""
every_config = pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem in QUICK else [pytest.mark.slow]) for p in FILES]
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the corpus that they share is prepared, once for all processes of the tests."""
    own = tmp_path_factory.getbasetemp()
    return (own.parent if own.name.startswith("popen-") else own) / "tiny_configs_data"


def test_every_config_says_what_it_reaches() -> None:
    assert {path.stem for path in FILES} == set(EXPECTED)


@every_config
def test_a_config_trains_resumes_and_evaluates(
    path: pathlib.Path, cache: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_tiny_data.write_data(path, tmp_path)
    with quick_compilation():
        loaded = config.load(path, [f"run={tmp_path / 'run'}", f"data.cache={cache}", "train.mesh.data=1"])
        steps = loaded.train.steps
        earlier = steps - max(steps // 8, 1)
        train = dataclasses.replace(loaded.train, checkpoint_every=earlier, evaluate_every=steps)
        loaded = dataclasses.replace(loaded, train=train)
        whole = fit(loaded, quiet=True)
        EXPECTED[path.stem].check(whole.metrics)

        shutil.copytree(tmp_path / "run", tmp_path / "stopped")
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / str(steps))
        resumed = fit(dataclasses.replace(loaded, run=str(tmp_path / "stopped")), resume=True, quiet=True)
        assert metric_lines(tmp_path / "stopped") == metric_lines(tmp_path / "run")
        assert bits(resumed) == bits(whole)

        metrics = open_run(loaded, quiet=True).evaluate()
    assert metrics == {name.removeprefix("eval/"): x for name, x in whole.metrics.items() if name.startswith("eval/")}


def bits(result: FitResult) -> dict[str, bytes]:
    """The bytes of every array of the final state, the optimizer's and the carried ones included, by path."""
    leaves: list[tuple[Any, Any]] = jax.tree_util.tree_flatten_with_path(result.state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
