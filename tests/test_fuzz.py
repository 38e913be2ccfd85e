"""A fixed slice of `tools/fuzz_inputs.py`, and that it sees what it is there to see."""

from __future__ import annotations

import pathlib
import random
import sys
import time
import typing
from collections.abc import Callable
from typing import NoReturn

import fuzz_inputs
import pytest
from fuzz_case import Case, Kind, flipped
from fuzz_configs import walk

from lmobj import _yaml, config
from lmobj.errors import UserError
from lmobj.models import ModelConfig

SLICE = {
    "setting": 40, "value": 20, "raw": 25, "missing": 8, "yaml": 25, "file": 25, "override": 25,
    "text": 8, "jsonl": 10, "compressed": 8, "parquet": 10, "tokenizer": 6, "cache": 8, "place": 12, "train": 10,
}  # fmt: skip
"""Cases per kind. TFDS, runs and options take the slow imports and are left to the tool."""


# TFDS and array_record read their own descriptions by names that newer protobufs discourage.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("kind", SLICE)
def test_malformed_inputs_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_inputs, "_PROCESS_EVERY", float("inf"))
    outcomes = [fuzz_inputs.run_case(kind, 0, number) for number in range(SLICE[kind])]
    failed = [f"{number}: {o.what}: {o.reason}" for number, o in enumerate(outcomes) if o.verdict == "failed"]
    assert not failed
    assert sum(o.verdict == "refused" for o in outcomes) >= len(outcomes) // 3


def test_the_settings_of_every_model_are_reached() -> None:
    """By the random walk, of which a 60th part goes to the settings of each family."""
    reached = {walk(random.Random(seed)).names.get(("model",)) for seed in range(600)}
    assert reached >= {family.name for family in typing.get_args(ModelConfig)}


def test_one_refusal_as_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz_inputs, "_PROCESS_EVERY", 1)
    assert fuzz_inputs.run_case("missing", 0, 0).verdict == "refused"


# --- the judge ---


def outcome_of(
    monkeypatch: pytest.MonkeyPatch, command: Callable[[tuple[str, ...]], int], **settings: object
) -> fuzz_inputs.Outcome:
    """What the tool says of a command that does `command` with a malformed input."""

    def make(draw: random.Random, folder: pathlib.Path) -> Case:
        (folder / "bad.yaml").write_text("x")
        return Case("a case", ("config", "bad.yaml"), names=("steps",), **settings)  # type: ignore[arg-type]

    monkeypatch.setitem(fuzz_inputs.KINDS, "probe", Kind(make, 1, 0.5))
    monkeypatch.setattr(fuzz_inputs, "lmobj", command)
    monkeypatch.setattr(fuzz_inputs, "_PROCESS_EVERY", float("inf"))
    return fuzz_inputs.run_case("probe", 0, 0)


def refuse(text: str = "lmobj: train.steps is wrong.\n", out: str = "", code: int = 2) -> Callable[..., int]:
    def command(argv: object) -> int:
        sys.stdout.write(out)
        sys.stderr.write(text)
        return code

    return command


def crash(argv: object) -> NoReturn:
    raise KeyError("steps")


def hang(argv: object) -> NoReturn:
    while True:
        time.sleep(0.01)


def leave(name: str) -> Callable[..., int]:
    def command(argv: object) -> int:
        pathlib.Path(name).write_text("")
        return refuse()(argv)

    return command


@pytest.mark.parametrize(
    ("command", "settings", "verdict", "reason"),
    [
        (refuse(), {}, "refused", "train.steps is wrong"),
        (refuse("", "name: x\n", 0), {"malformed": False}, "valid", ""),
        (refuse("", "name: x\n", 0), {}, "failed", "exit code 0 instead of 2"),
        (refuse(code=1), {}, "failed", "exit code 1 instead of 2"),
        (crash, {}, "failed", "KeyError at"),
        (hang, {}, "failed", "hang: over 0 s"),
        (refuse("train.steps is wrong.\n"), {}, "failed", "does not begin with"),
        (refuse("lmobj: train.steps\nis wrong.\n"), {}, "failed", "not one line"),
        (refuse("lmobj: train.steps is \x1b[31m.\n"), {}, "failed", "not one line"),
        (refuse("lmobj: something is wrong.\n"), {}, "failed", "does not name 'steps'"),
        (refuse("lmobj: Traceback\n"), {}, "failed", "a traceback on the terminal"),
        (refuse("Usage: lmobj\nError\n"), {}, "failed", "does not begin with"),
        (refuse("Usage: lmobj\nError\n"), {"own_words": False}, "refused", "Usage"),
        (refuse(out="half"), {}, "failed", "something on stdout"),
        (leave("run"), {}, "failed", "a refusal changed run"),
        (leave("bad.yaml"), {}, "failed", "a refusal changed bad.yaml"),
        (leave("cache.lock"), {"may_leave": ("cache",)}, "refused", "train.steps"),
        (leave("cache.partial"), {"may_leave": ("cache",)}, "failed", "a refusal changed cache.partial"),
        (refuse(), {"repair": lambda: None}, "failed", "with the input made good, exit code 2"),
    ],
)  # fmt: skip
def test_the_judge(
    monkeypatch: pytest.MonkeyPatch, command: Callable[..., int], settings: dict, verdict: str, reason: str
) -> None:
    outcome = outcome_of(monkeypatch, command, **settings)
    assert outcome.verdict == verdict, outcome
    assert reason in outcome.reason


def test_a_process_that_has_ended_is_noticed_and_replaced() -> None:
    worker = fuzz_inputs.Worker()
    try:
        worker.process.kill()
        assert worker.run("missing", 0, 0).reason == "the process ended with exit code -9"
        assert worker.run("missing", 0, 0).verdict == "refused"
    finally:
        worker.close()


def test_damage_changes_the_content_and_can_be_repeated() -> None:
    content = bytes(range(256))
    for seed in range(50):
        what, damaged = flipped(random.Random(seed), content)
        assert (what, damaged) == flipped(random.Random(seed), content)
        assert damaged != content or "zero bytes at 0" in what


# --- what was found by it ---


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("x: !!int abc", "bad.yaml:1:4: 'abc' is no !!int"),
        ("x: !!int [1]", "bad.yaml:1:4: a collection is no !!int"),
        ("x: !!bool yes", "'yes' is no !!bool"),
        ("x: !!null 1", "'1' is no !!null"),
        ("\nx: !!float ''", "bad.yaml:2:4: '' is no !!float"),
        ('\nx: "\\UFFFFFFFF"', "bad.yaml:2: not valid YAML: an escape stands for no character of Unicode"),
        ("x: " + "[" * 120 + "]" * 120, "nested too deeply"),
        ("a0: &a0 [x, y]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30)), "100000 values"),
        ("a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{b: *a{i - 1}}}\n" for i in range(1, 120)), "nested too deeply"),
        ('base: "a\\0b"', "a\\x00b' cannot be the path of a file"),
        ('base: "\\ud800"', "cannot be the path of a file"),
    ],
)  # fmt: skip
def test_yaml_that_used_to_be_a_traceback(tmp_path: pathlib.Path, text: str, part: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        config.load(tmp_path / "bad.yaml")
    assert part in str(error.value)


def test_a_mapping_that_is_merged_and_merges_has_its_keys_once() -> None:
    """PyYAML leaves both values of x in the inner mapping, which then looked like a key given twice."""
    values = _yaml.parse("a: {<<: &inner {<<: {x: 1, y: 1}, x: 2}, y: 3}\nb: *inner", "f.yaml").values
    assert values == {"a": {"x": 2, "y": 3}, "b": {"x": 2, "y": 1}}


def test_an_endless_device_and_a_huge_file_are_no_configs(tmp_path: pathlib.Path) -> None:
    (tmp_path / "huge.yaml").write_bytes(b"#" * (1 << 20) + b"\n")
    for path in (pathlib.Path("/dev/zero"), tmp_path / "huge.yaml"):
        with pytest.raises(UserError, match="holds more than 1048576 bytes"):
            config.load(path)


def test_an_override_of_a_thousand_parts_is_refused() -> None:
    with pytest.raises(UserError, match="nested too deeply"):
        _yaml.parse_overrides([".".join(["a"] * 1000) + "=1"])
