"""From the settings of the data to the data set: of documents, or of a task's examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lmobj.data import (
    ChoiceFiles,
    ConllFiles,
    DataConfig,
    Dataset,
    RelationFiles,
    RetrievalFiles,
    SquadFiles,
    TaskSource,
    prepare,
)
from lmobj.errors import UserError
from lmobj.tasks._choice_examples import ChoiceExamples
from lmobj.tasks._example_dataset import ExampleDataset, Kind, read_examples
from lmobj.tasks._question_examples import QuestionExamples
from lmobj.tasks._relation_examples import RelationExamples
from lmobj.tasks._retrieval_examples import RetrievalExamples
from lmobj.tasks._tagged_examples import TaggedExamples

__all__ = ["AnyDataset", "prepare_any"]

AnyDataset = Dataset | ExampleDataset[Any]


def prepare_any(config: DataConfig, *, quiet: bool = False, beam: Sequence[str] | None = None) -> AnyDataset:
    """`lmobj.data.prepare`; or where the source is a `TaskSource`, its examples, which are kept in memory.

    Raises:
      UserError: as `prepare`; a file that is missing or holds something else, or a split without examples.
    """
    source = config.source
    if not isinstance(source, TaskSource):
        return prepare(config, quiet=quiet, beam=beam)
    if beam is not None:
        raise UserError(
            f"--beam prepares texts, and data.source.name is {source.name!r}, whose examples are read where they are "
            "used; accepted: no --beam."
        )
    return read_examples(config, _kind(source), source)


def _kind(source: TaskSource) -> Kind[Any]:
    if isinstance(source, ConllFiles):
        return TaggedExamples(source)
    if isinstance(source, ChoiceFiles):
        return ChoiceExamples(source)
    if isinstance(source, RelationFiles):
        return RelationExamples(source)
    if isinstance(source, RetrievalFiles):
        return RetrievalExamples(source)
    assert isinstance(source, SquadFiles)
    return QuestionExamples(source)
