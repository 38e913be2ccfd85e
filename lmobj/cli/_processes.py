"""The options with which a command becomes one of several processes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from lmobj.train.distributed import Launch

__all__ = ["in_several_processes"]

_PANEL: Any = {"rich_help_panel": "Several processes"}


def _launch(
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Started by SLURM, Open MPI, Kubernetes or on a TPU pod.", **_PANEL)
    ] = False,
    coordinator: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where process 0 listens.", **_PANEL)
    ] = None,
    processes: Annotated[int | None, typer.Option(help="Number of processes.", **_PANEL)] = None,
    process: Annotated[int | None, typer.Option(help="Which one this is, from 0.", **_PANEL)] = None,
    join_timeout: Annotated[float, typer.Option(help="Seconds to wait until all have come.", **_PANEL)] = 300,
    heartbeat: Annotated[
        int, typer.Option(help="Seconds of silence after which a process counts as dead.", **_PANEL)
    ] = 100,
) -> Launch:
    from lmobj.train.distributed import Launch

    return Launch(distributed, coordinator, processes, process, join_timeout, heartbeat)


def in_several_processes(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of `Launch` to a command, which then runs once all processes have joined."""
    added = inspect.signature(_launch, eval_str=True, locals={"Launch": Any}).parameters

    @functools.wraps(command)
    def joined(**options: Any) -> None:
        launch = _launch(**{name: options.pop(name) for name in added})
        from lmobj.train.distributed import together

        with together(launch):
            command(**options)

    own = inspect.signature(command, eval_str=True)
    joined.__signature__ = own.replace(parameters=[*own.parameters.values(), *added.values()])  # type: ignore[attr-defined]
    return joined
