"""Rows of marked texts: by hand, windows of long ones, and what is refused by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmobj.batch import RowSpec, Vocabulary
from lmobj.data import DataConfig, HeldOut, RelationFiles, SentencePieceConfig
from lmobj.errors import UserError
from lmobj.tasks import Relation, RelationExamples, prepare_any
from lmobj.tasks._relation_examples import _window

SOURCE = RelationFiles(files=("x",), head_markers=("<", ">"), tail_markers=("(", ")"))


class Letters:
    """A token for each letter: its number."""

    vocabulary = Vocabulary(200, pad=0)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(letter) for letter in text], np.int32) for text in texts]


def spec(length: int) -> RowSpec:
    return RowSpec("relations", length, (4,), (5,), ("labels", "spans"))


def built(examples: list[Relation], length: int) -> Any:
    classes = sorted({str(example.label) for example in examples})
    return RelationExamples(SOURCE).rows(examples, classes, Letters(), spec(length), "data.source")  # type: ignore[arg-type]


def text_of(row: np.ndarray) -> str:
    assert row[0] == 4
    assert row[np.count_nonzero(row) - 1] == 5
    return bytes(row[row > 5].tolist()).decode()


def test_rows_by_hand() -> None:
    found = built([Relation("a bc d", (2, 4), (5, 6), "s"), Relation("a bc d", (5, 6), (0, 1), "r")], 16)
    assert [text_of(row) for row in found.arrays["tokens"]] == ["a <bc> (d)", "(a) bc <d>"]
    # [CLS] is at 0, so a letter of the marked text stands one further.
    assert found.arrays["spans"].tolist() == [[3, 8], [8, 1]]
    assert found.arrays["labels"].tolist() == [1, 0]
    assert found.arrays["segment_ids"][0].tolist() == [1] * 12 + [0] * 4
    assert found.arrays["positions"][0].tolist() == [*range(12), 0, 0, 0, 0]
    assert found.notes == ()


def test_long_texts_keep_both_entities() -> None:
    # 14 of 22 tokens have room: the entities take 6 "<h>(t)", four are left on each side.
    long = Relation("abcdefgh" + "ht" + "ijklmnop", (8, 9), (9, 10), "s")
    # The entities span 26, of which 7 go on from the first and 7 lead to the second.
    far = Relation("h" + "abcdefghijklmnopqrst" + "t", (0, 1), (21, 22), "s")
    found = built([long, far], 16)
    assert [text_of(row) for row in found.arrays["tokens"]] == ["efgh<h>(t)ijkl", "<h>abcdqrst(t)"]
    assert found.arrays["spans"].tolist() == [[5, 8], [1, 12]]
    assert found.notes == (
        "2 of 2 texts are cut to windows with both entities (data.length is 16); of 1 these are too far apart, so what "
        "is between them is cut too.",
    )


@given(st.data())
def test_windows_hold_both_openings(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 40))
    first = data.draw(st.integers(0, count - 2))
    second = data.draw(st.integers(first + 1, count - 1))
    end = data.draw(st.integers(second + 1, count))
    room = data.draw(st.integers(2, 45))
    kept = _window(count, (first, second), end, room)
    assert len(kept) == min(count, room)
    assert (np.diff(kept) > 0).all()
    assert {first, second} <= set(kept.tolist()) <= set(range(count))
    if end - first <= room:
        assert set(range(first, end)) <= set(kept.tolist())
        assert (np.diff(kept) == 1).all()


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"text": f"Ada {verb} Bob {i}", "head": [0, 3], "tail": [5 + len(verb), 8 + len(verb)], "label": verb}
    for i, verb in enumerate(["saw", "met", "knew"] * 10)
]


def config(path: Path, no_relation: str | None = None, **settings: Any) -> DataConfig:
    source = RelationFiles(files=(str(path),), no_relation=no_relation)
    return DataConfig(
        source=source, tokenizer=SentencePieceConfig(vocab_size=300), **{"test": 0.0, "length": 32, **settings}
    )


def test_a_data_set(tmp_path: Path) -> None:
    data = prepare_any(config(write(tmp_path / "train", ROWS), "met", validation=0.3))
    assert data.classes == ["knew", "met", "saw"]
    reference = data.reference(spec(40), "validation")
    assert reference.no_relation == 1
    batch = data.rows(spec(40), split="validation", batch_size=len(reference.examples)).batch(0)
    opening = data.tokenizer.encode("[E1]").tolist(), data.tokenizer.encode("[E2]").tolist()
    for row, example in enumerate(reference.examples):
        assert data.classes[batch["labels"][row]] == example.label
        tokens = batch["tokens"][row, batch["segment_ids"][row] > 0]
        assert data.tokenizer.decode(tokens[1:-1]).startswith(f"[E1]Ada[/E1] {example.label} [E2]Bob[/E2] ")
        for marker, place in zip(opening, batch["spans"][row], strict=True):
            assert tokens[place : place + len(marker)].tolist() == marker


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train", ROWS)
    with pytest.raises(
        UserError, match=r"no_relation is 'none', which no training .* accepted: knew, met, saw, or null"
    ):
        _ = prepare_any(config(path, "none")).classes
    odd = write(tmp_path / "odd", [ROWS[0], {**ROWS[1], "label": None}])
    with pytest.raises(UserError, match=r"odd:2 has no 'label'; accepted: the name of a relation there"):
        prepare_any(config(odd))
    wrong = write(tmp_path / "wrong", [{"sentence": "a", "label": "b"}])
    with pytest.raises(UserError, match=r"wrong:1 has no 'text'; .* Its keys: sentence, label"):
        prepare_any(config(wrong))
    held = write(tmp_path / "held", [ROWS[0], {**ROWS[1], "label": "left"}])
    data = prepare_any(config(path, validation=HeldOut(files=(str(held),))))
    with pytest.raises(
        UserError, match=r"data\.validation: .* line 2 has the label 'left', .* accepted: knew, met, saw"
    ):
        data.rows(spec(40), split="validation", batch_size=2)
    with pytest.raises(UserError, match=r"data\.length is 3, .* accepted: 4 or more"):
        data.rows(spec(3), batch_size=2)
    with pytest.raises(UserError, match=r"head_markers is \[' ', '\]'\]; accepted: an opening"):
        RelationFiles(files=("x",), head_markers=(" ", "]"))


def test_examples_to_be_predicted_need_no_label(tmp_path: Path) -> None:
    path = write(tmp_path / "test", [{"text": "a b", "head": [0, 1], "tail": [2, 3], "label": 7}])
    (example,) = RelationExamples(SOURCE).read_unlabelled(str(path))
    assert example == Relation("a b", (0, 1), (2, 3), None)
    found = RelationExamples(SOURCE).rows([example], ["r", "s"], Letters(), spec(16), "--input")  # type: ignore[arg-type]
    assert found.arrays["labels"].tolist() == [0]
