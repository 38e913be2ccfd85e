"""Weights to begin with: those of an earlier run, to go on with on other text or to be tuned for a task.

What `adapter` leaves frozen is in no checkpoint of the run: it is made again, from the earlier run or the seed, and
compared by a fingerprint with what it was.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from lmobj._yaml import read
from lmobj.errors import UserError
from lmobj.train import distributed
from lmobj.train.assemble import Design
from lmobj.train.best import Best
from lmobj.train.checkpoint import Checkpoints, Restored, leaves_by_path
from lmobj.train.roles import HEADS
from lmobj.train.run_folder import RunFolder
from lmobj.train.step import State

__all__ = ["Init", "fingerprint", "fresh_state", "inherited_state", "restored_state"]


@dataclass(frozen=True)
class Init:
    """Begin with the weights of an earlier run, its moving average where it kept one.

    `model` and `data.tokenizer` are that run's where a config does not give them. Optimizer state and steps begin anew.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    run: str = ""
    """Folder of the earlier run, a path or a URL."""
    best: bool = False
    """Take its best checkpoint (its train.best), not the newest."""

    def __post_init__(self) -> None:
        if not self.run.strip():
            raise UserError(f"init.run is {self.run!r}; accepted: the folder of an earlier run.")


def fresh_state(run: Design) -> tuple[State, tuple[str, ...]]:
    """The state at step 0, with the weights that the config asks to begin with, and notes for the person."""
    if run.config.init is None:
        return run.initial_state(), ()
    state, note = inherited_state(run, run.config.init)
    return state, (note,)


def restored_state(run: Design, checkpoints: Checkpoints, step: int | None = None) -> Restored:
    """What `Checkpoints.restore` reads, and beside it what is frozen.

    Raises:
      UserError: as `restore`, or what is frozen is not what it was.
    """
    restored = checkpoints.restore(run.abstract_state.stored, step=step)
    if not run.abstract_state.frozen:
        return restored
    frozen = fresh_state(run)[0].frozen
    if fingerprint(frozen) != restored.metadata.get("frozen"):
        whose = "the seed" if run.config.init is None else f"init.run, {run.config.init.run!r},"
        raise UserError(
            f"The frozen weights, which are made from {whose} are not those that the checkpoint of step "
            f"{restored.step} was trained beside; accepted: the weights of then."
        )
    return restored._replace(state=restored.state._replace(frozen=frozen))


def fingerprint(frozen: Any) -> str | None:
    """Digest of the bits of frozen parameters, whatever mesh they are on; None if there are none."""
    if not frozen:
        return None
    sums = jax.device_get(jax.jit(lambda tree: jax.tree.map(_bit_sum, tree))(frozen))
    text = json.dumps({path: int(value) for path, value in leaves_by_path(sums)}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _bit_sum(x: jax.Array) -> jax.Array:
    """The sum of an array's bits as whole numbers, each times its place, modulo 2^32: the same in whatever order."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits = bits ^ (bits >> 32) if bits.dtype == "uint64" else bits
    place = jax.lax.broadcasted_iota("uint32", (x.size,), 0).reshape(x.shape)
    return jnp.sum(bits.astype("uint32") * (2 * place + 1), dtype="uint32")


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
            for role, model in run.abstract_base.items():
                fault = _fault({kind: {role: model}}, stored)
                if fault is None:
                    wanted[role] = model
                elif role != HEADS:
                    raise UserError(f"init.run is {init.run!r}, a run of another model: {fault}; accepted: its own.")
        found = checkpoints.restore(_as_stored({kind: wanted}, stored), step=step, whole=False)
    new = [role for role in run.abstract_base if role not in wanted]
    note = f"Beginning with the weights of {init.run} at step {step}{', and new heads' if new else ''}."
    return run.initial_state(found.state[kind]), note


def _fault(wanted: Any, stored: Mapping[str, list[Any]]) -> str | None:
    """The first array wanted that is not stored, or in another shape; None if there is none."""
    for path, leaf in leaves_by_path(wanted):
        there = stored[path][0] if path in stored else None
        if there != list(leaf.shape):
            return f"{path} is {'absent' if there is None else there} there and {list(leaf.shape)} here"
    return None


def _as_stored(wanted: dict[str, Any], stored: Mapping[str, list[Any]]) -> dict[str, Any]:
    """The arrays wanted, in the types in which they are stored."""
    leaves = [
        jax.ShapeDtypeStruct(leaf.shape, stored[path][1], sharding=leaf.sharding)
        for path, leaf in leaves_by_path(wanted)
    ]
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)
