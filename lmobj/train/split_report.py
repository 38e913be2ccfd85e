"""What is told of a task run on a split, as files in its folder.

eval/SPLIT.json          figures, baselines, the table of scores, the picture's numbers, and whose they are
eval/SPLIT.jsonl         a record of every example, in the order of the split, so that runs can be compared by them
eval/SPLIT_KIND.svg      the picture, such as test_confusion.svg
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmobj.errors import UserError
from lmobj.evaluate import Picture, read_picture, save_picture
from lmobj.train.assemble import Assembly
from lmobj.train.evaluation import Evaluation
from lmobj.train.run_folder import RunFolder
from lmobj.train.sinks import finite
from lmobj.train.step import State
from lmobj.train.writing import report_written

__all__ = ["EVALUATED", "SplitReport", "examine", "read_reports", "reported_splits"]

EVALUATED = "eval"
"""The folder within a run's."""

Record = dict[str, Any]
Cell = str | int | float


@dataclass(frozen=True)
class SplitReport:
    """What a run's model says on a split.

    step: of the weights.
    data: the fingerprint of the data.
    figures: all metrics of the split.
    records: gives the examples' records; see `lmobj.evaluate.TaskReport`, whence `header`, `rows` and `picture` are.
    """

    task: str
    split: str
    step: int
    data: str
    examples: int
    figures: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    picture: Picture | None
    records: Callable[[], list[Record]] = dataclasses.field(compare=False, repr=False)

    def lines(self) -> list[list[str]]:
        """The rows as text: numbers with four digits, counts whole."""
        return [[_show(value) for value in row] for row in self.rows]

    def write(self, folder: RunFolder) -> list[Path]:
        """Writes the files, also into the store of a run that lies in one, and returns their paths.

        Raises:
          UserError: the folder cannot be written to.
        """
        name = f"{EVALUATED}/{self.split}"
        folder.remove(f"{name}.json")  # and written last: whoever finds it finds the records that belong to it
        paths = [folder.add(f"{name}.jsonl", "".join(map(_line, self.records())))]
        if self.picture is not None:
            paths.append(folder.path / f"{name}_{self.picture.KIND}.svg")
            save_picture(self.picture, paths[1:])
            folder.publish(f"{EVALUATED}/{paths[1].name}")
        stored = json.dumps(self._stored(), indent=2, ensure_ascii=False) + "\n"
        return [*paths, folder.add(f"{name}.json", stored)]

    def _stored(self) -> dict[str, Any]:
        """What SPLIT.json holds."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["records"]
        picture = self.picture and {"kind": self.picture.KIND, **dataclasses.asdict(self.picture)}  # type: ignore[call-overload]
        stored: dict[str, Any] = finite({**fields, "picture": picture})
        return stored

    @classmethod
    def read(cls, path: Path) -> SplitReport:
        """Reads a SPLIT.json. UserError if it is damaged."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored["figures"] = {name: math.nan if x is None else float(x) for name, x in stored["figures"].items()}
            stored["picture"] = stored["picture"] and read_picture(stored["picture"])
            records = functools.partial(_read_records, path.with_suffix(".jsonl"), stored["examples"])
            return cls(**stored, records=records)
        except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(
                f"{path} is damaged ({type(error).__name__}: {error}); remove it, and `lmobj eval` makes it anew."
            ) from None


def reported_splits(run: Assembly) -> list[str]:
    """The splits that a finished run tells of: of a task those that were held out and have text."""
    if run.objective.task is None:
        return []
    return [split for split in ("validation", "test") if Evaluation(run, split).has_text]


def examine(
    run: Assembly, state: State, split: str, *, quiet: bool = True
) -> tuple[dict[str, float], SplitReport | None]:
    """The metrics over a split, and of a task what is told beside them. Every process calls it and has all of it.

    Where the model writes texts, which takes longer, there is a progress bar unless `quiet`.
    """
    evaluation = Evaluation(run, split)
    metrics, found = evaluation.examine(state)
    baselines = {} if found is None else evaluation.baselines()
    if run.objective.task == "sequence_to_sequence":
        told = report_written(run, run.model(state), split, quiet=quiet)
        found, baselines = told or (None, {})
        metrics = metrics | (found.figures if found else {})
    if found is None:
        return metrics, None
    records = list(found.records())
    return metrics, SplitReport(
        task=str(run.objective.task),
        split=split,
        step=int(state.step),
        data=run.dataset.fingerprint,
        examples=len(records),
        figures=metrics,
        baselines=baselines,
        header=found.header,
        rows=found.rows,
        picture=found.picture,
        records=lambda: records,
    )


def read_reports(folder: Path) -> list[SplitReport]:
    """What was told of a run on each split that it was evaluated on."""
    paths = [folder / EVALUATED / f"{split}.json" for split in ("train", "validation", "test")]
    return [SplitReport.read(path) for path in paths if path.is_file()]


def _read_records(path: Path, examples: int) -> list[Record]:
    """The records of a SPLIT.jsonl. UserError if they are damaged."""
    try:
        records: list[Record] = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        if [one["index"] for one in records] != list(range(examples)):
            raise ValueError(f"not the {examples} examples that it should have")
        for one in records:
            one["target"], one["prediction"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or missing ({type(error).__name__}: {error}); remove {path.stem}.json beside it, and "
            "`lmobj eval` makes both anew."
        ) from None
    return records


def _line(record: Record) -> str:
    return json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"


def _show(value: Cell) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
