"""What a run would take on devices that are not there: memory, operations, exchange, and how fast a step could be.

forecast(config.load("configs/pretrain/gpt2_124m.yaml"), "h100", 8).fits
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import pathlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from lmobj._units import in_bytes
from lmobj.errors import UserError
from lmobj.train import sharding
from lmobj.train.assemble import Design, Experiment, design
from lmobj.train.collectives import Collective, collectives
from lmobj.train.devices import DeviceKind, device_kind
from lmobj.train.flops import model_flops
from lmobj.train.memory import is_out_of_memory
from lmobj.train.plan import Plan, make_plan, planned_vocabulary
from lmobj.train.products import step_flops
from lmobj.train.roofline import Roofline, memory_traffic, roofline
from lmobj.train.targets import Target, make_target

__all__ = ["Forecast", "Memory", "NoRoomError", "cut_heads", "designed", "forecast", "forecast_on", "multiplied_bytes"]

_UPPER_BOUND = (
    "Memory is an upper bound: compiled for CPU devices, which compute bfloat16 in float32 and have no flash attention."
)


class NoRoomError(UserError):
    """A device's own compiler finds no room for the step."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device."""

    weights: int
    optimizer: int
    temporary: int
    """Gradients, kept activations and workspace."""
    other: int
    """The batch, averages of the weights, and what an objective carries."""
    available: int
    """What the device has."""

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.weights + self.optimizer + self.temporary + self.other


@dataclass(frozen=True)
class Forecast:
    """What one training step takes."""

    device: str
    devices: int
    mesh: dict[str, int]
    remat: str | None
    accumulate: int
    parameters: int
    tokens_per_step: int
    memory: Memory
    model_flops: float
    """On all devices, by formula (`lmobj.train.flops.model_flops`)."""
    counted_flops: int | None
    """Matrix products of the compiled program, on all devices; None where they cannot be counted."""
    collectives: tuple[Collective, ...]
    """On each device."""
    roofline: Roofline
    compiler: str
    compile_seconds: float
    replicated: tuple[str, ...]
    """Dimensions that stay whole although a rule would split them."""
    notes: tuple[str, ...]
    """What to know when reading the figures."""
    peak_flops: float
    """Of one device, per second."""

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        return self.memory.peak <= self.memory.available

    @property
    def tokens_per_second(self) -> float:
        """At the roofline's step time, of all devices."""
        return self.tokens_per_step / self.roofline.step

    @property
    def mfu(self) -> float:
        """Share of the peak that the model's operations would use at the roofline's step time."""
        return self.model_flops / (self.roofline.step * self.devices * self.peak_flops)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values, derived figures too."""
        values = dataclasses.asdict(self)
        values["memory"]["peak"] = self.memory.peak
        values["roofline"] |= {"step": self.roofline.step, "bound": self.roofline.bound}
        return values | {"fits": self.fits, "tokens_per_second": self.tokens_per_second, "mfu": self.mfu}


def forecast(config: Experiment, device: str, devices: int) -> Forecast:
    """Compiles a config's training step for `devices` of a kind, and says what it takes. Nothing is allocated.

    Programs for a TPU are compiled by its own compiler where the package libtpu is installed; all others for CPU
    devices, so that their memory is an upper bound. Exchange between CPU devices is read from the program as it was
    partitioned, before the CPU's compiler turns 16-bit arrays into float32.

    Args:
      config: the experiment; `train.mesh` arranges the devices.
      device: a name of `lmobj.train.devices`, such as `h100` or `v5p`.
      devices: how many.

    Raises:
      UserError: an unknown kind, a number of devices that the mesh, the batch or the slices do not allow, or any other
        setting that cannot be satisfied; jax has started with fewer CPU devices.
      NoRoomError: the TPU's compiler finds no room.
    """
    return forecast_on(config, make_target(device_kind(device), devices))


def forecast_on(config: Experiment, target: Target) -> Forecast:
    """`forecast` for a target that is there already."""
    run, notes = designed(config, target)
    kind = target.kind
    plan, exchanged = _compile(run, target)
    if target.topology is None:
        notes.append(_UPPER_BOUND)
        if kind.tpu:
            notes.append("`pip install 'lmobj[tpu]'` (libtpu) gives the TPU compiler's own figures, without a TPU.")
    needed = model_flops(run)
    counted = None
    try:
        counted = step_flops(run, plan.compiled.as_text() or "")
    except UserError as error:
        notes.append(f"Matrix products are not counted, and the estimate takes the model's FLOPs: {error}")
    accumulate = config.train.accumulate
    traffic = memory_traffic(
        weights=plan.parameters,
        optimizer=plan.optimizer,
        multiplied=multiplied_bytes(run),
        temporary=plan.temporary,
        accumulate=accumulate,
    )
    return Forecast(
        device=kind.name,
        devices=run.mesh.size,
        mesh=dict(run.mesh.shape),
        remat=getattr(run.config.model, "remat", None),
        accumulate=accumulate,
        parameters=run.parameter_count,
        tokens_per_step=run.tokens_per_step,
        memory=Memory(plan.parameters, plan.optimizer, plan.temporary, plan.other, kind.memory),
        model_flops=needed,
        counted_flops=counted,
        collectives=exchanged,
        roofline=roofline(
            kind, flops=(needed if counted is None else counted) / run.mesh.size, traffic=traffic, exchanged=exchanged
        ),
        compiler=target.compiler,
        compile_seconds=plan.compile_seconds,
        replicated=run.replicated,
        notes=tuple(notes),
        peak_flops=kind.peak_flops,
    )


def designed(config: Experiment, target: Target) -> tuple[Design, list[str]]:
    """The design of a config on a target's devices, and what was changed so that it can be compiled for them."""
    notes: list[str] = []
    backend = getattr(config.model, "attention_backend", "xla")
    if backend == "cudnn" or (backend != "xla" and target.topology is None):
        config = _with_model(config, attention_backend="xla")
        notes.append(
            f"Attention is compiled as xla, for want of {backend} here: its [length, length] logits are in the memory."
        )
    with _untold_sharding():
        mesh = sharding.make_mesh(config.train.mesh, target.devices)
        if mesh.size != len(target.devices):
            sizes = ", ".join(f"train.mesh.{axis}={size}" for axis, size in mesh.shape.items())
            raise UserError(
                f"--devices is {len(target.devices)}, and {sizes} uses {mesh.size}; accepted: sizes that multiply to "
                "all of them, with -1 for what is left."
            )
        run = design(config, planned_vocabulary(config.data.tokenizer), mesh=mesh)
    return run, [*notes, *cut_heads(run)]


def cut_heads(run: Design) -> list[str]:
    """A line for each count of heads that the mesh does not divide, so that it cuts through heads."""
    ways = sharding.ways(run.mesh, run.rules, "heads")
    counts = {name: getattr(run.config.model, name, None) for name in ("heads", "kv_heads")}
    return [
        f"model.{name} is {count}, which {' x '.join(run.rules['heads'])} = {ways} does not divide: heads are cut in "
        "pieces, and devices exchange more."
        for name, count in counts.items()
        if count and count % ways
    ]


def _with_model(config: Any, **changes: Any) -> Any:
    """A config with other settings of its model."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))


def multiplied_bytes(run: Design) -> int:
    """Bytes of the weights that a device multiplies with, in the model's dtype: those that `embed`'s axes share out
    are gathered first."""
    gathered = set(run.rules["embed"])
    width = jax.numpy.dtype(getattr(run.config.model, "dtype", "float32")).itemsize

    def ways(spec: Any) -> int:
        axes = (axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry))
        return math.prod(run.mesh.shape[axis] for axis in axes if axis not in gathered)

    leaves = jax.tree.leaves(run.abstract_params)
    return sum(leaf.size // ways(leaf.sharding.spec) * width for leaf in leaves)


# --- compiling ----------------------------------------------------------------------------------------------------


def _compile(run: Design, target: Target) -> tuple[Plan, tuple[Collective, ...]]:
    """The compiled step, and what its devices exchange."""
    domain = target.kind.domain
    if target.topology is not None:
        try:
            with _uncached():
                plan = make_plan(run)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise NoRoomError(_no_room(run, target.kind, str(error))) from error
        return plan, collectives(plan.compiled.as_text() or "", domain=domain)
    if run.mesh.size == 1:
        return make_plan(run), ()
    with tempfile.TemporaryDirectory() as folder, _uncached():
        options = {"xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
        plan = make_plan(run, options)
        (partitioned,) = pathlib.Path(folder).glob("*.after_spmd-partitioning.*.txt")
        return plan, collectives(partitioned.read_text(), domain=domain, partitioned=True)


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """Compiles anew. A program out of jax's cache on disk would leave no trace of its partitioning, and one for devices
    that are not there cannot be read back."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _untold_sharding() -> Iterator[None]:
    """No warnings about what stays whole: it is among what is returned."""
    before = sharding.logger.level
    sharding.logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        sharding.logger.setLevel(before)


def _no_room(run: Design, kind: DeviceKind, complaint: str) -> str:
    """What the compiler says, beside what is known without it."""
    used = re.search(r"Used ([\d.]+[KMGT]) of ([\d.]+[KMGT]) hbm", complaint)
    used = used or re.search(r"\(([\d.]+[KMGT])\) exceeds available HBM \(([\d.]+[KMGT])\)", complaint)
    asked = f"{used[1]} of {used[2]}" if used else "more than there is"
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.abstract_state)) / run.mesh.size
    return (
        f"The training step does not fit on {run.mesh.size} x {kind.name}: the TPU's compiler needs {asked} on each, "
        f"and the state of training alone is {in_bytes(state)} if it is shared out evenly. What takes less: a "
        "larger train.mesh.fsdp, a larger train.accumulate, or another model.remat; --search tries them."
    )
