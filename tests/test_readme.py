"""The README's Python is run as it stands, and what it links to exists."""

from __future__ import annotations

import pathlib
import re

import jax
import numpy as np
import pytest

from lmobj import config

_ROOT = pathlib.Path(__file__).parent.parent
_TEXT = (_ROOT / "README.md").read_text(encoding="utf-8")
_BLOCKS = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)
_SECTIONS = re.findall(r"```yaml\n(.*?)```", _TEXT, re.DOTALL)


def test_the_functions_run_under_jit_and_grad() -> None:
    names: dict = {}
    exec(_BLOCKS[0], names)
    assert np.isfinite(names["value"])
    assert float(jax.numpy.abs(names["gradient"]["embed"]).sum()) > 0
    assert sum(bool(line.strip()) for line in _BLOCKS[0].splitlines()) <= 10


def test_an_objective_of_ones_own_trains(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it stands, but for a model, a text and a run of toy size."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"The number {i} comes before {i + 1}." for i in range(400)))
    monkeypatch.chdir(tmp_path)
    toy = [
        "run=runs/backwards",
        "data={source: {name: text, files: [text.txt], documents: blocks}, tokenizer: {vocab_size: 300}, length: 16}",
        "data.cache=cache",
        "model={name: decoder, layers: 1, width: 8, heads: 2, positions: rotary}",
        "train={steps: 2, batch_size: 8, optimizer: {name: sgd, schedule: {name: constant, peak: 0.1}}}",
        "sample=[]",
    ]
    block = _BLOCKS[1].replace('["run=runs/backwards"]', repr(toy))
    assert block != _BLOCKS[1]
    names: dict = {"__name__": "readme"}
    exec(block.replace('"configs/', f'"{_ROOT}/configs/'), names)
    assert names["result"].metrics["eval/bits_per_byte"] > 0


def test_the_data_section_is_a_valid_one(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mixed.yaml").write_text(f"model: {{name: gru}}\nobjective: {{name: causal_lm}}\n{_SECTIONS[0]}")
    data = config.load(tmp_path / "mixed.yaml").data
    assert {name: entry.weight for name, entry in data.source.sources.items()} == {"wiki": 3.0, "books": 1.0}
    assert data.clean.near_duplicates.threshold == 0.8


def test_the_task_is_a_valid_config(tmp_path: pathlib.Path) -> None:
    text = _SECTIONS[1].replace("init: {run: runs/english_encoder}", "model: {name: encoder}")  # of the run
    assert "init:" not in text
    (tmp_path / "task.yaml").write_text(text)
    task = config.load(tmp_path / "task.yaml")
    assert (task.objective.name, task.adapter.name, task.train.best.patience) == ("classification", "lora", 3)


def test_the_mixture_is_a_valid_objective(tmp_path: pathlib.Path) -> None:
    (tmp_path / "mixture.yaml").write_text(f"model: {{name: encoder}}\n{_SECTIONS[2]}")
    objective = config.load(tmp_path / "mixture.yaml").objective
    assert objective.weighting == "uncertainty"
    assert {name: member.source for name, member in objective.members.items()} == {"lm": "wiki", "nli": "pairs"}
    (term,) = re.findall(r"train\.coefficients: \{(\S+): ", _SECTIONS[2])
    assert term in objective.coefficients


def test_links_lead_somewhere() -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", _TEXT) if not t.startswith("http")]
    assert len(targets) > 10
    assert [t for t in targets if not (_ROOT / t).exists()] == []
