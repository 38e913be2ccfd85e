"""Imports go down only. The floors are those of the architecture; a module that has none fails the test.

    1  errors, batch, masks, attention, partition, compat, losses, noise: arrays, no flax and no input or output
    2  models
    3  adapt, objectives, interop, data, tasks (which of the others imports data alone)
    4  evaluate, train (train may import evaluate)
    5  config, bench, search, speed (the last three may import config)
    6  cli

Read from the source by `ast`, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

_ROOT = pathlib.Path(__file__).parent.parent
_FLOORS = {
    **dict.fromkeys(("errors", "batch", "masks", "attention", "partition", "compat", "losses", "noise"), 1),
    **dict.fromkeys(("_yaml", "_cache", "_pieces", "_shares", "_units"), 1),
    "models": 2,
    **dict.fromkeys(("adapt", "objectives", "interop", "data", "tasks"), 3),
    **dict.fromkeys(("evaluate", "train"), 4),
    **dict.fromkeys(("config", "_settings", "bench", "search", "speed"), 5),
    **dict.fromkeys(("cli", "__main__"), 6),
}
"""`_yaml` reads text for `config` and `train` and knows nothing else."""

_SIDEWAYS = {("train", "evaluate"), ("__main__", "cli"), ("config", "_settings"), ("bench", "config"),
             ("bench", "_settings"), ("search", "config"), ("search", "_settings"), ("speed", "config")}  # fmt: skip
"""Which rooms of one floor may import one another, from the fourth up; below, a floor is free within itself."""

_ONLY = {"adapt": {"batch", "errors", "masks", "models", "noise", "partition"}, "tasks": {"batch", "data", "errors"}}
"""Rooms that import less than their floor would let them."""

_FREE = {"", "__version__"}
"""`lmobj` itself: its version alone."""

_HEAVY = {"flax", "optax", "orbax", "grain", "tensorflow_datasets", "sentencepiece", "array_record", "pydantic", "yaml",
          "typer", "rich", "matplotlib", "jinja2", "tensorboardX", "safetensors", "torch", "transformers",
          "peft", "sklearn", "optuna"}  # fmt: skip
_FLOOR_1_MAY = {"_yaml": {"yaml"}}


def _modules() -> list[pathlib.Path]:
    return sorted((_ROOT / "lmobj").rglob("*.py"))


def _room(path: pathlib.Path) -> str:
    """The first part of a module's name under lmobj; empty for lmobj/__init__.py."""
    first = path.relative_to(_ROOT / "lmobj").parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def _imports(path: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(dotted module, line) of everything a file imports, at any depth."""
    package = path.relative_to(_ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                ".".join([*package[: len(package) - node.level + 1], node.module or ""]) if node.level else node.module
            )
            yield from ((f"{base}.{alias.name}".replace("..", "."), node.lineno) for alias in node.names)


def _rises(room: str, target: str) -> bool:
    """Whether an import from `room` to `target` goes up, or sideways or down where it must not."""
    if target in (room, *_FREE):
        return False
    if target not in _ONLY.get(room, {target}):
        return True
    floor, other = _FLOORS[room], _FLOORS[target]
    if floor == other and floor >= 4:
        return (room, target) not in _SIDEWAYS
    return other > floor


@pytest.mark.parametrize("path", _modules(), ids=lambda path: str(path.relative_to(_ROOT)))
def test_imports_go_down_only(path: pathlib.Path) -> None:
    room = _room(path)
    for name, line in _imports(path):
        parts = name.split(".")
        assert parts[:2] != ["jax", "_src"] or room == "compat", f"{path}:{line}: {name} is private; compat.py asks jax"
        if parts[0] == "lmobj":
            target = parts[1] if len(parts) > 1 else ""
            assert room, f"{path}:{line}: lmobj/__init__.py imports {name}; it holds the version alone"
            assert target in _FLOORS or target in _FREE, f"{path}:{line}: {name} has no floor"
            assert not _rises(room, target), f"{path}:{line}: {room} imports {name}"
        elif room and _FLOORS[room] == 1:
            assert parts[0] not in _HEAVY - _FLOOR_1_MAY.get(room, set()), f"{path}:{line}: floor 1 imports {name}"
        elif room and _FLOORS[room] <= 3:
            assert parts[0] not in {"pydantic", "typer"}, f"{path}:{line}: floor {_FLOORS[room]} imports {name}"


def test_the_rule_sees_what_it_must() -> None:
    assert _rises("losses", "models")
    assert _rises("objectives", "train")
    assert _rises("evaluate", "train")
    assert _rises("adapt", "objectives")
    assert not _rises("interop", "adapt")
    assert not _rises("train", "evaluate")
    assert not _rises("data", "objectives")
    assert not _rises("cli", "losses")


@pytest.mark.parametrize("name", ["losses", "noise", "masks", "batch", "attention"])
def test_floor_1_loads_nothing_heavy(name: str) -> None:
    code = f"import sys, lmobj.{name}; print(*{{m.split('.')[0] for m in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=_ROOT, check=True, capture_output=True, text=True).stdout
    assert set(loaded.split()) & _HEAVY == set()
    assert "jax" in loaded.split()
