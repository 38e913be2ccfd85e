"""Metrics files, event files, what the terminal shows, and what a resumed run forgets."""

from __future__ import annotations

import io
import json
import math
import pathlib
import struct
import sys
from dataclasses import replace
from typing import Any

import pytest
from fake_wandb import FakeWandB
from tensorboardX.proto.event_pb2 import Event

from lmobj.errors import UserError
from lmobj.train import devices, tracking
from lmobj.train.sinks import WandB, WandBSink
from lmobj.train.tracking import Tracker, read_metrics, truncate_metrics


class Clock:
    """Time that moves when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(tracking.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def lines_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def events_of(folder: pathlib.Path) -> list[Event]:
    """Every event, from the records of all files in the order of their making: length, crc, bytes, crc."""
    events = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content, offset = path.read_bytes(), 0
        while offset < len(content):
            (length,) = struct.unpack_from("<Q", content, offset)
            events.append(Event.FromString(content[offset + 12 : offset + 12 + length]))
            offset += 16 + length
    return events


def test_metrics_file_speed_and_events(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    with Tracker(tmp_path, total=100, tokens_per_step=64, quiet=True) as tracker:
        clock.now += 30  # compilation: no speed is told for the first lap
        tracker.log(10, {"train/loss": 3.5})
        clock.now += 2
        with tracker.timed("evaluation"):
            clock.now += 50
            tracker.log(10, {"eval/bits_per_byte": 2.25, "eval/bad": math.inf})
        with tracker.timed("input_wait"):
            clock.now += 0.5
        clock.now += 2.5
        with tracker.timed("saving"):
            clock.now += 5
        tracker.log(20, {"train/loss": math.nan})
        # Every line is on disk before the tracker is closed.
        assert lines_of(tmp_path / "metrics.jsonl") == [
            {"step": 10, "train/loss": 3.5},
            {"step": 10, "eval/bits_per_byte": 2.25, "eval/bad": None},
            # 10 steps in 2 + 3 seconds, 64 tokens each; in all 60 seconds.
            {
                "step": 20,
                "train/loss": None,
                "perf/steps_per_second": 2.0,
                "perf/tokens_per_second": 128.0,
                "perf/input_wait": 0.5 / 60,
                "perf/evaluation": 50 / 60,
                "perf/saving": 5 / 60,
                "perf/step": pytest.approx(4.5 / 60),
            },
        ]
        tracker.text(20, "samples/0", "once upon a time")
    back = read_metrics(tmp_path / "metrics.jsonl")
    assert back[0] == {"step": 10, "train/loss": 3.5}
    assert math.isnan(back[1]["eval/bad"])
    assert math.isnan(back[2]["train/loss"])

    scalars, texts = {}, {}
    for event in events_of(tmp_path / "tensorboard"):
        for value in event.summary.value:
            if value.HasField("tensor"):
                texts[value.tag] = (event.step, value.tensor.string_val[0].decode())
            else:
                scalars[value.tag, event.step] = value.simple_value
    assert scalars == {
        ("train/loss", 10): 3.5,
        ("eval/bits_per_byte", 10): 2.25,
        ("perf/steps_per_second", 20): 2.0,
        ("perf/tokens_per_second", 20): 128.0,
        ("perf/step", 20): pytest.approx(4.5 / 60),
        ("perf/input_wait", 20): pytest.approx(0.5 / 60),
        ("perf/evaluation", 20): pytest.approx(50 / 60),
        ("perf/saving", 20): pytest.approx(5 / 60),
    }
    assert list(texts.values()) == [(20, "once upon a time")]


def test_resuming_forgets_what_came_after_the_checkpoint(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Tracker(tmp_path, total=9, quiet=True) as tracker:
        for step in range(1, 7):
            tracker.log(step, {"eval/loss": float(step)})
    before = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 7, "eval/lo')  # killed while writing
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4, 5, 6]
    with Tracker(tmp_path, start=4, total=9, quiet=True) as tracker:
        assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:4])
        tracker.log(5, {"eval/loss": 50.0})
    assert [(line["step"], line["eval/loss"]) for line in read_metrics(path)] == [
        (1, 1),
        (2, 2),
        (3, 3),
        (4, 4),
        (5, 50),
    ]
    # TensorBoard hides what was logged at or after the step of a session's start event.
    events = events_of(tmp_path / "tensorboard")
    starts = [i for i, event in enumerate(events) if event.session_log.status == 1]
    assert [events[i].step for i in starts] == [1, 5]
    assert [e.step for e in events[starts[1] + 1 :] if e.HasField("summary")] == [5]


def test_truncation_replaces_the_file_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": null}\n{"step": 2, "a": 1.5}\n{"step": 3}\n')
    before = path.read_text()
    with monkeypatch.context() as patch:
        patch.setattr(tracking.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            truncate_metrics(path, 2)
    assert path.read_text() == before
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1, "a": null}\n{"step": 2, "a": 1.5}\n'
    truncate_metrics(path, 0)
    assert path.read_text() == ""
    truncate_metrics(tmp_path / "absent.jsonl", 3)
    assert not (tmp_path / "absent.jsonl").exists()


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1}', '{"step": "1"}', "\x00\x00"])
def test_a_damaged_line_is_named(tmp_path: pathlib.Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    for call in (read_metrics, lambda p: truncate_metrics(p, 1)):
        with pytest.raises(UserError, match=r"metrics\.jsonl:2 is damaged"):
            call(path)
    with pytest.raises(UserError, match="There is no"):
        read_metrics(tmp_path / "nothing.jsonl")


def test_plain_lines_come_at_intervals(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Tracker(tmp_path, total=50, tokens_per_step=1000, sinks=()) as tracker:
        for step in range(10, 51, 10):
            tracker.log(step, {"train/loss": 4.0})
            clock.now += 4
        tracker.log(50, {"eval/loss": 12345678.0, "eval/tiny": 1e-5})
        tracker.note("[done]")
    assert capsys.readouterr().out.splitlines() == [
        "step 10/50  loss 4.0000",
        # 12 seconds later: 10 steps of 1,000 tokens in 4 seconds; 10 steps are left.
        "step 40/50  loss 4.0000  2,500 tokens/s  ETA 0:04",
        "step 50/50  loss 4.0000  2,500 tokens/s  ETA 0:00",
        "step 50  eval/loss 1.23e+07  eval/tiny 1e-05",
        "[done]",
    ]
    assert not (tmp_path / "tensorboard").exists()
    with Tracker(tmp_path, total=50, quiet=True, sinks=()) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        tracker.note("hidden")
    assert capsys.readouterr().out == ""


def test_a_terminal_gets_one_live_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    clock = Clock(monkeypatch)
    with Tracker(tmp_path, total=7200, tokens_per_step=8, sinks=()) as tracker:
        for step in (1, 2, 3):
            tracker.log(step, {"train/loss": 9.0 - step})
            clock.now += 2
        tracker.log(3, {"eval/loss": 5.0})
    output = terminal.getvalue()
    assert "3/7200  loss 6.0000  4 tokens/s  ETA 3:59:54" in output  # 7197 steps of 2 seconds
    assert "\x1b[2K" in output  # the line is erased and drawn again
    assert "step 3  eval/loss 5.0000" in output
    # Erase sequences apart, the bar's line stands once, at the end.
    assert output.split("\x1b[2K")[-1].count("/7200") == 1


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H200", 989e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v4", 275e12),
        ("cpu", None),
        ("NVIDIA L400", None),
    ],
)
def test_peaks_by_kind_of_device(kind: str, peak: float | None) -> None:
    assert devices.peak_flops(kind) == peak


def test_utilisation_where_the_peak_is_known(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        platform, device_kind = "gpu", "NVIDIA A100-SXM4-80GB"

    monkeypatch.setattr(tracking.jax, "devices", lambda: [Device()] * 4)
    clock = Clock(monkeypatch)
    with Tracker(tmp_path, total=9, tokens_per_step=1e6, flops_per_step=1.5e14, quiet=True, sinks=()) as tracker:
        tracker.log(1, {"train/loss": 1.0})
        clock.now += 1
        tracker.log(2, {"train/loss": 1.0})
    # One step in a second, of which a device does 1.5e14 operations, over 312e12.
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["perf/mfu"] == pytest.approx(1.5e14 / 312e12)


# --- Weights & Biases -----------------------------------------------------------------------------------------------


def test_wandb_goes_on_in_the_same_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", service)
    settings = WandB(project="words", entity="us", group="g", tags=("a", "b"), mode="offline")
    config = {"train": {"steps": 9}}
    ids = []
    for start, code in ((0, 1), (4, 0)):
        service.calls.clear()
        try:
            sink = WandBSink(settings, tmp_path, name="tiny", config=config)
            with Tracker(tmp_path, start=start, total=9, quiet=True, sinks=[sink]) as tracker:
                tracker.log(5, {"eval/loss": 2.5, "eval/bad": math.inf})
                tracker.text(5, "sample", "the fox")
                if code:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            pass
        (_, given), *rest = service.calls
        ids.append(given.pop("id"))
        assert given == {
            "project": "words", "entity": "us", "name": "tiny", "group": "g", "tags": ("a", "b"), "mode": "offline",
            "resume": "allow", "dir": str(tmp_path), "config": config, "settings": {"console": "off", "silent": False},
        }  # fmt: skip
        assert rest == [
            ("define", ("step", {"hidden": True})),
            ("define", ("*", {"step_metric": "step"})),
            ("log", {"step": 5, "eval/loss": 2.5, "eval/bad": math.inf}),
            ("finish", code),
        ]
    assert service.summary == {"sample": "the fox"}
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text().strip()
    assert not (tmp_path / "tensorboard").exists()

    (tmp_path / "other").mkdir()
    WandBSink(replace(settings, name="mine"), tmp_path / "other", name="tiny", config={})
    assert service.calls[-3][1]["name"] == "mine"
    assert service.calls[-3][1]["id"] != ids[0]


def test_wandb_that_is_missing_or_refuses(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train\.wandb is set and.*pip install 'lmobj\[track\]'"):
        WandB().check()
    service = FakeWandB()
    service.refusal = "api_key not configured\n(no-tty)"
    monkeypatch.setitem(sys.modules, "wandb", service)
    WandB().check()
    with pytest.raises(
        UserError, match=r"refused the run: api_key not configured \(no-tty\) Log in with `wandb login`"
    ):
        WandBSink(WandB(), tmp_path, name="tiny", config={})
    with pytest.raises(UserError, match=r'train\.wandb\.project is ""'):
        WandB(project="")
