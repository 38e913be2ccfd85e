"""A search that trains, tiny, through the command line: killed on the way, and with a trial that cannot be."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import tiny_runs

from lmobj import _settings, _yaml, search
from lmobj.cli import main
from lmobj.config import load
from lmobj.errors import UserError
from lmobj.search import Trainer
from lmobj.train.tracking import Tracker, read_metrics


class Killed(BaseException):
    """What nothing catches: stands for a kill, after which nothing more is written."""


def _write(corpus: pathlib.Path, folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    """The config of a search over three learning rates, in this order; training does not survive the last of them."""
    train = {
        "steps": 6,
        "batch_size": 4,
        "mesh": {"data": 1},
        "evaluate_every": 2,
        "checkpoint_every": 4,
        "log_every": 1,
    }
    shared = tiny_runs.experiment(corpus, folder, model={"layers": 1, "width": 8, "heads": 2, "dropout": 0.0})
    values = _settings.plain(shared) | {"name": "tiny", "sample": []}
    values["train"] |= train
    peaks = {"choices": [1e-3, 1e-2, 1e30]}
    values |= {"search": {"method": "grid", "seed": 5, "space": {"train.optimizer.schedule.peak": peaks}}, **changes}
    path = folder.parent / "tiny.yaml"
    path.write_text(_yaml.to_yaml(values))
    return path


def test_from_a_config_to_the_best_one(
    corpus: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], quick_compilation: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    path = _write(corpus, folder)
    log = Tracker.log

    def dying(self: Tracker, step: int, values: Any) -> None:
        log(self, step, values)
        if self.run_dir.name == "0001" and step == 5:  # the newest checkpoint is that of step 4
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "log", dying)
        with pytest.raises(Killed):
            main(["search", str(path)])
    assert [json.loads(line)["trial"] for line in (folder / "results.jsonl").read_text().splitlines()] == [0]
    finished = (folder / "trials/0000/report.html").stat().st_mtime_ns
    capsys.readouterr()

    assert main(["search", str(path)]) == 0
    out = capsys.readouterr().out
    assert "1 trial is finished already." in out
    assert "Trial 1 (2 of 3): peak=" in out
    assert "Trial 0" not in out
    assert (folder / "trials/0000/report.html").stat().st_mtime_ns == finished
    assert {"config.yaml", "study.db", "trials", "results.jsonl", "best.yaml", "report.html"} <= {
        file.name for file in folder.iterdir()
    }
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["trial"] for line in lines] == [0, 1, 2]
    assert [line["settings"]["train.optimizer.schedule.peak"] for line in lines] == [1e-3, 1e-2, 1e30]
    assert [line["state"] for line in lines] == ["complete", "complete", "failed"]
    assert "halted the run" in lines[2]["reason"]
    for line in lines[:2]:
        metrics = read_metrics(folder / line["run"] / "metrics.jsonl")
        steps = [entry["step"] for entry in metrics if "eval/loss" in entry]
        assert steps == [2, 4, 6], "none twice, resumed or not"
        assert line["value"] == metrics[-1]["eval/loss"]
        assert [step for step, _ in line["evaluations"]] == steps  # on so many batches each, and the value on all
    best = min(lines[:2], key=lambda line: line["value"])
    assert f"best {best['value']:.4g} (trial {best['trial']})" in out
    assert out.count("halted the run") == 2, "when it happened, and in the table"

    # The best config is one for `lmobj train`: the experiment of the best trial under another name.
    found, trained = load(folder / "best.yaml"), load(folder / best["run"] / "config.yaml")
    assert (found.name, found.run) == ("tiny-best", None)
    assert (found.train, found.model, found.data) == (trained.train, trained.model, trained.data)


def test_what_no_trial_could_satisfy_is_told_first(corpus: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    found = search.load(_write(corpus, folder), ["search.metric=f1", "search.mode=max"])
    with pytest.raises(UserError, match=r"search\.metric is 'f1'; accepted: .*bits_per_byte, loss"):
        search.run(found, quiet=True)
    found = search.load(_write(corpus, folder), ["data.validation=0"])
    with pytest.raises(UserError, match=r"data\.validation is 0: no text is held out"):
        Trainer().check(found, quiet=True)
    assert not folder.exists()
