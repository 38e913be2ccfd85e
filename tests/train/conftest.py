"""The corpus of the tiny runs, and one finished run of each objective, trained once for all tests."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest
import tiny_runs

from lmobj.train import FitResult, fit
from lmobj.train.trained import TrainedRun, open_run


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """For every test that trains: what resumes one of the runs below must be compiled as they are."""
    with tiny_runs.quick_compilation():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("corpus") / "words.txt")


@pytest.fixture(scope="session")
def causal(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A finished run of a causal language model. Nothing may write into its folder."""
    with tiny_runs.quick_compilation():
        return fit(tiny_runs.experiment(corpus, tmp_path_factory.mktemp("runs") / "causal"), quiet=True)


@pytest.fixture(scope="session")
def masked(corpus: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    """A finished run of a masked language model. Nothing may write into its folder."""
    with tiny_runs.quick_compilation():
        return fit(tiny_runs.experiment(corpus, tmp_path_factory.mktemp("runs") / "masked", "masked_lm"), quiet=True)


@pytest.fixture(scope="session")
def classified(tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """A finished run of `tiny_runs.classification`, opened again. Nothing may write into its folder."""
    config = tiny_runs.classification(tmp_path_factory.mktemp("classified"))
    with tiny_runs.quick_compilation():
        fit(config, quiet=True)
        return open_run(config, quiet=True)
