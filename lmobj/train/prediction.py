"""What a run's model says of texts in files, written as JSON Lines.

Texts go through a batch at a time, so that neither input nor output need fit into memory. Lines are appended to
`OUTPUT.partial`, which becomes OUTPUT at the end; where a partial file lies there already, it is gone on with.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from lmobj.data import MixtureSource, StdlibSource, Tally, TextFiles, open_corpus, progress_bar, text_rows
from lmobj.errors import UserError
from lmobj.train.trained import TrainedRun

__all__ = ["predict"]

_DIGITS = 6
"""Of probabilities and scores."""

Text = tuple[str, str | None]


def predict(trained: TrainedRun, inputs: Sequence[str], output: Path, *, quiet: bool = False) -> int:
    """Writes a line for each text of the inputs, and returns how many there are.

    Args:
      trained: a run of a task on whole rows.
      inputs: files as the run's `data.source` reads them, but for labels, which need not be there.
      output: a file that does not exist yet. Its lines have `text` (and `pair`), and `label` (or `labels`, those from
        a probability of 1/2 on) with `probabilities` by the names of the classes, or `score`.
      quiet: no progress bar.

    Raises:
      UserError: a run that trained no such task, an input that cannot be read, or an output that is there already.
    """
    run = trained.assembly
    if run.objective.task not in ("classification", "multi_label", "regression"):
        name = getattr(run.objective, "name", type(run.objective).__name__)
        raise UserError(
            f"the objective of this run is {name}, which says nothing about whole texts; accepted: a run of "
            "classification, multi_label or regression."
        )
    if os.path.lexists(output):
        raise UserError(f"--output is {str(output)!r}, which exists already; accepted: the path of a new file.")
    corpus = open_corpus(_source(trained, inputs), os.cpu_count() or 1, "--input")
    partial = output.with_name(output.name + ".partial")
    done = _whole_lines(partial)
    tally, count = Tally(), done
    with partial.open("a", encoding="utf-8") as file, progress_bar(quiet) as progress:
        task = progress.add_task("predicting", total=corpus.size)
        documents = itertools.islice(((d.text, d.pair) for d in corpus.documents(tally)), done, None)
        while texts := list(itertools.islice(documents, run.config.train.batch_size)):
            for line in _lines(trained, texts):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            count += len(texts)
            progress.update(task, completed=tally.read)
    partial.replace(output)
    return count


def _source(trained: TrainedRun, inputs: Sequence[str]) -> Any:
    """The run's source, with other files and without labels."""
    source: Any = trained.assembly.config.data.source
    if isinstance(source, MixtureSource | StdlibSource | TextFiles) or not hasattr(source, "files"):
        raise UserError(f"data.source of this run is {source.name}; accepted: a run that read records from files.")
    return dataclasses.replace(source, files=tuple(inputs), label=None)


def _whole_lines(partial: Path) -> int:
    """How many lines a stopped run has written; a last one that does not end is cut off."""
    if not partial.exists():
        return 0
    content = partial.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(partial, len(whole))
    return whole.count(b"\n")


def _lines(trained: TrainedRun, texts: Sequence[Text]) -> Iterator[dict[str, Any]]:
    """A batch of texts, at most as many as rows of a training batch, with what the model says of each."""
    run = trained.assembly
    outputs = jax.device_get(run.eval_step(trained.state, _batch(trained, texts))[2])
    for index, (text, pair) in enumerate(texts):
        line: dict[str, Any] = {"text": text} if pair is None else {"text": text, "pair": pair}
        if run.objective.task == "multi_label":
            logits = outputs["logits"][index].astype(np.float64)
            p, told = 1 / (1 + np.exp(-logits)), logits >= 0
            each = {name: round(float(x), _DIGITS) for name, x in zip(run.dataset.classes, p, strict=True)}
            yield {**line, "labels": [name for name, one in zip(each, told, strict=True) if one], "probabilities": each}
        elif "logits" in outputs:
            p = _softmax(outputs["logits"][index])
            names = run.dataset.classes
            each = {name: round(float(x), _DIGITS) for name, x in zip(names, p, strict=True)}
            yield {**line, "label": names[int(np.argmax(p))], "probabilities": each}
        else:
            yield {**line, "score": round(float(outputs["scores"][index]), _DIGITS)}


def _batch(trained: TrainedRun, texts: Sequence[Text]) -> dict[str, NDArray]:
    """A batch as training has it, filled with empty rows."""
    run = trained.assembly
    rows = text_rows(texts, trained.tokenizer, run.spec, run.spec.length, key="data.length")
    filled = {name: np.zeros(x.shape, x.dtype) for name, x in run.abstract_batch.items()}
    count, length = rows.tokens.shape
    filled["tokens"][:] = run.vocab.pad
    for name, values in (("tokens", rows.tokens), ("segment_ids", rows.segments), ("token_types", rows.types)):
        filled[name][:count, :length] = np.where(rows.segments > 0, values, filled[name][:count, :length])
    filled["positions"][:] = np.arange(run.spec.length) * filled["segment_ids"]
    return filled


def _softmax(logits: NDArray) -> NDArray[np.float64]:
    p = np.exp(logits.astype(np.float64) - np.max(logits))
    return p / np.sum(p)
