"""`lmobj plan`: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import json
import pathlib

import pytest

from lmobj.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small config, whose text is never read."""
    monkeypatch.chdir(tmp_path)
    pathlib.Path("config.yaml").write_text(
        """
data: {source: {name: text, files: [none.txt]}, tokenizer: {vocab_size: 320}, length: 16}
model: {name: decoder, layers: 1, width: 16, heads: 2, max_length: 16, remat: none}
objective: {name: causal_lm}
train: {batch_size: 16}
"""
    )
    return "config.yaml"


def test_a_forecast_is_printed(config: str, capsys: Captured) -> None:
    shared = ["train.mesh.tensor=8", "train.mesh.data=1", "model.heads=8", "model.kv_heads=2", "--devices", "8"]
    assert main(["plan", config, *shared]) == 0
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    names = {" ".join(line[:1]): line for line in lines if line}
    assert "on 8 x h100 (tensor 8)" in text
    assert names["weights"][2] == names["optimizer"][2] == "KiB"
    assert names["step"][-3:-1] == ["bound", "by"]
    assert "estimate" in text
    assert "Memory is an upper bound" in text
    assert "model.kv_heads is 2, which tensor = 8 does not divide" in text
    assert text.splitlines()[-1].startswith("Fits: 74.5")
    # Figures stand under one another, by their units.
    assert len({line.index("iB") for line in text.splitlines() if line.startswith("  ") and "iB" in line}) == 1


def test_json_has_the_same(config: str, capsys: Captured) -> None:
    assert main(["plan", config, "--devices", "8", "--device-kind", "h200", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["device"], told["devices"], told["mesh"]["data"], told["fits"]) == ("h200", 8, 8, True)
    parts = ("weights", "optimizer", "temporary", "other")
    assert told["memory"]["peak"] == sum(told["memory"][part] for part in parts)
    times = told["roofline"]
    assert times["step"] == max(times[name] for name in ("compute", "memory", "communication"))
    assert told["tokens_per_second"] == pytest.approx(16 * 16 / times["step"])
    assert {part["kind"] for part in told["collectives"]} == {"all-reduce"}


@pytest.mark.slow
def test_a_search_ends_with_what_to_paste(config: str, capsys: Captured) -> None:
    assert main(["plan", config, "--devices", "2", "--search", "--compile", "1", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["compiled"], len(told["found"])) == (1, 1)
    best = told["found"][0]
    assert set(best["overrides"]) >= {f"train.mesh.data={best['mesh']['data']}"}
    assert main(["plan", config, *best["overrides"], "--devices", "2", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["mesh"], again["remat"]) == (best["mesh"], best["remat"])


def test_a_search_prints_a_table(config: str, capsys: Captured) -> None:
    assert main(["plan", config, "--devices", "1", "--search", "--compile", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split("\t")[:3] == ["mesh", "remat", "accumulate"]
    assert out[1].split("\t")[0] == "one device"
    assert "settings tried" in out[3]
    assert "1 compiled, of which 1 fit" in out[3]
    assert out[-1].startswith("Best: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--devices", "8", "--device-kind", "h99"], "--device-kind is 'h99'; accepted: h100,"),
        (["--devices", "0"], "--devices is 0; accepted: 1 or more"),
        (["--devices", "6", "--device-kind", "v5p"], "no slices of 6 chips; accepted: 1, 2, 4, 8"),
        (["--devices", "8", "train.mesh.data=3"], "does not divide the 8 devices"),
        (["--devices", "8", "train.batch_size=4"], "train.batch_size is 4, which does not split"),
        (["--devices", "64"], "jax has started with 8 CPU devices"),
        (["--devices", "2", "--search", "--compile", "0"], "--compile is 0; accepted: 1 or more"),
    ],
)
def test_mistakes_are_told_in_one_paragraph(config: str, capsys: Captured, options: list[str], message: str) -> None:
    assert main(["plan", config, *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
