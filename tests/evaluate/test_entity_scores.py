"""Entity scores: by hand, and seqeval's over random tags."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval import metrics
from seqeval.scheme import IOB2, IOBES

from lmobj.errors import UserError
from lmobj.evaluate import score_entities


def test_by_hand() -> None:
    gold = [["B-P", "I-P", "O", "B-Q", "O", "B-P"], ["O", "B-Q"]]
    found = [["B-P", "I-P", "O", "B-P", "O", "O"], ["B-Q", "B-Q"]]
    # True: P 0-1, Q 3, P 5; Q 1. Found: P 0-1, P 3; Q 0, Q 1. Right: P 0-1 and the last Q.
    report = score_entities(gold, found)
    assert report.overall == (2 / 4, 2 / 4, 2 / 4, 4, 4, 2)
    assert report.by_type == {"P": (1 / 2, 1 / 2, 1 / 2, 2, 2, 1), "Q": (1 / 2, 1 / 2, 1 / 2, 2, 2, 1)}
    assert report.macro_f1 == 1 / 2
    nothing = score_entities([["O"]], [["O"]])
    assert nothing.overall == (0, 0, 0, 0, 0, 0)
    assert nothing.macro_f1 == 0
    # Two of three words are not two thirds of an entity.
    assert score_entities([["B-P", "I-P", "I-P"]], [["B-P", "I-P", "O"]]).overall.f1 == 0


@pytest.mark.parametrize(("scheme", "letters"), [("bio", "BI"), ("iob1", "BI"), ("bioes", "BIES")])
def test_scores_are_seqevals(scheme: str, letters: str) -> None:
    """40 sets of 50 sentences a scheme, half of the predicted tags being right, default mode and strict."""
    rng = np.random.default_rng(0)
    names = np.array(["O", *(f"{letter}-{kind}" for letter in letters for kind in "xyz")])
    for _ in range(40):
        lengths = rng.integers(1, 12, 50)
        gold = [names[rng.integers(0, len(names), n)] for n in lengths]
        found = [np.where(rng.random(len(a)) < 0.5, a, names[rng.integers(0, len(names), len(a))]) for a in gold]
        pair = [[tags.tolist() for tags in each] for each in (gold, found)]
        for mode in ({}, {"mode": "strict", "scheme": {"bio": IOB2, "bioes": IOBES}.get(scheme)}):
            if mode and mode["scheme"] is None:
                continue
            report = score_entities(pair[0], pair[1], scheme, strict=bool(mode))
            theirs = metrics.classification_report(*pair, output_dict=True, zero_division=0, **mode)
            assert report.overall[:3] == pytest.approx(list(theirs["micro avg"].values())[:3], rel=1e-12)
            assert report.macro_f1 == pytest.approx(theirs["macro avg"]["f1-score"], rel=1e-12)
            assert set(report.by_type) == {"x", "y", "z"}
            for kind, score in report.by_type.items():
                assert score[:4] == pytest.approx(list(theirs[kind].values()), rel=1e-12)


def test_uneven_pairs_are_refused() -> None:
    with pytest.raises(UserError, match="1 gold sentences and 0 predicted"):
        score_entities([["O"]], [])
    with pytest.raises(UserError, match="sentence 1 has 1 gold tags and 2 predicted"):
        score_entities([["O"], ["O"]], [["O"], ["O", "O"]])
