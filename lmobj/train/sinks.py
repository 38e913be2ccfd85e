"""Where metrics go: `metrics.jsonl`, TensorBoard, Weights & Biases. The tracker hands the same values to each."""

from __future__ import annotations

import json
import math
import os
import pathlib
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from lmobj.errors import UserError

__all__ = ["JsonLines", "Sink", "TensorBoard", "WandB", "WandBSink"]


class Sink(Protocol):
    """A place that metrics are written to, by one process."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; NaN and infinity may be among them."""
        ...

    def text(self, step: int, name: str, value: str) -> None:
        """Writes a text, such as a generated sample, where the place can show it."""
        ...

    def close(self, *, failed: bool) -> None:
        """Writes what is pending. `failed`: an error or a signal ended the run."""
        ...


def finite(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: they become null, in mappings and lists too."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonLines:
    """One JSON object a line, handed to the operating system at once. NaN and infinity become null."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._file.write(json.dumps({"step": step, **finite(values)}, allow_nan=False) + "\n")
        self._file.flush()

    def text(self, step: int, name: str, value: str) -> None:
        """Texts have files of their own."""

    def close(self, *, failed: bool) -> None:
        """See `Sink`."""
        self._file.close()


class TensorBoard:
    """Event files. What earlier ones hold of steps after `start` is hidden by TensorBoard.

    Events are written here and now: tensorboardX's own `SummaryWriter` writes them in a thread, which a full disk ends
    without a word, and whoever writes next waits for it forever.
    """

    def __init__(self, folder: pathlib.Path, *, start: int) -> None:
        # imported late: it imports torch where torch is installed
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event, self._summary = Event, summary
        folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the second; the suffix tells apart sessions that start in the same one.
        self._events = EventsWriter(str(folder / "events"), f".{start}.{os.getpid()}")
        self._add(start + 1, session_log=SessionLog(status=SessionLog.START))
        self._events.flush()

    def _add(self, step: int, **content: Any) -> None:
        self._events.write_event(self._event(wall_time=time.time(), step=step, **content))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        for name, value in values.items():
            if math.isfinite(value):
                self._add(step, summary=self._summary.scalar(name, value))
        self._events.flush()

    def text(self, step: int, name: str, value: str) -> None:
        """See `Sink`."""
        self._add(step, summary=self._summary.text(name, value))
        self._events.flush()

    def close(self, *, failed: bool) -> None:
        """See `Sink`."""
        try:
            self._events.close()
        except OSError:
            if not failed:  # else the disk is full, perhaps, and what ended the run says so
                raise


@dataclass(frozen=True)
class WandB:
    """Weights & Biases (https://docs.wandb.ai); a resumed run goes on in the same run there."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    project: str = "lmobj"
    """Project that the run is shown in."""
    entity: str | None = None
    """User or team; absent: the one that is logged in."""
    name: str | None = None
    """Name of the run there; absent: the experiment's."""
    group: str | None = None
    """Group of runs that it belongs to."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline: keep it in the run folder for `wandb sync`; absent: as WANDB_MODE says, else online."""

    def __post_init__(self) -> None:
        if not self.project:
            raise UserError('train.wandb.project is ""; accepted: the name of a project.')

    def check(self) -> None:
        """Refuses, before a run begins, what cannot be logged to."""
        _import_wandb()


class WandBSink:
    """One run at Weights & Biases, known by an id that is kept in the run folder.

    Steps are logged as values of their own, `step`, which every chart is drawn over: what a killed run had logged
    beyond its last checkpoint is logged again by the resumed one, which the service's own counter would drop.
    """

    def __init__(
        self, settings: WandB, run_dir: pathlib.Path, *, name: str, config: Mapping[str, Any], quiet: bool = False
    ) -> None:
        wandb = _import_wandb()
        try:
            self._run = wandb.init(
                project=settings.project,
                entity=settings.entity,
                name=settings.name or name,
                group=settings.group,
                tags=settings.tags,
                mode=settings.mode,
                id=_run_id(run_dir / "wandb_id"),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=wandb.Settings(console="off", silent=quiet),
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"train.wandb: Weights & Biases refused the run: {' '.join(str(error).split())} Log in with `wandb "
                "login`, or set train.wandb.mode=offline; then resume."
            ) from error
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See `Sink`."""
        self._run.log({"step": step, **values})

    def text(self, step: int, name: str, value: str) -> None:
        """Shown with the run's summary."""
        self._run.summary[name] = value

    def close(self, *, failed: bool) -> None:
        """See `Sink`."""
        self._run.finish(exit_code=int(failed))


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"train.wandb is set and the package wandb cannot be imported ({error}); install it with `pip install "
            "'lmobj[track]'`, or set train.wandb=null."
        ) from error
    return wandb


def _run_id(path: pathlib.Path) -> str:
    """The id in the file, made by the first session of a run."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n")
    return path.read_text().strip()
