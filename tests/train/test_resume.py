"""A run that was stopped, killed or damaged and then resumed is bit for bit the run that never stopped."""

from __future__ import annotations

import copy
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import pytest
from tiny_runs import STEPS, Kind, experiment, metric_lines, stored_bits

from lmobj import config
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.train import FitResult, fit, loop
from lmobj.train.run_folder import MAY_CHANGE, check_same_run
from lmobj.train.sharding import MESH_AXES

pytestmark = pytest.mark.usefixtures("quick_compilation")

Captured = pytest.CaptureFixture[str]


def copied(result: FitResult, folder: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run's folder, to be changed."""
    shutil.copytree(result.run_dir, folder)
    return folder


def resumed(result: FitResult, folder: pathlib.Path, **options: Any) -> FitResult:
    """Resumes the copy of a run under the config that the run was made with."""
    return fit(replace(result.assembly.config, run=str(folder)), resume=True, **options)


def assert_same_run(folder: pathlib.Path, reference: FitResult) -> None:
    """The same `train/*` and `eval/*` line by line, and the same state bit for bit."""
    assert metric_lines(folder) == metric_lines(reference.run_dir)
    abstract = reference.assembly.abstract_state
    assert stored_bits(folder, abstract) == stored_bits(reference.run_dir, abstract)
    for name in ("baselines.json", "samples.json"):
        assert (folder / name).read_bytes() == (reference.run_dir / name).read_bytes()
    assert (folder / "report.html").is_file()


# --- killed -------------------------------------------------------------------------------------------------------

_TRAIN_AND_DIE = """
import os, signal, sys
from lmobj.cli import main
from lmobj.train.tracking import Tracker

log = Tracker.log

def log_and_die(self, step, values):
    log(self, step, values)
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

Tracker.log = log_and_die
main(["train", sys.argv[1], "--quiet"])
"""


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh process with this session's devices, compile cache and compiler settings."""
    settings = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",  # few writes: one that is killed half way stays
    }
    root = pathlib.Path(__file__).parent.parent.parent
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **settings},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_killed_and_resumed_by_another_process(causal: FitResult, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    (tmp_path / "tiny.yaml").write_text(config.dump(replace(causal.assembly.config, run=str(run))))
    killed = _python("-c", _TRAIN_AND_DIE, str(tmp_path / "tiny.yaml"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (killed.stdout, killed.stderr) == ("", "")
    # Killed at step 10: the metrics are further than the newest checkpoint, and there is no report.
    assert metric_lines(run)[-1]["step"] == 10
    assert {path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()} >= {"4"}
    assert not (run / "report.html").exists()

    assert main(["resume", str(run), "--quiet"]) == 0
    assert_same_run(run, causal)


def test_killed_before_the_first_checkpoint(causal: FitResult, tmp_path: pathlib.Path, capsys: Captured) -> None:
    run = copied(causal, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match=r"train\.seed is 1, and the run was made with 0"):
        fit(
            replace(causal.assembly.config, run=str(run), train=replace(causal.assembly.config.train, seed=1)),
            resume=True,
            quiet=True,
        )
    assert metric_lines(run) == metric_lines(causal.run_dir)
    resumed(causal, run)
    assert capsys.readouterr().out.startswith("No checkpoint yet: starting from step 0.\n")
    assert_same_run(run, causal)


def test_killed_between_the_last_checkpoint_and_the_report(causal: FitResult, tmp_path: pathlib.Path) -> None:
    run = copied(causal, tmp_path / "run")
    for name in ("baselines.json", "samples.json", "report.html"):
        (run / name).unlink()
    before = (run / "metrics.jsonl").read_bytes()
    result = resumed(causal, run, quiet=True)
    assert (run / "metrics.jsonl").read_bytes() == before
    assert result.metrics == causal.metrics
    assert_same_run(run, causal)


# --- stopped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "number", "logged", "step", "code"),
    [
        # While the metrics of step 4 are written, step 5 is under way: it is finished, logged and saved.
        ("masked_lm", signal.SIGTERM, (4, "train/loss"), 5, 143),
        # The last evaluation is over, so that the rest is the report.
        ("causal_lm", signal.SIGINT, (STEPS, "eval/loss"), STEPS, 130),
    ],
)
def test_stopped_by_a_signal(
    kind: Kind,
    number: signal.Signals,
    logged: tuple[int, str],
    step: int,
    code: int,
    request: pytest.FixtureRequest,
    corpus: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:
    reference: FitResult = request.getfixturevalue(kind.split("_")[0])
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    class Interrupted(loop.Tracker):
        def log(self, at: int, values: Mapping[str, float]) -> None:
            super().log(at, values)
            if at == logged[0] and logged[1] in values:
                signal.raise_signal(number)

    words = tmp_path / "words.txt"
    shutil.copy(corpus, words)
    settings = experiment(words, tmp_path / "a run", kind, data={"cache": reference.assembly.config.data.cache})
    (tmp_path / "tiny.yaml").write_text(config.dump(settings))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Tracker", Interrupted)
        assert main(["train", str(tmp_path / "tiny.yaml")]) == code
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    told = re.search(r"^Saved at step (\d+)\. Continue with: lmobj (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert told is not None
    assert int(told[1]) == step
    assert (tmp_path / "a run" / "checkpoints" / str(step)).is_dir()
    assert not (tmp_path / "a run" / "report.html").exists()

    if kind == "masked_lm":
        text = words.read_text()
        words.write_text(text + "\n\nthe quick fox sees the house.\n")
        assert main(["resume", str(tmp_path / "a run")]) == 2
        assert "lmobj: The data has changed: data.source and data.tokenizer now have" in capsys.readouterr().err
        words.write_text(text)
    assert main(shlex.split(told[2])) == 0  # the command as it was printed
    assert f"Resuming from step {step}." in capsys.readouterr().out
    assert_same_run(tmp_path / "a run", reference)


# --- damaged ------------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_passed_over(causal: FitResult, tmp_path: pathlib.Path, capsys: Captured) -> None:
    run = copied(causal, tmp_path / "run")
    # The largest file holds the arrays; one bit of it is turned.
    file = max((run / "checkpoints" / str(STEPS)).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resumed(causal, run)
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert re.match(rf"The checkpoint of step {STEPS} in .* is damaged: .* does not fit its checksum\.", first)
    assert second == "Resuming from step 8."
    assert_same_run(run, causal)


# --- changed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "changed", "words"),
    [
        ("  seed: 0", "  seed: 1", "train.seed is 1, and the checkpoint was made with 0"),
        ("    peak: 0.003", "    peak: 0.002", "train.optimizer.schedule.peak is 0.002"),
        ("  z_loss: 0.0", "  z_loss: 0.1", "objective.z_loss is 0.1"),
        ("  width: 16", "  width: 32", "model.width is 32, and the checkpoint was made with 16"),
        ("    name: adamw", "    name: lion", "train.optimizer"),
    ],
)
def test_a_changed_config_is_refused(
    causal: FitResult, tmp_path: pathlib.Path, capsys: Captured, line: str, changed: str, words: str
) -> None:
    run = copied(causal, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    assert text.count(line + "\n") == 1
    text = text.replace(line + "\n", changed + "\n")
    if "lion" in changed:
        text = re.sub(r"^    eps: .*\n", "", text, flags=re.MULTILINE)
    (run / "config.yaml").write_text(text)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert main(["resume", str(run)]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert f"Free to change: {', '.join(MAY_CHANGE)}." in err
    assert (out, err.count("\n")) == ("", 1)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_only_says_where_and_how_fast_may_change(
    causal: FitResult, tmp_path: pathlib.Path, capsys: Captured
) -> None:
    run = copied(causal, tmp_path / "moved")
    before = (run / "metrics.jsonl").read_bytes()
    changes = ["train.mesh.data=2", "train.mesh.fsdp=2", "train.zero=true", "train.keep=1", "train.log_every=3"]
    assert main(["resume", str(run), *changes, "data.workers=1"]) == 0
    assert "on 4 cpu devices (data 2 x fsdp 2)" in capsys.readouterr().out
    assert (run / "metrics.jsonl").read_bytes() == before


def test_settings_that_came_after_a_run_must_be_off(causal: FitResult) -> None:
    identity = causal.assembly.identity
    stored = copy.deepcopy(identity)
    assert stored["config"]["train"].pop("ema") is None
    check_same_run(stored, identity)
    on = copy.deepcopy(identity)
    on["config"]["train"]["ema"] = {"decay": 0.9}
    with pytest.raises(
        UserError, match=r"train\.ema is \{'decay': 0\.9\}, and the checkpoint was made with '\(not set\)'"
    ):
        check_same_run(stored, on)
    with pytest.raises(UserError, match=r"train\.ema is '\(not set\)'"):  # nor may one be lost
        check_same_run(on, stored)


def test_every_key_but_those_is_held_fast(causal: FitResult) -> None:
    identity = causal.assembly.identity

    def keys(values: Mapping[str, Any], prefix: str = "") -> list[str]:
        found = []
        for key, value in values.items():
            found += keys(value, f"{prefix}{key}.") if isinstance(value, dict) and value else [prefix + key]
        return found

    def refusal(current: Mapping[str, Any]) -> str | None:
        try:
            check_same_run(identity, current)
        except UserError as error:
            return str(error)
        return None

    refused = set()
    for key in keys(identity["config"]):
        changed = copy.deepcopy(identity)
        *path, last = key.split(".")
        section = changed["config"]
        for name in path:
            section = section[name]
        section[last] = "something else"
        message = refusal(changed)
        if message is not None:
            assert message.startswith(f"{key} is 'something else', and the checkpoint was made with ")
            refused.add(key)
    free = {key for key in keys(identity["config"]) if key not in refused}
    assert free == {
        "run", *(f"train.mesh.{axis}" for axis in MESH_AXES), "train.zero", "train.log_every", "train.keep",
        "train.profile", "train.guard.nonfinite", "train.guard.spike", "train.guard.threshold", "train.guard.decay",
        "train.guard.warmup", "train.guard.dumps", "train.wandb",
        "data.cache", "data.workers", "generation", "writing",
    }  # fmt: skip
    assert "now have the fingerprint other, and the checkpoint was made with" in (
        refusal({**identity, "data": "other"}) or ""
    )
