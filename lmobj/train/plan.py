"""What a run would take, known before it is run: a device's share of its memory, from shapes alone.

plan = make_plan(design(config, planned_vocabulary(config.data.tokenizer), mesh=mesh))
plan.total
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lmobj._pieces import DENOISER_MARKS, INFILLING_MARKS, SPELLINGS
from lmobj._units import in_bytes
from lmobj.batch import Vocabulary
from lmobj.data import SentencePieceConfig, Tokenizer
from lmobj.errors import UserError
from lmobj.train.assemble import Design

__all__ = ["Plan", "make_plan", "planned_vocabulary", "shard_bytes"]


@dataclass(frozen=True)
class Plan:
    """The compiled training step of a run, and the bytes that it takes on each device.

    What is temporary (gradients, kept activations, workspace) is the compiler's own figure for the backend that it
    compiled for. The CPU's backend computes bfloat16 in float32 and has no flash attention, so there it is an upper
    bound of what an accelerator takes.
    """

    parameters: int
    optimizer: int
    other: int
    """The batch, averages of the parameters, and what an objective carries."""
    temporary: int
    compile_seconds: float
    compiled: jax.stages.Compiled

    @property
    def total(self) -> int:
        """All of it together."""
        return self.parameters + self.optimizer + self.other + self.temporary

    def __str__(self) -> str:
        parts = ("parameters", "optimizer", "other", "temporary", "total")
        return ", ".join(f"{name} {in_bytes(getattr(self, name))}" for name in parts)


def make_plan(design: Design, options: Mapping[str, Any] | None = None) -> Plan:
    """Compiles the training step of a design and reads off what it takes; nothing is allocated.

    `options` are XLA's, by name.
    """
    lowered = design.lower_train_step()
    start = time.perf_counter()
    compiled = lowered.compile(dict(options or {}))
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    if memory is None:
        raise UserError(f"jax tells nothing about the memory of programs for {jax.default_backend()}; plan on the CPU.")
    state = design.abstract_state._asdict()
    return Plan(
        parameters=shard_bytes((state.pop("params"), state.pop("frozen"))),
        optimizer=shard_bytes(state.pop("opt_state")),
        other=shard_bytes((state, design.abstract_batch)),
        temporary=int(memory.temp_size_in_bytes),
        compile_seconds=seconds,
        compiled=compiled,
    )


def planned_vocabulary(settings: SentencePieceConfig) -> Vocabulary:
    """The vocabulary that the data will have, before there is a tokenizer to ask (unless the settings name one)."""
    pieces = settings.control_pieces
    if settings.path is not None:
        return Tokenizer.load(settings.path).extended(pieces).vocabulary
    ids = {piece: index for index, piece in enumerate(pieces, settings.trained_size)}
    marks = {name: ids.get(SPELLINGS[name][0]) for name in (*DENOISER_MARKS, *INFILLING_MARKS)}
    size = settings.trained_size + len(pieces)
    sentinels = tuple(reversed(range(size - settings.sentinels, size)))
    return Vocabulary(size, pad=0, unk=1, bos=2, eos=3, cls=4, sep=5, mask=6, sentinels=sentinels, **marks)


def shard_bytes(tree: Any) -> int:
    """Bytes of one device's shards of the arrays in `tree`, which may be shapes with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
