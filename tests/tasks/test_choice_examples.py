"""Rows of contexts with choices: by hand, cut to fit, and what is refused by its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmobj.batch import RowSpec, Vocabulary
from lmobj.data import ChoiceFiles, DataConfig, HeldOut, SentencePieceConfig
from lmobj.errors import UserError
from lmobj.tasks import ChoiceExamples, MultipleChoice, prepare_any
from lmobj.tasks._choice_examples import _fitted

SOURCE = ChoiceFiles(files=("x",))


class Letters:
    """A token for each letter: its number."""

    vocabulary = Vocabulary(200, pad=0)

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array([ord(letter) for letter in text], np.int32) for text in texts]


def spec(length: int, choices: int = 3) -> RowSpec:
    return RowSpec("choices", length, (4,), (5,), ("labels",), classes=choices)


def built(examples: list[MultipleChoice], length: int) -> Any:
    return ChoiceExamples(SOURCE).rows(examples, (), Letters(), spec(length), "data.source")  # type: ignore[arg-type]


def test_rows_by_hand() -> None:
    a, b, c, x, y = map(ord, "abcxy")
    found = built([MultipleChoice("ab", ("x", "cy"), 1), MultipleChoice("a", ("x", "y", ""), 0)], 16)
    assert found.arrays["tokens"].tolist() == [
        [4, a, b, 5, x, 5, 4, a, b, 5, c, y, 5, 0, 0, 0],
        [4, a, 5, x, 5, 4, a, 5, y, 5, 4, a, 5, 5, 0, 0],
    ]
    assert found.arrays["segment_ids"][0].tolist() == [1] * 6 + [2] * 7 + [0] * 3
    assert found.arrays["positions"][0].tolist() == [*range(6), *range(7), 0, 0, 0]
    assert found.arrays["token_types"].tolist() == [
        [0] * 4 + [1] * 2 + [0] * 4 + [1] * 3 + [0] * 3,
        [0] * 3 + [1] * 2 + [0] * 3 + [1] * 2 + [0] * 3 + [1] + [0] * 2,
    ]
    assert found.arrays["labels"].tolist() == [1, 0]
    assert found.arrays["labels"].dtype == np.int32
    assert (found.reference.cut.tolist(), found.notes) == ([False, False], ())


def test_contexts_are_cut_alike_and_counted() -> None:
    # 20 less 2 x 3 specials and 1 + 3 of the choices: 10, so 5 of the context for each.
    found = built([MultipleChoice("abcdefgh", ("x", "uvw"), 0), MultipleChoice("ab", ("x", "y"), 0)], 20)
    (row, _) = found.arrays["tokens"]
    assert bytes(row[row > 5].tolist()).decode() == "abcdexabcdeuvw"
    assert found.notes == ("1 of 2 examples are cut to fit into rows of 20 tokens (data.length).",)


@given(st.integers(0, 40), st.lists(st.integers(0, 30), min_size=2, max_size=5), st.integers(0, 60))
def test_what_is_kept_fits_and_no_more_would(context: int, choices: list[int], more: int) -> None:
    count = len(choices)
    room = 2 * count + more
    kept, longest = _fitted(context, choices, room)
    used = count * kept + sum(min(size, longest) for size in choices)
    assert used <= room
    assert 0 <= kept <= context
    if kept < context:  # nothing could be added but for what does not divide evenly
        assert used + count > room
        assert max(choices) <= longest or kept >= min(context, room // (2 * count))
    if longest < max(choices):
        assert room - used < count
        assert kept >= min(context, room // (2 * count))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(path: Path, source: dict[str, Any] | None = None, **settings: Any) -> DataConfig:
    given_source = ChoiceFiles(files=(str(path),), **(source or {}))
    return DataConfig(
        source=given_source, tokenizer=SentencePieceConfig(vocab_size=290), **{"test": 0.0, "length": 64, **settings}
    )


ROWS = [
    {"article": f"where {i}", "options": ["here", f"there {i}", "no"][: 2 + i % 2], "answer": i % 2} for i in range(30)
]
NAMES = {"context": "article", "choices": "options", "label": "answer"}


def test_a_data_set(tmp_path: Path) -> None:
    data = prepare_any(config(write(tmp_path / "train", ROWS), NAMES, validation=0.2))
    assert data.classes == ["0", "1", "2"]
    counts = data.summary()["splits"]
    assert counts["train"]["documents"] + counts["validation"]["documents"] == 30
    rows = data.rows(spec(64), split="validation", batch_size=4)
    reference = data.reference(spec(64), "validation")
    assert rows.per_epoch == len(reference.examples) > 0
    batch = rows.batch(0)
    for row, example in enumerate(reference.examples[:4]):
        for choice, text in enumerate(example.choices):
            tokens = batch["tokens"][row, batch["segment_ids"][row] == choice + 1]
            assert data.tokenizer.decode(tokens[~np.isin(tokens, (4, 5))]) == example.context + text
        assert batch["segment_ids"][row].max() == len(example.choices)
        assert batch["labels"][row] == example.label


def test_what_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "train", ROWS)
    with pytest.raises(UserError, match=r"train:1 has no 'context'; .* Its keys: article, options, answer"):
        prepare_any(config(path))
    unlabelled = write(tmp_path / "odd", [*ROWS[:2], {**ROWS[2], "answer": None}])
    with pytest.raises(UserError, match=r"data\.source\.label is 'answer', and .*odd:3 has no label there; .* 0 to 1"):
        prepare_any(config(unlabelled, NAMES))
    held = write(tmp_path / "held", [ROWS[0], {**ROWS[0], "options": list("abcde")}])
    data = prepare_any(config(path, NAMES, validation=HeldOut(files=(str(held),))))
    with pytest.raises(
        UserError, match=r"choices is 3, .* line 2 of data\.validation has 5 choices; accepted: 5 or more"
    ):
        data.rows(spec(64), split="validation", batch_size=2)
    with pytest.raises(UserError, match=r"data\.length is 14, and 3 choices .* accepted: 15 or more"):
        data.rows(spec(14), batch_size=2)
    with pytest.raises(UserError, match=r"layout 'examples' with labels, and data\.source\.name is 'choices'"):
        data.rows(RowSpec("examples", 64, (4,), (5,), ("labels",)), batch_size=2)


def test_examples_to_be_predicted_need_no_label(tmp_path: Path) -> None:
    path = write(
        tmp_path / "test",
        [{"context": "a", "choices": ["x", "y"]}, {"context": "b", "choices": ["x", "y"], "label": -1}],
    )
    examples = list(ChoiceExamples(SOURCE).read_unlabelled(str(path)))
    assert examples == [MultipleChoice("a", ("x", "y"), None), MultipleChoice("b", ("x", "y"), None)]
    assert built(examples, 16).arrays["labels"].tolist() == [0, 0]
