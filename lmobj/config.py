"""A whole experiment as one frozen dataclass: read from YAML, checked, printed, described as a JSON schema.

A config file is YAML with the sections of `Experiment`, and optionally one line `base: other.yaml` that names a file
it builds on. Values are found in this order, the later over the earlier:

    the defaults in the dataclasses < the run of init.run < the base file < the file < key=value overrides

of which the run gives its model and its tokenizer; and where its text is replayed also what that was held out by.

Each section is defined beside the code that it configures; alternatives (models, objectives, optimizers, sources)
are told apart by `name`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pydantic
from pydantic.json_schema import GenerateJsonSchema

from lmobj import _settings, _yaml
from lmobj.adapt import AdapterConfig
from lmobj.data import DataConfig
from lmobj.errors import UserError
from lmobj.evaluate import AnswerTask, GenerationConfig, WritingConfig
from lmobj.models import ModelConfig
from lmobj.objectives import ObjectiveConfig
from lmobj.train.config import TrainConfig
from lmobj.train.initial import Init
from lmobj.train.replay import replayed, replaying
from lmobj.train.run_folder import RunFolder, differing_keys

__all__ = ["Experiment", "difference", "dump", "load", "load_task", "read", "schema"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides what a run computes, and where it keeps it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = "experiment"
    """Name of the experiment; in a file, the file's own name unless given."""
    run: str | None = None
    """Run folder, a path or a URL such as gs://bucket/run, which must not exist yet; null: runs/<name>."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What text to train on and how it becomes tokens."""
    model: ModelConfig
    """The model to train, told apart by `name`."""
    init: Init | None = None
    """Weights to begin with; null: fresh ones."""
    adapter: AdapterConfig | None = None
    """Train few parameters beside the model's, or some of them; null: all of them."""
    objective: ObjectiveConfig
    """The training objective, told apart by `name`."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Steps, batches, optimizer, mesh, evaluation and checkpoints."""
    sample: tuple[str, ...] = ()
    """Prompts that the finished model continues (or whose [MASK] or <fim_middle> it fills) for the report."""
    generation: GenerationConfig | None = None
    """Texts of the finished model under several decodings, with figures beside those of held-out text, for the report;
    null: none."""
    writing: WritingConfig | None = None
    """How an encoder with a decoder writes, and how that is scored; null: by the defaults."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise UserError(f'name is "{self.name}"; accepted: text that can name a folder, without slashes.')
        if self.run is not None and not self.run.strip():
            raise UserError('run is ""; accepted: the path of a folder, or null for runs/<name>.')

    @property
    def run_dir(self) -> Path | str:
        """The run folder: a path, or a URL as it is."""
        run = self.run if self.run is not None else f"runs/{self.name}"
        return run if "://" in run else Path(run)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Reads an experiment from a YAML file and `dotted.key=value` overrides.

    Args:
      path: the file; it may name another, relative to itself, as `base`.
      overrides: each as `train.steps=100`; the value is read as YAML.

    Raises:
      UserError: one paragraph that names the place (`file:line`), the key, its value and what is accepted.
    """
    return _settings.build(Experiment, read(path, overrides), str(path))


def read(path: str | Path, overrides: Sequence[str] = ()) -> _yaml.Document:
    """The settings that `load` makes an experiment of, each with the place where it was written, before any check."""
    document = _inheriting(_yaml.merge(_yaml.read(path), _yaml.parse_overrides(overrides)))
    return dataclasses.replace(document, values={"name": Path(path).stem, **document.values})


def load_task(path: str | Path) -> AnswerTask:
    """Reads a task of answers that are ranked by likelihood from a YAML file, which may name a `base` too.

    Raises:
      UserError: as for `load`.
    """
    document = _yaml.read(path)
    values = {"name": Path(path).stem, **document.values}
    return _settings.build(AnswerTask, dataclasses.replace(document, values=values), str(path))


def _inheriting(document: _yaml.Document) -> _yaml.Document:
    """The document over the model and the tokenizer of the run that `init.run` names, where it leaves them out; and
    with the text of that run where it is to be replayed."""
    init, model, data = (document.values.get(key) for key in ("init", "model", "data"))
    run = init.get("run") if isinstance(init, dict) else None
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    complete = isinstance(model, dict) and "name" in model and isinstance(tokenizer, dict) and "path" in tokenizer
    replays = replayed(document)
    if not isinstance(run, str) or not run.strip() or (complete and not replays):
        return document
    folder = RunFolder(run)
    try:
        folder.check_exists()
        earlier = _yaml.read(folder.config)
        inherited = {"model": earlier.values["model"], "data": {"tokenizer": {"path": str(folder.fetched_tokenizer())}}}
        text = (
            {key: earlier.values["data"][key] for key in ("source", "validation", "test", "clean")} if replays else {}
        )
    except (UserError, KeyError) as error:
        raise UserError(f"{document.origins.get('init.run', 'init.run')}: init.run is {run!r}: {error}") from None
    document = _yaml.merge(_yaml.Document(inherited), document)
    return replaying(document, text, replays) if replays else document


def dump(experiment: Experiment) -> str:
    """The experiment as YAML, complete with every default; `load` reads it back to an equal experiment."""
    return _yaml.to_yaml(_settings.plain(experiment))


def difference(before: Experiment, after: Experiment) -> list[tuple[str, Any, Any]]:
    """The dotted keys in which two experiments differ, with both values."""
    return list(differing_keys(_settings.plain(before), _settings.plain(after)))


def schema(kind: type[Experiment] = Experiment, title: str = "lmobj experiment") -> dict[str, Any]:
    """The JSON schema of config files, for completion and checks in editors.

    Args:
      kind: what a file describes; a subclass adds sections.
      title: of the schema.

    Nothing is required in it, because a file may leave to its `base` what it does not say itself.
    """
    described = pydantic.TypeAdapter(kind).json_schema(schema_generator=_Schema)
    base = {"type": "string", "title": "Base", "description": "A YAML file that this one builds on, relative to it."}
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **described,
        "title": title,
        "properties": {"base": base, **described["properties"]},
    }


class _Schema(GenerateJsonSchema):
    """Takes descriptions from the docstring literals under the fields, and closes every section."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        described = super().dataclass_schema(schema)
        described.pop("required", None)
        docs = _settings.field_docs(schema["cls"])
        for key, field in described.get("properties", {}).items():
            if docs.get(key):
                field["description"] = docs[key]
        return {**described, "additionalProperties": False}
