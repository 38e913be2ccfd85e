"""Compiled programs are kept between commands, unless the user has said where or that they shall not be."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import jax
import pytest

from lmobj import train
from lmobj._cache import keep_programs
from lmobj.cli import main


@pytest.fixture(autouse=True)
def fresh(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """jax as it begins, and the folder for programs; the tests' own settings come back."""
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("LMOBJ_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "programs"
    for name, value in before.items():
        jax.config.update(name, value)


def test_train_keeps_them(fresh: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    monkeypatch.setattr(train, "fit", lambda *_, **__: found.append(jax.config.jax_compilation_cache_dir))
    (tmp_path / "good.yaml").write_text("model: {name: gru}\nobjective: {name: causal_lm}\n")
    assert main(["train", str(tmp_path / "good.yaml")]) == 0
    assert found == [str(fresh)]


def test_the_users_own_folder_stays(fresh: pathlib.Path) -> None:
    jax.config.update("jax_compilation_cache_dir", "/somewhere")  # what JAX_COMPILATION_CACHE_DIR sets
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == "/somewhere"


def test_it_can_be_turned_off(fresh: pathlib.Path) -> None:
    jax.config.update("jax_enable_compilation_cache", False)  # what JAX_ENABLE_COMPILATION_CACHE=false sets
    assert keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
