"""The report of a search: what it holds, that all text in it is escaped, and the pictures of odd searches."""

from __future__ import annotations

import dataclasses
import html
import pathlib
import re
import shlex
from typing import Any

import pytest
from search_curves import Curve, Make

from lmobj import config, search
from lmobj.config import Experiment
from lmobj.errors import UserError
from lmobj.search._pictures import charts
from lmobj.search._results import clock, in_short, overrides, show, table
from lmobj.search._study import Study, Trial

_MARKUP = '<script>alert("x")</script>'


@pytest.fixture
def found(make: Make) -> tuple[search.SearchExperiment, search.SearchResult, str]:
    """Six trials: with markup among the choices and among the reasons."""

    def refuse(experiment: Experiment, step: int) -> None:
        if experiment.model.layers == 4:
            raise UserError(f"no such thing as {_MARKUP}")

    space = {
        "sample": {"choices": [[_MARKUP], ["a & b"]]},
        "model.layers": {"choices": [1, 2, 4]},
    }
    made = dataclasses.replace(make(method="grid", space=space), name=_MARKUP.replace("/", ""))
    result = search.run(made, quiet=True, trainer=Curve(refuse))
    return made, result, (result.folder / "report.html").read_text()


def test_text_is_escaped_and_nothing_is_loaded(found: tuple[Any, Any, str]) -> None:
    _, _, page = found
    assert "<script" not in page
    assert html.escape(_MARKUP, quote=False)[:14] in page.replace("&#34;", '"')
    assert "no such thing as &lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=[\"']?http", page.replace("xlink:href", "").split("<svg")[0])


def test_it_holds_trials_best_settings_and_pictures(found: tuple[Any, Any, str]) -> None:
    _, result, page = found
    text = html.unescape(re.sub(r"<[^>]+>", "\n", page))
    for part in ("Best settings", "Value by trial", "By layers", "By sample", "4 complete, 2 failed", *result.header):
        assert part in text, part
    assert page.count("<svg") == 5, "by trial, curves, two settings, importance"
    # The overrides are those of the best trial, and a shell and `lmobj` read them as such.
    line = overrides(result.best.settings)
    assert line in text
    (result.folder / "base.yaml").write_text(
        "model: {name: decoder, layers: 3, width: 12, heads: 2}\nobjective: {name: causal_lm}\n"
    )
    loaded = config.load(result.folder / "base.yaml", shlex.split(line))
    assert loaded.model.layers == result.best.settings["model.layers"] == 1
    assert list(loaded.sample) == result.best.settings["sample"]
    assert f"lmobj train {result.folder}/best.yaml run=FOLDER" in text


def test_without_a_complete_trial(make: Make) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("no")

    made = make(method="grid", space={"model.layers": {"choices": [1, 2]}})
    with pytest.raises(UserError, match="none of the 2 trials"):
        search.run(made, quiet=True, trainer=Curve(refuse))
    assert "No trial is complete yet." in (pathlib.Path(str(made.run)) / "report.html").read_text()


def test_importance_is_that_of_what_matters(make: Make) -> None:
    """The learning rate adds 1 at two of its three values, the layers nothing worth to speak of."""

    class Peak(Curve):
        def loss(self, experiment: Experiment) -> float:
            return float(experiment.train.optimizer.schedule.peak != 0.01) + experiment.model.layers / 1000

    space = {
        "train.optimizer.schedule.peak": {"choices": [0.1, 0.01, 0.001]},
        "model.layers": {"low": 1, "high": 2, "step": 1},
    }
    made = make(method="grid", space=space)
    result = search.run(made, quiet=True, trainer=Peak())
    with Study(result.folder / "study.db", made) as study:
        shares = study.importances()
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["train.optimizer.schedule.peak"] > 0.9


@pytest.mark.parametrize("mode", ["min", "max"])
def test_pictures_of_odd_trials(make: Make, mode: str) -> None:
    """One trial, equal values, values far off, trials of which nothing is known: none of it stops the report."""
    space = {"train.optimizer.schedule.peak": {"low": 1e-6, "high": 1.0, "log": True}}
    made = make(method="random", trials=9, mode=mode, space=space)

    def trial(number: int, state: Any = "complete", value: float | None = 1.0, **known: Any) -> Trial:
        settings = {} if known.pop("unknown", False) else {"train.optimizer.schedule.peak": 10.0**-number}
        return Trial(number, state, settings, value, known.pop("evaluations", {}), 1.0, None, False)

    nan = float("nan")
    for trials in (
        [],
        [trial(0)],
        [trial(0), trial(1)],
        [trial(0), trial(1, value=1e9), trial(2, value=-1e9), trial(3, value=1.1), trial(4, value=0.9)],
        [trial(0, "pruned", None, evaluations={10: nan, 20: 3.0}), trial(1, "failed", None, unknown=True)],
        [trial(0, evaluations={10: 1.0, 20: nan}), trial(1, "running", None, unknown=True)],
    ):
        pictures = list(charts(made, trials, {}))
        assert all(svg.startswith("<svg") for _, svg in pictures)
        assert bool(pictures) == any(trial.value is not None or len(trial.evaluations) > 1 for trial in trials)
        table(made, trials)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00123456, "0.001235"), (3, "3"), (None, "null"), ("a b", "a b"), ({"name": "x"}, "{name: x}")],
)
def test_values_for_people(value: Any, text: str) -> None:
    assert show(value) == text


def test_overrides_keep_every_digit() -> None:
    assert overrides({"a.b": 0.1 + 0.2, "c": {"name": "x"}}) == "a.b=0.30000000000000004 'c={name: x}'"
    assert in_short("model.width is 1.5; accepted: another. And more.") == "model.width is 1.5; accepted: another"
    assert in_short("x" * 500 + ".") == "x" * 159 + "…"
    assert [clock(s) for s in (0.4, 61, 3661)] == ["0:00", "1:01", "1:01:01"]
