"""BLEU, chrF and ROUGE by hand, which text is which, what they are paired by, and packages that are missing."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from lmobj.errors import UserError
from lmobj.evaluate import (
    TASKS,
    BeamConfig,
    SamplingConfig,
    WritingConfig,
    WrittenReference,
    score_written,
    task_report,
)

TEXTS = ["the cat sat on the mat", "a dog", "two birds sing in a tree", ""]
TRUE = ["the cat sat on a mat", "a dog barks", "two birds sang in that tree", "nothing"]


def test_bleu_by_hand() -> None:
    # Of 6 words 5 match, of 5 pairs 3, of 4 triples 2, of 3 quadruples 1; as long as it should be.
    found = score_written(TEXTS[:1], TRUE[:1]).figures
    assert found["bleu"] == pytest.approx(100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)
    # All match, and 4 words instead of 6: exp(1 - 6 / 4). The other way round it is precision that is lost.
    short, whole = "the cat sat on", "the cat sat on the mat"
    assert score_written([short], [whole]).figures["bleu"] == pytest.approx(100 * math.exp(-0.5))
    precision = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert score_written([whole], [short]).figures["bleu"] == pytest.approx(100 * precision)


def test_chrf_by_hand() -> None:
    # One and two characters: precisions 1 and 1, recalls 2/3 and 1/2; F2 = 5 P R / (4 P + R) of their means.
    recall = (2 / 3 + 1 / 2) / 2
    assert score_written(["ab"], ["abc"]).figures["chrf"] == pytest.approx(100 * 5 * recall / (4 + recall))
    assert score_written(["abc"], ["ab"]).figures["chrf"] == pytest.approx(100 * 5 * recall / (4 * recall + 1))


def test_rouge_by_hand() -> None:
    # "The cats sat" beside "the cat": words 2 of 3 and 2 of 2, stems alike; pairs 1 of 2 and 1 of 1. The second text
    # shares both words in another order: 1 of 2 in a common subsequence. Means of F1 over the texts.
    found = score_written(["The cats sat.", "b a"], ["the cat", "a b"]).figures
    assert found["rouge1"] == pytest.approx(100 * (4 / 5 + 1) / 2)
    assert found["rouge2"] == pytest.approx(100 * (2 / 3 + 0) / 2)
    assert found["rougeL"] == pytest.approx(100 * (4 / 5 + 1 / 2) / 2)
    assert found["exact_match"] == 0
    assert score_written(["a b", "b a"], ["a b", "a b"]).figures["exact_match"] == 0.5


def test_chinese_characters_are_words_where_it_is_said() -> None:
    chinese = score_written(["我爱北京"], ["我爱上海"], words="zh")
    # Of 4 characters 2 match and of 3 pairs 1; of 2 triples none, which smoothing makes 1/2, and of 1 quadruple, 1/4.
    assert chinese.figures["bleu"] == pytest.approx(100 * (2 / 4 * 1 / 3 * 1 / (2 * 2) * 1 / (4 * 1)) ** 0.25)
    assert chinese.figures["rouge1"] == pytest.approx(50)
    assert chinese.figures["rouge2"] == pytest.approx(100 / 3)
    assert "tok:zh" in chinese.signatures["bleu"]
    assert score_written(["我爱北京"], ["我爱上海"]).figures["rouge1"] == 0  # no letter of a-z


def test_the_report_has_every_text_and_says_how_it_was_scored() -> None:
    reference = WrittenReference(["s1", "s2", "s3", "s4"], TRUE)
    told = task_report("sequence_to_sequence", {"written": np.array(TEXTS, object)}, (), reference)
    assert told.figures == score_written(TEXTS, TRUE).figures
    assert [row[0] for row in told.rows] == ["BLEU", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L"]
    assert "version:" in told.rows[0][2]
    records = list(told.records())
    assert [(one["index"], one["source"], one["target"], one["prediction"]) for one in records] == list(
        zip(range(4), reference.sources, TRUE, TEXTS, strict=True)
    )
    copied = TASKS["sequence_to_sequence"].baselines(None, WrittenReference(TEXTS, TRUE))
    assert copied == {"source copied": told.figures}


def test_runs_are_paired_by_the_figures_of_resampled_texts() -> None:
    records = list(
        task_report(
            "sequence_to_sequence", {"written": np.array(TEXTS, object)}, (), WrittenReference(TEXTS, TRUE)
        ).records()
    )
    chosen = [[0, 1, 2, 3], [2, 2, 0, 1], [0, 0, 0, 0]]
    for name in ("bleu", "rouge1", "rouge2", "rougeL"):
        scores = TASKS["sequence_to_sequence"].scores[name](records)
        means = np.stack([scores.values[rows].mean(0) for rows in chosen])
        found = means if scores.statistic is None else scores.statistic(means)
        expected = [score_written([TEXTS[i] for i in rows], [TRUE[i] for i in rows]).figures[name] for rows in chosen]
        np.testing.assert_allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"the package {package}, missing here: pip install 'lmobj\[scores\]'"):
        score_written(TEXTS, TRUE)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"decoding": BeamConfig(max_new_tokens=7)}, "writing.decoding.max_new_tokens is 7"),
        ({"decoding": SamplingConfig(num_samples=2)}, "writing.decoding.num_samples is 2"),
        ({"examples": -1}, "writing.examples is -1"),
        ({"words": "ja-mecab"}, "writing.words is 'ja-mecab'; accepted: 13a, intl, zh, char, none"),
    ],
    ids=["tokens", "samples", "examples", "words"],
)
def test_settings_that_cannot_be(settings: dict, part: str) -> None:
    with pytest.raises(UserError, match=part):
        WritingConfig(**settings)
