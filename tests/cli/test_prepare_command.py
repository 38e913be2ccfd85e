"""`lmobj prepare`: the same data as training would prepare, and a table of it."""

from __future__ import annotations

import json
import pathlib

import pytest

from lmobj.cli import main


@pytest.fixture
def config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"Row {number} has  {number * 7} words, and then some."} for number in range(200)]
    pathlib.Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[3], {"text": 5}]))
    pathlib.Path("config.yaml").write_text(
        """
data:
  source:
    name: mixture
    sources:
      a: {weight: 2, source: {name: jsonl, files: [rows.jsonl], errors: skip}}
      b: {source: {name: jsonl, files: [rows.jsonl], errors: skip, label: text}}
  clean: {whitespace: true, exact_duplicates: true}
  tokenizer: {vocab_size: 320}
  length: 16
  cache: cache
  workers: 1
model: {name: decoder, layers: 1, width: 16, heads: 2, max_length: 16}
objective: {name: causal_lm}
"""
    )
    return "config.yaml"


@pytest.mark.parametrize("options", [[], ["--beam", "--", "--runner=DirectRunner"]])
def test_it_prints_what_each_source_holds(config, options, capsys):
    assert main(["prepare", config, "--quiet", *options]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    documents = {(line[0], line[1]): int(line[2]) for line in lines[1:9]}
    for name in ("a", "b"):
        assert sum(documents[name, split] for split in ("train", "validation", "test")) == 200
        assert documents[name, "skipped"] == 1
    # Of the 201 rows each has two spaces in one place; the last is a copy of another.
    assert ["a", "whitespace", "201", "0", "201"] in lines
    size = len("Row 3 has 21 words, and then some.")
    assert ["b", "exact_duplicates", "0", "1", str(size)] in lines
    assert len(list(pathlib.Path("cache/data").glob("*/manifest.json"))) == 2


def test_options_of_beam_need_beam(config, capsys):
    assert main(["prepare", config, "--", "--runner=DirectRunner"]) == 2
    assert "--runner=DirectRunner is an option of a Beam pipeline" in capsys.readouterr().err
