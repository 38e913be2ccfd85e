"""What the tests of searches share: the tiny corpus, and a search over nothing that is trained."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

sys.path += [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parent.parent / "train")]

import tiny_runs
from search_curves import Make

from lmobj import _settings, _yaml
from lmobj.search import SearchExperiment, _run


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    with tiny_runs.quick_compilation():
        yield


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_runs.write_corpus(tmp_path_factory.mktemp("search_corpus") / "words.txt")


@pytest.fixture
def make(tmp_path: pathlib.Path) -> Make:
    """Makes a search in a folder of that name; the rest are the settings of its section."""

    def make(folder: str = "run", **settings: Any) -> SearchExperiment:
        values = {
            "name": "tried",
            "run": str(tmp_path / folder),
            "model": {"name": "decoder", "layers": 1, "width": 12, "heads": 2},
            "objective": {"name": "causal_lm"},
            "train": {"steps": 30, "evaluate_every": 10},
            "search": settings,
        }
        return _settings.build(SearchExperiment, _yaml.Document(values), "test")

    return make


@pytest.fixture
def unreported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take most of the time of a search that trains nothing."""
    monkeypatch.setattr(_run, "write_report", lambda *_: None)


@pytest.fixture(autouse=True)
def _unsynced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing waits for the disk, which is most of the time of a search that trains nothing."""
    import sqlalchemy

    def hasten(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=OFF")

    monkeypatch.setattr(os, "fsync", lambda _: None)
    sqlalchemy.event.listen(sqlalchemy.Engine, "connect", hasten)
    yield
    sqlalchemy.event.remove(sqlalchemy.Engine, "connect", hasten)
