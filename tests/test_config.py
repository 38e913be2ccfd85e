"""The experiment config: what loads, what is refused, that dump round-trips, and what the schema promises."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pydantic
import pytest
import yaml

from lmobj import _settings, bench, config, search
from lmobj.errors import UserError
from lmobj.models import GRUConfig
from lmobj.objectives import CausalLM
from lmobj.train.config import TrainConfig

_ROOT = pathlib.Path(__file__).parent.parent
_CONFIGS = sorted((_ROOT / "configs").rglob("*.yaml"))
_MINIMAL = "model: {name: gru}\nobjective: {name: causal_lm}\n"

Write = Callable[..., pathlib.Path]


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    def to_file(text: str, name: str = "try.yaml") -> pathlib.Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return to_file


def _sections() -> Iterator[type]:
    """Every dataclass that a config can hold."""
    todo, seen = [config.Experiment], set()
    while todo:
        section = todo.pop()
        if section not in seen:
            seen.add(section)
            yield section
            todo += [s for kind in _settings._hints(section).values() for s in _inner(kind)]


def _inner(kind: Any) -> list[type]:
    found = list(_settings._sections(kind))
    for argument in typing.get_args(kind):
        found += _inner(argument)
    return found


def _alternatives() -> list[tuple[str, str]]:
    """(dotted key, name) of every alternative of every union, such as (train.optimizer, lion)."""
    pairs = []

    def visit(section: type, path: str, inside: tuple[type, ...]) -> None:
        for key, kind in _settings._hints(section).items():
            for inner in _settings._sections(kind):
                if inner in inside:
                    continue
                if _settings._name(inner):
                    pairs.append((f"{path}{key}", _settings._name(inner)))
                visit(inner, f"{path}{key}.", (*inside, inner))

    visit(config.Experiment, "", (config.Experiment,))
    return sorted(set(pairs))


def test_a_minimal_file_loads_with_defaults(write: Write) -> None:
    experiment = config.load(write(_MINIMAL))
    assert experiment.name == "try", "the file's name"
    assert experiment.run_dir == pathlib.Path("runs/try")
    assert experiment.model == GRUConfig()
    assert experiment.objective == CausalLM()
    assert experiment.train == TrainConfig()


def test_later_values_win(write: Write) -> None:
    write("name: base\ntrain: {steps: 1, batch_size: 4, log_every: 7}\n" + _MINIMAL, "base.yaml")
    path = write("base: base.yaml\nrun: somewhere\ntrain: {steps: 2, batch_size: 6}\n")
    experiment = config.load(path, ["train.steps=3"])
    assert (experiment.train.log_every, experiment.train.batch_size, experiment.train.steps) == (7, 6, 3)
    assert experiment.name == "base"
    assert experiment.run_dir == pathlib.Path("somewhere")


def test_another_name_starts_its_section_anew(write: Write) -> None:
    path = write("model: {name: decoder, rope_base: 5.0}\nobjective: {name: causal_lm}\n")
    assert config.load(path, ["model.name=gru"]).model == GRUConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "parts"),
    [
        (
            "objective: {name: causal_lm}",
            [],
            ["model is missing", "encoder, encoder_decoder, gru, xlnet"],
        ),
        (
            "model: {name: gru}",
            [],
            [
                "objective is missing",
                "causal_lm, classification, denoising_autoencoder, extractive_qa, fill_in_middle, in_batch",
            ],
        ),
        (
            _MINIMAL + "trian: {steps: 1}",
            [],
            ["try.yaml:3: unknown key trian (value {steps: 1})", "Did you mean train?"],
        ),
        (_MINIMAL + "train: {stepps: 1}", [], ["try.yaml:3: unknown key train.stepps", "Did you mean train.steps?"]),
        (_MINIMAL, ["batch_size=4"], ["override 'batch_size=4'", "Did you mean train.batch_size?"]),
        (_MINIMAL, ["train.optimizer.name=adm"], ["train.optimizer.name", "Did you mean adamw?"]),
        (_MINIMAL, ["train.steps=1e3"], ["train.steps is 1000.0; accepted: a whole number. Write 1000."]),
        (_MINIMAL, ["train.steps=true"], ["train.steps is true"]),
        (_MINIMAL, ["train.steps=0"], ["override 'train.steps=0': train.steps is 0"]),
        (_MINIMAL, ["data.length=1"], ["data.length is 1"]),
        (_MINIMAL, ["name=a/b"], ['name is "a/b"', "without slashes"]),
        (_MINIMAL, ["run=''"], ['run is ""']),
        (_MINIMAL, ["train.steps.x=1"], ["train.steps is {x: 1}; accepted: a whole number."]),
        (_MINIMAL + "model: {name: gru}", [], ["try.yaml:3:1", "the key 'model' is given twice, first in line 1"]),
        ("model: [", [], ["try.yaml:1:9: not valid YAML"]),
    ],
)
def test_mistakes_are_told_in_one_paragraph(write: Write, text: str, overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        config.load(write(text), overrides)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "name"), _alternatives())
def test_dump_round_trips_and_pydantic_agrees(write: Write, key: str, name: str) -> None:
    """`load(dump(x)) == x` with every alternative in its place, and pydantic's own reading of it is the same."""
    files = [f"{key}.files=['*.txt', '1e-4', 'on']"]
    mixture = [f"{key}.sources={{part: {{source: {{name: stdlib}}}}}}"]
    extras = {
        **dict.fromkeys(
            ("text", "jsonl", "parquet", "tsv", "choices", "conll", "relations", "retrieval", "squad"), files
        ),
        "tfds": [f"{key}.builder=mine"],
        "mixture": mixture,
    }
    extras = extras.get(name, [])
    parent = key.rsplit(".", 1)[0]
    if key.startswith("train.optimizer."):  # a schedule: it needs an optimizer that has one
        extras = ["train.optimizer.name=adamw"]
    if key == "objective.masked_lm":
        extras = ["objective.name=next_sentence_prediction"]
    if (key, name) == ("objective", "mixture"):
        extras = ["objective.members={lm: {objective: {name: masked_lm}}}"]
    assert parent.split(".")[0] in {"adapter", "data", "model", "objective", "train", "writing"}
    overrides = [*extras, f"{key}.name={name}", "sample=['1e5', 'no']", "train.coefficients={nll: 2}"]
    experiment = config.load(write(_MINIMAL), overrides)
    text = config.dump(experiment)
    assert config.load(write(text, "again.yaml")) == experiment
    adapter = pydantic.TypeAdapter(config.Experiment)
    assert adapter.validate_json(json.dumps(_settings.plain(experiment)), strict=True) == experiment
    assert yaml.safe_load(text) == _settings.plain(experiment), "readers of YAML 1.1 see the same"


def test_difference_names_dotted_keys_and_both_values(write: Write) -> None:
    path = write(_MINIMAL)
    before = config.load(path)
    assert config.difference(before, before) == []
    after = config.load(path, ["train.steps=7", "train.coefficients.nll=2"])
    found = dict((key, (old, new)) for key, old, new in config.difference(before, after))  # noqa: C402
    assert found.pop("train.steps") == (before.train.steps, 7)
    assert found.pop("train.coefficients.nll")[1] == 2.0
    assert found == {}


@pytest.mark.parametrize("section", list(_sections()), ids=lambda section: section.__name__)
def test_every_section_is_closed_and_every_field_described(section: type) -> None:
    assert dataclasses.is_dataclass(section)
    assert section.__dataclass_params__.frozen, "settings are frozen"
    assert section.__pydantic_config__["extra"] == "forbid"
    undocumented = [name for name, text in _settings.field_docs(section).items() if not text]
    assert undocumented == []


def test_schema_describes_every_key_and_requires_none() -> None:
    schema = config.schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert next(iter(schema["properties"])) == "base"
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) == len(list(_sections()))
    for section in sections:
        assert section["additionalProperties"] is False
        assert "required" not in section
        for key, field in section["properties"].items():
            assert field.get("description"), f"{section['title']}.{key}"
    assert schema["properties"]["run"]["description"].startswith("Run folder")
    json.dumps(schema, allow_nan=False)


def test_shipped_configs_exist() -> None:
    assert _ROOT / "configs" / "quickstart.yaml" in _CONFIGS


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: str(path.relative_to(_ROOT)))
def test_shipped_configs_load_and_open_with_their_launch_command(path: pathlib.Path) -> None:
    command = path.parent.name if path.parent.name in ("bench", "search") else "train"
    {"bench": bench, "search": search}.get(command, config).load(path)
    opening = re.match(r"(#.*\n)+", path.read_text())
    assert opening, "opens with a comment"
    assert f"lmobj {command} {path.relative_to(_ROOT)}" in opening.group()


def test_the_schema_file_is_current() -> None:
    """configs/schema.json is what editors read; `lmobj schema > configs/schema.json` renews it."""
    assert json.loads((_ROOT / "configs" / "schema.json").read_text()) == config.schema()
