"""Reports of token classification and extractive QA by hand, and that what they are compared by adds up to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lmobj.data import SquadFiles
from lmobj.evaluate import TASK_METRICS, TASKS, ExampleScores, TaskReport, task_metrics, task_report
from lmobj.tasks import (
    AskedQuestion,
    GoldAnswer,
    Question,
    QuestionReference,
    TaggedSentence,
    TagReference,
    qa_windows,
)

NAMES = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def figure(scores: ExampleScores) -> float:
    """What `paired_bootstrap` makes of all examples, each once."""
    means = scores.values.mean(0)
    return float(means if scores.statistic is None else scores.statistic(means[None])[0])


# --- tagged words -------------------------------------------------------------------------------------------------


def tag_reference(sentences: Sequence[tuple[str, str]]) -> TagReference:
    """Of words and their tags. In every row [CLS] word, its second subword, next word, ... of which the last is cut off
    where there are four."""
    found = [TaggedSentence(tuple(words.split()), tuple(tags.split()), 1) for words, tags in sentences]
    row = np.array([-1, 0, 0, 1, 2, -1], np.int32)
    ids = np.stack([np.where(row < len(sentence.words), row, -1) for sentence in found])
    return TagReference(tuple(found), ids, NAMES, "bio", "first")


HELD_OUT = [
    ("Ada Lovelace met Bob", "B-PER I-PER O B-PER"),
    ("in Rome", "O B-LOC"),
    ("nothing here", "O O"),
]


def tag_logits(tags: Sequence[str]) -> Any:
    """[N, 6, 5]: the tags of the first subwords of each sentence; all others are B-LOC, which must not be looked at."""
    ids = np.full((len(tags), 6), 1)
    for row, each in enumerate(tags):
        for place, tag in zip((1, 3, 4), each.split(), strict=False):
            ids[row, place] = NAMES.index(tag)
    return np.eye(5)[ids]


def tag_report(count: int = 3) -> TaskReport:
    """Ada Lovelace is found and Bob, who was cut off, is not; Rome is taken for a person; and "nothing" for a place."""
    logits = tag_logits(["B-PER I-PER O", "O B-PER", "B-LOC O"][:count])
    return task_report("token_classification", {"logits": logits}, NAMES, tag_reference(HELD_OUT))


def test_entities_by_hand() -> None:
    report = tag_report()
    # PER: 2 true, 2 found, 1 right. LOC: 1 true, 1 found, none right.
    assert report.figures == pytest.approx(dict.fromkeys(("entity_f1", "entity_precision", "entity_recall"), 1 / 3))
    assert tuple(report.figures) == TASK_METRICS["token_classification"]
    assert report.header == ("entity", "precision", "recall", "F1", "true", "found")
    third = pytest.approx(1 / 3)
    assert list(report.rows) == [
        ("LOC", 0, 0, 0, 1, 1),
        ("PER", 0.5, 0.5, 0.5, 2, 2),
        ("all", third, third, third, 3, 3),
    ]
    assert report.picture is None
    first, *_, last = report.records()
    assert first == {
        "index": 0,
        "words": ("Ada", "Lovelace", "met", "Bob"),
        "target": ("B-PER", "I-PER", "O", "B-PER"),
        "prediction": ["B-PER", "I-PER", "O", "O"],
        "entities": [2, 1, 1],
    }
    assert (last["index"], last["entities"]) == (2, [0, 1, 0])


def test_entities_of_a_part_of_the_split() -> None:
    # The first sentence alone: 2 true, 1 found and right: P = 1, R = 1/2.
    assert tag_report(1).figures == pytest.approx({"entity_f1": 2 / 3, "entity_precision": 1, "entity_recall": 1 / 2})


def test_tags_that_do_not_look_at_the_text() -> None:
    trained = tag_reference([("Ada met Rome", "B-PER O B-LOC"), ("Ada met Ada", "B-PER O O"), ("Bob", "B-PER")])
    # Ada and Bob are B-PER, Lovelace was never seen and is O: of three entities, Bob and Rome are right, and of the
    # three found Ada is not.
    found = TASKS["token_classification"].baselines(trained, tag_reference(HELD_OUT))
    assert found == {"most frequent tag of each word": {"entity_f1": pytest.approx(2 / 3)}}


# --- answers ------------------------------------------------------------------------------------------------------

CONTEXT = "Ann saw a red cat in Rome"
WORDS = CONTEXT.split()
OFFSETS = np.array([(CONTEXT.index(word), CONTEXT.index(word) + len(word)) for word in WORDS], np.int32)


def qa_reference(answers: Sequence[str | None], *, length: int = 12, **settings: Any) -> QuestionReference:
    """A question of one token for each answer, or None: [CLS] question [SEP] seven words [SEP] padding."""
    asked = []
    for number, text in enumerate(answers):
        gold = () if text is None else (GoldAnswer(text, CONTEXT.index(text), CONTEXT.index(text) + len(text)),)
        windows = qa_windows([9], range(20, 27), max_length=length, stride=3, prefix=[4], separator=[5], suffix=[5])
        question = Question(f"id{number}", f"q{number}", CONTEXT, gold, text is None, 0, "")
        asked.append(AskedQuestion(question, windows, OFFSETS))
    return QuestionReference(tuple(asked), SquadFiles(files=("x",), **settings))


def ends(*rows: tuple[int, int, float, float]) -> dict[str, Any]:
    """Logits 0 but for the given: of each row first word, last word, logits of both, and of both ends of no answer."""
    found = np.zeros((2, len(rows), 12))
    for row, (first, last, score, null) in enumerate(rows):
        found[0, row, 3 + first], found[1, row, 3 + last] = score, score
        found[:, row, 0] = null
    return {"start_logits": found[0], "end_logits": found[1]}


ANSWERS = ["red cat", "Rome", None, None]
GUESSES = ((3, 4, 5.0, 0.0), (5, 6, 4.0, 0.0), (0, 0, 5.0, 6.0), (0, 0, 2.0, 0.0))
"""Right; "in Rome", F1 2/3; nothing, by 2; "Ann", where there is nothing."""


def test_answers_by_hand() -> None:
    report = task_report("extractive_qa", ends(*GUESSES), (), qa_reference(ANSWERS, null_threshold=0.0))
    # Odds of no answer are -10, -8, 2 and -4. Answering the first alone gives exact matches 3/4, and F1 3/4; with the
    # second 3/4 and (1 + 2/3 + 2)/4; with the last, less.
    assert report.figures == pytest.approx(
        {
            "exact_match": 1 / 2,
            "f1": (1 + 2 / 3 + 1) / 4,
            "best_exact_match": 3 / 4,
            "best_f1": 11 / 12,
            "best_null_threshold": -8,
        }
    )
    assert report.header == ("questions", "exact match", "F1", "number")
    near = pytest.approx
    assert list(report.rows) == [
        ("all", 0.5, near(2 / 3), 4),
        ("with an answer", 0.5, near(5 / 6), 2),
        ("without", 0.5, 0.5, 2),
    ]
    records = list(report.records())
    assert [record["prediction"] for record in records] == ["red cat", "in Rome", "", "Ann"]
    assert [record["target"] for record in records] == [["red cat"], ["Rome"], [], []]
    assert [record["null_odds"] for record in records] == [-10, -8, 2, -4]
    assert (records[1]["id"], records[1]["question"], records[1]["f1"]) == ("id1", "q1", near(2 / 3))
    best = records[0]["best"]
    assert (best[0][:2], len(best)) == (["red cat", 10], 5)
    assert best[0][2] == max(one[2] for one in best)


def test_the_best_threshold_does_not_depend_on_the_one_that_is_set() -> None:
    report = task_report("extractive_qa", ends(*GUESSES), (), qa_reference(ANSWERS, null_threshold=-9.0))
    # All but the first are unanswered, which is right for the last two.
    assert report.figures["f1"] == pytest.approx(3 / 4)
    assert (report.figures["best_f1"], report.figures["best_null_threshold"]) == pytest.approx((11 / 12, -8))


def test_answers_that_are_always_there() -> None:
    reference = qa_reference(["red cat", "Rome"])
    report = task_report("extractive_qa", ends((3, 4, 5.0, 9.0), *GUESSES[1:2]), (), reference)
    # No answer is likelier than the first, but there is no threshold.
    assert report.figures == pytest.approx({"exact_match": 1 / 2, "f1": 5 / 6})
    assert tuple(report.figures) == TASK_METRICS["extractive_qa"]
    assert [row[0] for row in report.rows] == ["all", "with an answer"]


def test_questions_all_of_whose_windows_were_not_read_are_left_out() -> None:
    # Rows of 8 hold four words: the questions have two windows each.
    reference = qa_reference(["cat in", "Rome"], length=8)
    assert [len(one.windows.tokens) for one in reference.asked] == [2, 2]
    logits = {name: x[:, :8] for name, x in ends(*[(0, 0, 1.0, 0.0)] * 3).items()}
    logits["start_logits"][1, 4], logits["end_logits"][1, 5] = 5, 5  # of the second window, which begins at "red"
    report = task_report("extractive_qa", logits, (), reference)
    assert report.figures == {"exact_match": 1, "f1": 1}
    assert report.rows[0] == ("all", 1, 1, 1)
    one = {name: x[:1] for name, x in logits.items()}
    nothing = task_report("extractive_qa", one, (), reference)
    assert (nothing.figures, list(nothing.rows), list(nothing.records())) == ({}, [], [])


def test_chinese_answers_are_compared_without_their_punctuation() -> None:
    question = Question("a", "?", "红，猫", (GoldAnswer("红，猫", 0, 3),), False, 0, "")  # noqa: RUF001
    windows = qa_windows([9], range(3), max_length=8, prefix=[4], separator=[5], suffix=[5])
    asked = AskedQuestion(question, windows, np.array([(0, 1), (1, 2), (2, 3)], np.int32))
    start, end = np.zeros((2, 1, 8))
    start[0, 3], end[0, 4] = 5, 5  # the character and the comma
    for normalise, expected in (("chinese", 2 / 3), ("english", 0)):
        reference = QuestionReference((asked,), SquadFiles(files=("x",), normalise=normalise))
        found = task_metrics("extractive_qa", {"start_logits": start, "end_logits": end}, (), reference)
        assert found == pytest.approx({"exact_match": 0, "f1": expected})


def test_a_question_without_any_span_has_no_odds() -> None:
    logits = {name: np.full_like(x, -math.inf) for name, x in ends(GUESSES[0]).items()}
    for x in logits.values():
        x[:, 0] = 0
    (record,) = task_report("extractive_qa", logits, (), qa_reference(ANSWERS[:1])).records()
    assert (record["prediction"], record["null_odds"], record["best"]) == ("", None, [])


def test_an_answer_that_does_not_look_at_the_text() -> None:
    held_out = qa_reference(["red cat", "Rome", None])
    baselines = TASKS["extractive_qa"].baselines
    # A cat is half of "red cat": 2 * 1 / (2 + 1).
    assert baselines(qa_reference(["cat", "cat", "Ann"]), held_out) == {
        "most frequent answer": {"exact_match": 0, "f1": pytest.approx(2 / 9)}
    }
    nothing = baselines(qa_reference(["cat", None, None]), held_out)["most frequent answer"]
    assert nothing == {"exact_match": pytest.approx(1 / 3), "f1": pytest.approx(1 / 3)}


def test_scores_of_examples_add_up_to_the_figures() -> None:
    qa = task_report("extractive_qa", ends(*GUESSES), (), qa_reference(ANSWERS, null_threshold=0.0))
    for task, report in (("token_classification", tag_report()), ("extractive_qa", qa)):
        records = list(report.records())
        for name, scores in TASKS[task].scores.items():  # type: ignore[index]
            found = scores(records)
            assert len(found.values) == len(records)
            assert figure(found) == pytest.approx(report.figures[name]), name
    nothing = TASKS["token_classification"].scores["entity_f1"](list(tag_report().records())[2:])
    assert figure(nothing) == 0
