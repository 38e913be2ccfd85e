"""What follows a bad verdict of `train.guard`: the batch is written down, and the run ends or goes on.

bad_batches/step-N.npz    the arrays of the batch that was step N, all rows of it, for `numpy.load`
bad_batches/step-N.txt    what was wrong with it, and its text
"""

from __future__ import annotations

import io
import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lmobj.data import HostBatch, Tokenizer
from lmobj.train.assemble import Assembly
from lmobj.train.batches import members
from lmobj.train.distributed import AgreedError, is_first
from lmobj.train.guard import Verdict
from lmobj.train.run_folder import RunFolder
from lmobj.train.storage import write_atomically

__all__ = ["BadBatches", "Halted"]


class Halted(AgreedError):  # noqa: N818 - as `Stopped`
    """`train.guard` ended the run; every process knows, since all have seen the same step."""

    exit_code: ClassVar[int] = 3


@dataclass(frozen=True)
class BadBatches:
    """Acts on bad verdicts, as `train.guard` says.

    Args:
      run: the run.
      folder: its folder.
      last_checkpoint: gives the step of the newest checkpoint, if there is one.
      tell: shows the person a line.
    """

    run: Assembly
    folder: RunFolder
    last_checkpoint: Callable[[], int | None]
    tell: Callable[[str], None]

    def act_on(self, step: int, verdict: Verdict) -> None:
        """Writes down the batch of a bad step, and halts or tells.

        Raises:
          Halted: the setting for what was wrong says so.
        """
        kind, guard = verdict.kind, self.run.config.train.guard
        if kind is None:
            return
        written = self._write(step, verdict)
        where = f" The batch is in {written}." if written else ""
        if getattr(guard, kind) == "skip":
            self.tell(f"Step {step} changed nothing (train.guard.{kind}=skip): {verdict}.{where}")
            return
        last = self.last_checkpoint()
        begin = "there is no checkpoint yet" if last is None else f"the last checkpoint, of step {last}, is untouched"
        other = " or train.guard.spike=off" if kind == "spike" else ""
        raise Halted(
            f"Step {step} halted the run (train.guard.{kind}=halt): {verdict}. No update was made with it, and {begin}."
            f"{where} To pass over such batches: `{self.folder.resume_command} train.guard.{kind}=skip`{other}. Where "
            "that happens often, a new run with a lower learning rate, or more warm-up, is the remedy."
        )

    def _write(self, step: int, verdict: Verdict) -> pathlib.Path | None:
        """Writes a batch and returns the file; None in other processes than the first, or if there are enough."""
        if not is_first():
            return None
        folder = self.folder.path / "bad_batches"
        path = folder / f"step-{step}.npz"
        there = [file for file in folder.glob("step-*.npz") if file != path]
        if len(there) >= self.run.config.train.guard.dumps:
            return None
        folder.mkdir(exist_ok=True)
        (batch,) = self.run.batches("train", start=step - 1, steps=1, whole=True)  # a batch is a function of its step
        content = io.BytesIO()
        parts = members(batch)
        arrays = {f"{part}/{name}".lstrip("/"): np.asarray(x) for part in parts for name, x in parts[part].items()}
        np.savez(content, **arrays)  # type: ignore[arg-type]
        write_atomically(path, content.getvalue())
        write_atomically(path.with_suffix(".txt"), _readable(step, verdict, batch, self.run.dataset.tokenizer))
        return path


def _readable(step: int, verdict: Verdict, batch: HostBatch, tokenizer: Tokenizer) -> str:
    """The batch as text: what was wrong, then the segments of each row."""
    lines = [f"step {step}: {verdict}"]
    for name, part in members(batch).items():
        for row, (tokens, segments) in enumerate(zip(part["tokens"], part["segment_ids"], strict=True)):
            source, example = part["row_ids"][row]
            lines.append(f"\n--- {name} row {row} (source {source}, example {example}) ---".replace("  ", " "))
            lines += [tokenizer.decode(tokens[segments == segment]) for segment in np.unique(segments[segments > 0])]
    return "\n".join(lines) + "\n"
