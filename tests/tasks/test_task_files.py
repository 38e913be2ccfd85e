"""Files of tasks: what they say, what they survive, and what is refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmobj.errors import UserError
from lmobj.tasks import (
    GoldAnswer,
    MultipleChoice,
    Question,
    Relation,
    TaggedSentence,
    mark_entities,
    read_conll,
    read_multiple_choice,
    read_relations,
    read_squad,
    read_tagged_lines,
)

ODD = "one\u2028two\u0085three\x0cfour\u3000five"
"""White space at which `str.splitlines` or `str.split` would part a text."""

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_text(content: str | bytes) -> Path:
        path = tmp_path / "file"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write_text


def squad(questions: list[dict[str, Any]], context: str = "Ada wrote. Ada read.") -> str:
    return json.dumps({"data": [{"title": "T", "paragraphs": [{"context": context, "qas": questions}]}]})


def question(**fields: Any) -> dict[str, Any]:
    return {"id": "q", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 11}], **fields}


def test_squad(write: Write) -> None:
    context = "Ada wrote. Ada read."
    nothing = question(id=7, answers=[], is_impossible=True, plausible_answers=[{"text": "Ada", "answer_start": 0}])
    found = list(read_squad(write(squad([question(), nothing, {"id": "t", "question": "Why?"}]))))
    assert found == [
        Question("q", "Who?", context, (GoldAnswer("Ada", 11, 14),), False, 0, "T"),
        Question("7", "Who?", context, (), True, 0, "T"),
        Question("t", "Why?", context, (), False, 0, "T"),
    ]


def test_squad_answers_that_are_elsewhere(write: Write) -> None:
    places = [("Ada", 0), ("Ada", 1), ("wrote", -6), ("", 3), ("read.", 15), ("read.!", 15)]
    answers = [{"text": text, "answer_start": start} for text, start in places]
    path = write(squad([question(answers=answers), question(id="r", answers=answers[1:2])]))
    first, second = read_squad(path)
    assert [answer.start for answer in first.answers] == [0, 15]
    assert first.dropped == 4
    assert (second.answers, second.dropped, second.impossible) == ((), 1, False)
    with pytest.raises(UserError, match=r"qas\[0\]\.answers\[1\] \(id q\) says 'Ada' stands at 1, where"):
        list(read_squad(path, strict=True))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_marks_line_ends_and_odd_spaces_are_survived(write: Write, end: str, mark: str) -> None:
    """A byte order mark, \\r\\n, empty lines, and separators of lines that are part of a text."""
    text = squad([question(answers=[{"text": "three", "answer_start": 8}])], ODD)
    for content in (text, json.dumps(json.loads(text), ensure_ascii=False, indent=1).replace("\n", end)):
        (found,) = read_squad(write(mark + content))
        assert (found.context, found.answers[0].text) == (ODD, "three")

    rows = [{"context": ODD, "choices": ["a", ODD], "label": 1}, {"context": "", "choices": ["a", "b"]}]
    path = write(mark + f"{end}{end}".join(json.dumps(row, ensure_ascii=False) for row in rows) + end + " " + end)
    assert list(read_multiple_choice(path)) == [
        MultipleChoice(ODD, ("a", ODD), 1),
        MultipleChoice("", ("a", "b"), None),
    ]

    row = {"text": ODD, "head": [0, 3], "tail": [8, 13], "label": "before"}
    path = write(mark + json.dumps(row, ensure_ascii=False) + end)
    assert list(read_relations(path)) == [Relation(ODD, (0, 3), (8, 13), "before")]

    path = write(mark + end.join(["\u3000 O", "\u2028 B-x", "", " \t", "吴 I-x", ""]))
    assert list(read_conll(path)) == [
        TaggedSentence(("\u3000", "\u2028"), ("O", "B-x"), 1),
        TaggedSentence(("吴",), ("I-x",), 5),
    ]

    path = write(mark + end.join(["a \u3000 b\tO O B-x", "", "c\tO"]))
    assert list(read_tagged_lines(path)) == [
        TaggedSentence(("a", "\u3000", "b"), ("O", "O", "B-x"), 1),
        TaggedSentence(("c",), ("O",), 3),
    ]


CONLL = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
# SYM O O
rejects  VBZ\tB-VP O
-DOCSTART- -X- -X- O
Peter NNP B-NP B-PER
"""


def test_conll(write: Write) -> None:
    path = write(CONLL)
    assert list(read_conll(path)) == [
        TaggedSentence(("EU", "#", "rejects"), ("B-ORG", "O", "O"), 3),
        TaggedSentence(("Peter",), ("B-PER",), 7),
    ]
    assert [s.tags for s in read_conll(path, tag_column=2)] == [("B-NP", "O", "B-VP"), ("B-NP",)]
    assert next(read_conll(path, word_column=1, tag_column=0)).words == ("NNP", "SYM", "VBZ")
    # "#" opens a comment before a sentence alone.
    assert next(read_conll(path, comment="#")).words == ("EU", "#", "rejects")
    path = write("# text = a b\n1\ta\tX\n# b\tY\tZ\n\n#\n\n1\tc\tX\n")
    sentences = list(read_conll(path, word_column=1, separator="\t", comment="#"))
    assert [(s.words, s.line) for s in sentences] == [(("a", "Y"), 2), (("c",), 7)]
    assert next(read_conll(write(" \tO\nb\tO"), separator="\t")).words == (" ", "b")
    assert list(read_conll(write(""))) == []


def test_markers_by_hand() -> None:
    relation = Relation("Ada wrote to Babbage.", (13, 20), (0, 3), "to")
    marked = mark_entities(relation)
    assert marked.text == "[E2]Ada[/E2] wrote to [E1]Babbage[/E1]."
    assert marked.text[slice(*marked.head)] == "[E1]Babbage[/E1]"
    assert marked.text[slice(*marked.tail)] == "[E2]Ada[/E2]"
    beside = mark_entities(Relation("北京大学", (0, 2), (2, 4), None), ("<", ">"), ("(", ")"))
    assert beside == ("<北京>(大学)", (0, 4), (4, 8))


ROW = {"text": "a b", "head": [0, 1], "tail": [2, 3], "label": "r"}
CHOICE = {"context": "c", "choices": ["a", "b"], "label": 0}


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (read_squad, "{\n\n]", r"file:3 is no JSON"),
        (read_squad, "[]", "file is a list; accepted: an object with 'data'"),
        (read_squad, '{"data": [{}]}', r"file: data\[0\] has no 'paragraphs'; .* Its keys: none"),
        (read_squad, squad([question(answers=[{"text": "Ada"}])]), r"answers\[0\] has no 'answer_start'"),
        (read_squad, squad([question(answers=[{"text": "Ada", "answer_start": True}])]), "True under 'answer_start'"),
        (read_squad, squad([question(is_impossible=True)]), r"qas\[0\] \(id q\) is impossible and has answers"),
        (read_squad, squad([question(question=None)]), "None under 'question'; accepted: text"),
        (read_squad, squad([question(question="\ud800")]), "half of a surrogate pair under 'question'"),
        (read_squad, b"\n\xff", r"file:2 is not UTF-8 at byte 0"),
        (read_conll, b"a O\nb O\xe5\n", r"file:2 is not UTF-8 at byte 3"),
        (read_conll, "a O\nb\n", r"file:2 has 1 column, and words are in column 0 and tags in column -1"),
        (lambda path: read_conll(path, tag_column=2), "a O\n", "file:1 has 2 columns, .* tags in column 2"),
        (lambda path: read_conll(path, separator="\t"), "\tO\n", "file:1 has an empty column"),
        (read_tagged_lines, "a\tO\nb c O O\n", r"file:2 has 1 columns; accepted: words, '\\t', tags"),
        (read_tagged_lines, "a b\tO\n", "file:1 has 2 words and 1 tags"),
        (read_tagged_lines, "a  b\tO O O\n", "or an empty one"),
        (read_multiple_choice, '\n{"context"', r"file:2 is no JSON"),
        (read_multiple_choice, "[]", "file:1 is a list; accepted: one object a line"),
        (read_multiple_choice, json.dumps({**CHOICE, "choices": ["a"]}), "two texts or more"),
        (read_multiple_choice, json.dumps({**CHOICE, "choices": ["a", 1]}), "two texts or more"),
        (read_multiple_choice, json.dumps({**CHOICE, "choices": ["a", "\udc00"]}), "surrogate pair under 'choices'"),
        (read_multiple_choice, json.dumps({**CHOICE, "label": 2}), "has the label 2; accepted: 0 to 1"),
        (read_multiple_choice, json.dumps({**CHOICE, "label": "0"}), "'0' under 'label'; accepted: a whole number"),
        (read_relations, json.dumps({**ROW, "head": [0, 4]}), r"\[0, 4\] under 'head'; .* 0 <= start < end <= 3"),
        (read_relations, json.dumps({**ROW, "tail": [1, 1]}), r"\[1, 1\] under 'tail'"),
        (read_relations, json.dumps({**ROW, "tail": [0, 1, 2]}), "under 'tail'"),
        (read_relations, json.dumps({**ROW, "tail": [0, 2]}), "which overlap"),
        (read_relations, json.dumps({**ROW, "label": 3}), "3 under 'label'; accepted: the name of a relation"),
        (read_relations, "[" * 100_000, "file:1 is no JSON"),
    ],
)
def test_faults_are_named(write: Write, read: Callable[[Path], Any], content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(read(write(content)))


@pytest.mark.parametrize("read", [read_squad, read_conll, read_tagged_lines, read_multiple_choice, read_relations])
def test_files_that_are_not_there(tmp_path: Path, read: Callable[[Path | str], Any]) -> None:
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(UserError, match="cannot be read"):
            list(read(path))
