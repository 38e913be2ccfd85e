"""The command line: exit codes, one-paragraph errors, nothing half-written, and what commands print."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import yaml

import lmobj
from lmobj import config
from lmobj.cli import main
from lmobj.objectives import REGISTRY
from lmobj.train import environment
from lmobj.train.signals import Stopped

_ROOT = pathlib.Path(__file__).parent.parent.parent
_MINIMAL = "model: {name: gru}\nobjective: {name: causal_lm}\n"

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty working folder, with one good config in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(_MINIMAL)
    return tmp_path


def refusal(capsys: Captured, *argv: str) -> str:
    """What `lmobj` says to a mistake: one paragraph on stderr, nothing on stdout, exit code 2."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("lmobj: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_version(capsys: Captured) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lmobj {lmobj.__version__}\n"


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["train", "--help"], ["generate", "--help"]])
def test_help_is_given_and_exits_0(capsys: Captured, argv: list[str]) -> None:
    assert main(argv) == 0
    assert "Usage: lmobj" in capsys.readouterr().out


def test_every_command_explains_itself(capsys: Captured) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ("train", "resume", "eval", "generate", "fill", "plan", "config", "schema", "objectives", "doctor"):
        assert f" {name} " in text
        assert main([name, "--help"]) == 0


@pytest.mark.parametrize("argv", [["trian"], ["train"], ["--nonsense"], ["config", "good.yaml", "--nonsense"], []])
def test_usage_errors_exit_2_without_a_traceback(capsys: Captured, argv: list[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert "Usage: lmobj" in out + err
    assert "Traceback" not in out + err


@pytest.mark.parametrize("command", ["train", "config"])
@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (_MINIMAL + "train: {stepps: 3}", [], ["bad.yaml:3", "train.stepps (value 3)", "Did you mean train.steps?"]),
        (_MINIMAL, ["train.steps=many"], ["override 'train.steps=many'", 'train.steps is "many"', "a whole number"]),
        (_MINIMAL, ["train.steps=0"], ["train.steps is 0", "1 or more"]),
        (_MINIMAL, ["objective.name=causal"], ["objective.name", '"causal"', "masked_lm", "Did you mean causal_lm?"]),
        (_MINIMAL, ["train.steps"], ["'train.steps'", "key=value"]),
        ("model: [", [], ["bad.yaml:1:9", "not valid YAML"]),
        ("", [], ["bad.yaml: model is missing", "decoder, ", "gru"]),
        ("base: none.yaml", [], ["bad.yaml:1: base", "none.yaml does not exist"]),
        (None, [], ["bad.yaml does not exist"]),
    ],
)
def test_bad_configs_are_refused_and_nothing_is_written(
    capsys: Captured, folder: pathlib.Path, command: str, text: str | None, overrides: list[str], parts: list[str]
) -> None:
    if text is not None:
        (folder / "bad.yaml").write_text(text)
    before = sorted(folder.rglob("*"))
    message = refusal(capsys, command, "bad.yaml", *overrides)
    for part in parts:
        assert part in message
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "rest"), [("resume", ()), ("eval", ()), ("generate", ("--prompt", "x")), ("fill", ("x",))]
)
def test_commands_on_runs_refuse_what_is_no_run_folder(
    capsys: Captured, folder: pathlib.Path, command: str, rest: tuple[str, ...]
) -> None:
    message = refusal(capsys, command, "gone", *rest)
    assert "'gone' is not a run folder" in message
    assert not (folder / "gone").exists()


def test_train_refuses_a_run_folder_that_exists(capsys: Captured, folder: pathlib.Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "file").write_text("kept")
    message = refusal(capsys, "train", "good.yaml", "run=taken")
    assert "'taken', which already exists" in message
    assert "lmobj resume taken" in message
    assert [path.name for path in (folder / "taken").iterdir()] == ["file"]


def test_config_prints_the_resolved_config(capsys: Captured, folder: pathlib.Path) -> None:
    assert main(["config", "good.yaml", "train.steps=7"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["train"]["steps"] == 7
    (folder / "again.yaml").write_text(text)
    assert config.load("again.yaml") == config.load("good.yaml", ["train.steps=7"])


def test_schema_prints_json(capsys: Captured) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == config.schema()


def test_objectives_are_listed_with_summary_and_paper(capsys: Captured) -> None:
    assert main(["objectives"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("\t") == ["name", "what it does", "paper"]
    assert [line.split("\t") for line in lines[1:]] == [
        [name, kind.summary, kind.paper] for name, kind in sorted(REGISTRY.items())
    ]


def test_doctor_exits_with_what_it_finds(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMOBJ_CACHE", "cache")
    assert main(["doctor"]) == 0
    assert "Ready to train." in capsys.readouterr().out
    bad = environment.Check("disk", "gone", ok=False)
    monkeypatch.setattr(environment, "doctor", lambda: iter([environment.Check("python", "3"), bad]))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "no  disk" in out
    assert "stops training" in out


def _raise(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("lmobj.train.fit", fail)


def test_a_stopped_run_exits_with_128_and_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    _raise(monkeypatch, Stopped(15))
    assert main(["train", "good.yaml"]) == 143


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    _raise(monkeypatch, KeyboardInterrupt())
    assert main(["train", "good.yaml"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    _raise(monkeypatch, ValueError("ours"))
    with pytest.raises(ValueError, match="ours"):
        main(["train", "good.yaml"])


def test_as_a_program_it_is_quick_to_help_and_reports_mistakes() -> None:
    """`python -m lmobj` in a process of its own; --help loads no jax."""
    env = {**os.environ, "PYTHONPATH": str(_ROOT)}
    code = "import sys; from lmobj.cli import main; main(['--help']); assert 'jax' not in sys.modules"
    helped = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert "Usage: lmobj" in helped.stdout
    wrong = [sys.executable, "-m", "lmobj", "config", "none.yaml"]
    refused = subprocess.run(wrong, env=env, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "lmobj: none.yaml does not exist; give the path of a YAML file.\n"
