"""Weights to begin with: those of an earlier run, to go on with on other text or to be tuned for a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from lmobj._yaml import read
from lmobj.errors import UserError
from lmobj.train import distributed
from lmobj.train.assemble import Design
from lmobj.train.best import Best
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.roles import HEADS
from lmobj.train.run_folder import RunFolder
from lmobj.train.step import State

__all__ = ["Init", "inherited_state"]


@dataclass(frozen=True)
class Init:
    """Begin with the weights of an earlier run, its moving average where it kept one.

    `model` and `data.tokenizer` are that run's where a config does not give them. Optimizer state and steps begin anew.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    run: str
    """Folder of the earlier run, a path or a URL."""
    best: bool = False
    """Take its best checkpoint (its train.best), not the newest."""

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise UserError(f"init.run is {self.run!r}; accepted: the folder of an earlier run.")


def inherited_state(run: Design, init: Init) -> tuple[State, str]:
    """The state at step 0 with an earlier run's weights, and a line that says whose they are.

    Heads that the earlier run did not have, or had otherwise, are new. Every process calls it.

    Raises:
      UserError: there is no such run, it has no checkpoint, or its model is another.
    """
    with distributed.agreed("init.run"):
        folder = RunFolder(init.run)
        folder.check_exists()
        best = Best(**read(folder.config).values["train"].get("best", {}))
    with Checkpoints(folder.checkpoints, best=best.name, mode=best.mode) as checkpoints:
        with distributed.agreed("checkpoint of init.run"):
            step = checkpoints.best_step if init.best else checkpoints.latest_step
            if step is None:
                raise UserError(f"init.run is {init.run!r}, which has no checkpoint yet; accepted: a run that has.")
            stored = checkpoints.arrays(step)
            kind = "ema" if any(path.startswith("ema/") for path in stored) else "params"
            wanted: dict[str, Any] = {}
            for role, model in run.abstract_state.params.items():
                fault = _fault(f"{kind}/{role}", model, stored)
                if fault is None:
                    wanted[role] = model
                elif role != HEADS:
                    raise UserError(f"init.run is {init.run!r}, a run of another model: {fault}; accepted: its own.")
        found = checkpoints.restore({kind: _as_stored(kind, wanted, stored)}, step=step, whole=False)
    new = [role for role in run.abstract_state.params if role not in wanted]
    note = f"Beginning with the weights of {init.run} at step {step}{', and new heads' if new else ''}."
    return run.initial_state(found.state[kind]), note


def _fault(prefix: str, model: Any, stored: Mapping[str, list[Any]]) -> str | None:
    """The first array of a model that is not stored, or in another shape; None if there is none."""
    for path, leaf in _paths(prefix, model).items():
        there = stored[path][0] if path in stored else None
        if there != list(leaf.shape):
            return f"{path} is {'absent' if there is None else there} there and {list(leaf.shape)} here"
    return None


def _as_stored(kind: str, wanted: dict[str, Any], stored: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The arrays wanted, in the types in which they are stored."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, stored[path][1], sharding=leaf.sharding)
        for path, leaf in _paths(kind, wanted).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _paths(prefix: str, tree: Any) -> dict[str, Any]:
    """The leaves by their paths in a checkpoint."""
    return {
        f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
