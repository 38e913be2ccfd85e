"""What a run's model says of examples in files, written as JSON Lines.

Examples go through a batch at a time, so that neither input nor output need fit into memory (but for a JSON file of
questions, which is read whole). Lines are appended to `OUTPUT.partial`, which becomes OUTPUT at the end; where a
partial file lies there already, it is gone on with. `OUTPUT.partial.json` says what it is made from.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from lmobj.data import find_inputs, progress_bar
from lmobj.errors import UserError
from lmobj.train.predictors import predictor
from lmobj.train.storage import write_atomically
from lmobj.train.trained import TrainedRun

__all__ = ["predict"]


def predict(trained: TrainedRun, inputs: Sequence[str], output: Path, *, quiet: bool = False) -> int:
    """Writes a line for each text, sentence or question of the inputs, and returns how many there are.

    Args:
      trained: a run of a task.
      inputs: files as the run's `data.source` reads them, but for labels, which need not be there.
      output: a file that does not exist yet. What its lines have, by task:

        - classification, regression: `text` (and `pair`), and `label` with `probabilities` by the names of the classes,
          or `score`
        - multi-label classification: `labels`, those with a probability of 1/2 or more, and `probabilities`
        - multiple choice: `context`, `choices`, and as `label` the place of the best, with `probabilities` in order
        - relations: `text`, `head`, `tail`, and `label` with `probabilities`
        - token classification: `words`, their `tags`, and `entities` as [type, first word, the one after the last]
        - sequence to sequence: `text`, and what is written for it as `prediction`, with its `log_probability` in nats
        - extractive QA: `id`, `question`, `answer`; `score` and `probability` of the best span, and `null_odds`, how
          much better no answer is
      quiet: no progress bar.

    Raises:
      UserError: a run that trained no such task, an input that cannot be read, or an output that is there already.
    """
    if os.path.lexists(output):
        raise UserError(f"--output is {str(output)!r}, which exists already; accepted: the path of a new file.")
    task = predictor(trained, inputs)
    partial = output.with_name(output.name + ".partial")
    origin = _check_origin(partial, trained, inputs)
    count = done = _whole_lines(partial)
    examples = itertools.islice(task.examples(), done, None)
    with partial.open("a", encoding="utf-8") as file, progress_bar(quiet) as progress:
        bar = progress.add_task("predicting", total=task.size)
        while batch := list(itertools.islice(examples, trained.assembly.config.train.batch_size)):
            for line in task.lines(batch):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            count += len(batch)
            progress.update(bar, completed=task.read)
    partial.replace(output)
    origin.unlink()
    return count


def _check_origin(partial: Path, trained: TrainedRun, inputs: Sequence[str]) -> Path:
    """The file that says what a partial file is made from. Refuses to go on with one that is of something else."""
    made = {
        "run": str(trained.assembly.config.run_dir),
        "step": int(trained.state.step),
        "input": [file.digest for file in find_inputs("--input", inputs, os.cpu_count() or 1)],
    }
    origin = partial.with_name(partial.name + ".json")
    if partial.exists():
        stored = json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else {}
        for key, value in made.items():
            if stored.get(key) != value:
                raise UserError(
                    f"{str(partial)!r} is what an earlier `lmobj predict` left, whose {key} is {stored.get(key)} and "
                    f"not {value}; accepted: the same again, or another --output. To begin anew, remove that file."
                )
    else:
        write_atomically(origin, json.dumps(made) + "\n")
    return origin


def _whole_lines(partial: Path) -> int:
    """How many lines a stopped run has written; a last one that does not end is cut off."""
    if not partial.exists():
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(partial, len(whole))
    return whole.count(b"\n")
