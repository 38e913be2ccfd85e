"""A search's config: read as an experiment's is, refused with the key, the value and what is accepted."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from lmobj import _settings, _yaml, search
from lmobj.errors import UserError
from lmobj.search import MedianPruner, Parameter
from lmobj.search._config import experiment
from lmobj.search._space import nested, short_names

_BASE = """
model: {name: decoder, layers: 1, width: 12, heads: 2}
objective: {name: causal_lm}
train: {steps: 30, evaluate_every: 10}
"""


def _load(tmp_path: pathlib.Path, settings: str, *overrides: str) -> search.SearchExperiment:
    (tmp_path / "base.yaml").write_text(_BASE)
    (tmp_path / "tried.yaml").write_text(f"base: base.yaml\nsearch: {settings}\n")
    return search.load(tmp_path / "tried.yaml", overrides)


_STEPS = "space: {train.steps: {choices: [10, 20]}}"


def test_a_file_over_its_base_with_overrides(tmp_path: pathlib.Path) -> None:
    found = _load(tmp_path, f"{{trials: 3, pruner: median, {_STEPS}}}", "search.trials=5", "train.best.metric=nll")
    assert (found.name, found.model.layers, found.search.trials) == ("tried", 1, 5)
    assert found.search.pruner == MedianPruner()
    assert (found.metric, found.mode) == ("eval/nll", "min"), "what train.best says"
    assert found.search.space == {"train.steps": Parameter(choices=(10, 20))}
    # The complete config reads back as the same.
    (tmp_path / "again.yaml").write_text(_yaml.to_yaml(_settings.plain(found)))
    assert search.load(tmp_path / "again.yaml") == found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{trials: 1, space: {}}", r"search\.space is \{\}; accepted: one or more dotted keys"),
        (f"{{{_STEPS}}}", r"search\.trials is null and so is search\.seconds"),
        (f"{{trials: 0, {_STEPS}}}", r"search\.trials is 0; accepted: 1 or more"),
        (f"{{seconds: -1.0, {_STEPS}}}", r"search\.seconds is -1\.0; accepted: a finite number above 0"),
        (f"{{trials: 1, seed: -1, {_STEPS}}}", r"search\.seed is -1"),
        (f"{{trials: 1, startup_trials: 0, {_STEPS}}}", r"search\.startup_trials is 0"),
        (f"{{trials: 1, method: bayes, {_STEPS}}}", r"search\.method is \"bayes\"; accepted: one of tpe, random, grid"),
        (f"{{trials: 1, metric: eval/loss, {_STEPS}}}", r"search\.metric is 'eval/loss'; accepted: a name"),
        (f"{{trials: 1, metric: accuracy, {_STEPS}}}", r"search\.mode is missing; accepted: min where less"),
        (f"{{trials: 1, pruner: hyperband, {_STEPS}}}", r"search\.pruner is \"hyperband\"; accepted: .*median"),
        (f"{{trials: 1, pruner: {{warmup_evaluations: -1}}, {_STEPS}}}", r"search\.pruner\.warmup_evaluations is -1"),
        ("{trials: 1, space: {train.step: {low: 1, high: 2}}}",
         r"tried\.yaml:2: search\.space\.train\.step has the value 1: unknown key train\.step .* mean train\.steps\?"),
        ("{trials: 1, space: {train.steps.more: {choices: [1]}}}", r"space\.train\.steps\.more has the value 1"),
        ("{trials: 1, space: {name: {choices: [a]}}}", r"search\.space has the key \"?name"),
        ("{trials: 1, space: {search.seed: {choices: [1]}}}", r"search\.space has the key \"?search\.seed"),
        ("{trials: 1, space: {train..steps: {choices: [1]}}}", r"search\.space has the key \"?train\.\.steps"),
        ("{trials: 1, space: {train.steps: {low: 0, high: 5}}}",
         r"search\.space\.train\.steps has the value 0: train\.steps is 0; accepted: 1 or more"),
        ("{trials: 1, space: {train.steps: {low: 1.0, high: 5.0}}}", r"train\.steps has the value 1\.0.*whole"),
        ("{trials: 1, space: {train.batch_size: {choices: [8, many]}}}",
         r"search\.space\.train\.batch_size has the value \"?many"),
        ("{trials: 1, space: {train.optimizer.weight_decay: {low: 0, high: 1}}}",
         r"space\.train\.optimizer\.weight_decay .* takes fractions; accepted: low 0\.0 and high 1\.0 .* or step: 1"),
        ("{trials: 1, space: {train.steps: {low: 5}}}", r"search\.space\.train\.steps: high is missing"),
        ("{trials: 1, space: {train.steps: {high: 5}}}", r"search\.space\.train\.steps: low is missing"),
        ("{trials: 1, space: {train.steps: {}}}", r"search\.space\.train\.steps: high is missing"),
        ("{trials: 1, space: {train.steps: {low: 5, high: 5}}}", r"space\.train\.steps: low is 5 and high is 5"),
        ("{trials: 1, space: {train.steps: {low: true, high: 5}}}", r"search\.space\.train\.steps\.low is true"),
        ("{trials: 1, space: {train.steps: {choices: []}}}", r"search\.space\.train\.steps: choices is \[\]"),
        ("{trials: 1, space: {train.steps: {choices: [1, 1]}}}", r"search\.space\.train\.steps: choices is \[1, 1\]"),
        ("{trials: 1, space: {train.steps: {choices: [1], low: 1}}}", r"train\.steps: choices and low are both given"),
        ("{trials: 1, space: {train.steps: {choices: [1], log: true}}}", r"train\.steps: choices and log are both"),
        ("{trials: 1, space: {model.dropout: {low: 0.0, high: 1.0, log: true}}}",
         r"search\.space\.model\.dropout: low is 0\.0 and log is true"),
        ("{trials: 1, space: {train.steps: {low: 1, high: 9, log: true, step: 2}}}",
         r"search\.space\.train\.steps: log is true and step is 2"),
        ("{trials: 1, space: {train.steps: {low: 1, high: 9, step: 0}}}", r"search\.space\.train\.steps: step is 0"),
        ("{trials: 1, space: {train.steps: {low: 1, high: 99999, step: 1}}}", r"train\.steps: step is 1, which makes"),
        ("{method: grid, space: {train.steps: {low: 1, high: 9}}}",
         r"search\.space\.train\.steps is a range without step"),
        ("{method: grid, space: {train.steps: {low: 1, high: 999, step: 1}, train.seed: {low: 1, high: 999, step: 1}}}",
         r"search\.space has a grid of 998,001 combinations"),
    ],
)  # fmt: skip
def test_what_cannot_be(tmp_path: pathlib.Path, settings: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        _load(tmp_path, settings)


def test_what_only_the_experiment_can_tell(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"search\.pruner is given and train\.evaluate_every is null"):
        _load(tmp_path, f"{{trials: 1, pruner: median, {_STEPS}}}", "train.evaluate_every=null")
    with pytest.raises(UserError, match=r"run is 'gs://bucket/run'; accepted: a folder on this machine"):
        _load(tmp_path, f"{{trials: 1, {_STEPS}}}", "run=gs://bucket/run")


def test_a_value_may_need_another_one_beside_it(tmp_path: pathlib.Path) -> None:
    """Width 15 does not go with 2 heads, those of the base, but with 3."""
    width = "model.width: {choices: [12, 15]}"
    with pytest.raises(UserError, match=r"search\.space\.model\.width has the value 15: .*model\.width is 15"):
        _load(tmp_path, f"{{trials: 1, space: {{{width}}}}}")
    _load(tmp_path, f"{{trials: 1, space: {{{width}, model.heads: {{choices: [2, 3]}}}}}}")


def test_whole_sections_are_choices_too(tmp_path: pathlib.Path) -> None:
    found = _load(tmp_path, "{trials: 1, space: {train.optimizer.weight_decay: {low: 0.0, high: 0.5}, "
                            "train.optimizer: {choices: [{name: adamw}, {name: lion, b1: 0.8}]}}}")  # fmt: skip
    lion = found.search.space["train.optimizer"].choices[1]  # type: ignore[index]
    settings = {"train.optimizer.weight_decay": 0.25, "train.optimizer": lion}
    made = experiment(found, settings, name="x", run=None).train.optimizer
    assert (made.name, made.b1, made.weight_decay) == ("lion", 0.8, 0.25), "the section first, then what is in it"


@pytest.mark.parametrize(
    ("parameter", "values"),
    [
        (Parameter(choices=("a", None, [1])), ("a", None, [1])),
        (Parameter(low=1, high=10, step=4), (1, 5, 9)),
        (Parameter(low=0.1, high=0.3, step=0.1), (0.1, 0.2, 0.3)),
        (Parameter(low=0, high=1, step=0.5), (0.0, 0.5, 1.0)),
        (Parameter(low=1, high=10), None),
    ],
)
def test_values_of_a_parameter(parameter: Parameter, values: Any) -> None:
    assert parameter.values == values
    assert values is None or list(map(type, parameter.values or ())) == list(map(type, values))


def test_settings_as_sections_and_by_short_names() -> None:
    assert nested({"a.b.c": 1, "a.b": {"c": 0, "d": 2}, "e": 3}) == {"a": {"b": {"c": 1, "d": 2}}, "e": 3}
    keys = ["train.optimizer.schedule.peak", "train.steps", "data.steps", "steps"]
    assert list(short_names(keys).values()) == ["peak", "train.steps", "data.steps", "steps"]


def test_the_schema_describes_the_section() -> None:
    described = search.schema()
    assert {"search", "model", "base"} <= set(described["properties"])
    for section in ("Search", "Parameter", "MedianPruner"):
        for key, field in described["$defs"][section]["properties"].items():
            assert field.get("description"), f"{section}.{key}"
    json.dumps(described, allow_nan=False)
