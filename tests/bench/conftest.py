"""What the tests of benchmarks share with those of training: the tiny corpus and the tiny models."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator

import pytest

sys.path.append(str(pathlib.Path(__file__).parent.parent / "train"))  # tiny_runs

import tiny_runs


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    with tiny_runs.quick_compilation():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("bench_corpus") / "words.txt")
