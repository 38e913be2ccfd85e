"""The same work in an Apache Beam pipeline, a group of inputs at a time: for corpora that outgrow one machine.

Results pass through files in a folder that every worker sees, so that a worker's finished parts outlive the pipeline.
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lmobj.data._corpus import Corpus, Group
from lmobj.data._parts import Done, Part, Work, pending_in, temporary_name
from lmobj.data._runner import Runner
from lmobj.errors import UserError

__all__ = ["run_beam"]

R = TypeVar("R")


def run_beam(options: Sequence[str], folder: Path) -> Runner:
    """A runner that builds one Beam pipeline per pass over a corpus.

    Args:
      options: the pipeline's, as on a command line.
      folder: where results are handed over.

    Raises:
      UserError: Beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise UserError(
            "a Beam pipeline needs apache-beam, which is not installed; pip install 'lmobj[beam]'."
        ) from error

    def run(corpus: Corpus, work: Work[R]) -> Generator[Done[R]]:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="beam-") as exchange:
            hand_over = _HandOver(work, exchange)
            with beam.Pipeline(options=PipelineOptions(list(options))) as pipeline:
                groups = pipeline | beam.Create(list(enumerate(corpus.groups)))
                groups | beam.Reshuffle() | beam.Map(hand_over)
            for number in range(len(corpus.groups)):
                yield from hand_over.received(number)

    return run


class _HandOver:
    """Works on a group where Beam puts it, and leaves the results in a file. A user's mistake is such a result."""

    def __init__(self, work: Work[Any], folder: str):
        self._work, self._folder = work, Path(folder)

    def __call__(self, numbered: tuple[int, Group]) -> None:
        number, group = numbered
        results: list[Done[Any]] | UserError
        try:
            results = list(self._results(number, group))
        except UserError as error:
            results = error
        path = self._path(number)
        temporary_name(path).write_bytes(pickle.dumps(results))
        temporary_name(path).replace(path)

    def _results(self, number: int, group: Group) -> Iterator[Done[Any]]:
        for part in pending_in(group, number, self._work):
            yield Done(self._work(part), part.read) if isinstance(part, Part) else part

    def received(self, number: int) -> list[Done[Any]]:
        """The results of a group; raises the UserError that it ended with."""
        results = pickle.loads(self._path(number).read_bytes())
        if isinstance(results, UserError):
            raise results
        return results

    def _path(self, number: int) -> Path:
        return self._folder / f"{number}.pickle"
