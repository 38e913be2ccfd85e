"""The generated corpus and the data set prepared from it, shared by the tests of the data."""

from __future__ import annotations

import pytest
from data_corpus import generated_documents, small_config, write_blocks

from lmobj.data import Dataset, prepare


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return generated_documents(150)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, documents: list[str]) -> Dataset:
    folder = tmp_path_factory.mktemp("data")
    return prepare(small_config(folder, write_blocks(folder / "corpus.txt", documents)), quiet=True)
