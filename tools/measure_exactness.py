"""Measures that neither the device mesh nor gradient accumulation changes what is computed, with dropout on.

    python tools/measure_exactness.py                    about 40 minutes on 2 cores
    python tools/measure_exactness.py --only causal_lm   experiments with these words in their names

Meshes: the loss of each of 20 steps on 8 fake devices against one device, the largest relative difference, for causal
LM, masked LM, replaced-token detection, permutation LM and a decoder with experts: in float64 every way to arrange 8
devices over data, fsdp, tensor and sequence, and for experts some with the expert axis; in float32 a few. The learning
rate is 3e-3 after 4 steps of warm-up. Accumulation: the gradient of the first batch in 4 and 8 microbatches
against one, the largest relative distance by norm of one tensor; tensors whose norms are both rounding noise (a key
bias has no gradient) count as equal. Ends with exit code 1 if a limit is missed: losses 1e-10 in float64 and 1e-5 in
float32, gradients 1e-12 and 1e-6.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

from lmobj.config import Experiment
from lmobj.data import DataConfig, SentencePieceConfig
from lmobj.models import DecoderConfig, ElectraConfig, EncoderConfig, MoEConfig, XLNetConfig
from lmobj.objectives import CausalLM, MaskedLM, PermutationLM, ReplacedTokenDetection
from lmobj.train import Assembly, State, TrainConfig, assemble
from lmobj.train.optimizers import AdamW
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig

STEPS = 20
AXES = ("data", "fsdp", "tensor", "sequence")
MESHES = tuple(
    MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if math.prod(sizes) == 8
)
"""Every way to arrange 8 devices over four axes."""
EXPERT_MESHES = (
    MeshConfig(data=1, expert=8),
    MeshConfig(data=2, expert=4),
    MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
    MeshConfig(data=1, sequence=2, expert=2, tensor=2),
)
FEW = (
    MeshConfig(data=8),
    MeshConfig(data=1, fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(data=1, fsdp=2, tensor=2, sequence=2),
)
ONE = MeshConfig(data=1)
LOSS_LIMITS = {"float64": 1e-10, "float32": 1e-5}
GRADIENT_LIMITS = {"float64": 1e-12, "float32": 1e-6}
NOISE = {"float64": 1e-12, "float32": 1e-7}
"""Tensors with gradients under this share of the global norm are rounding noise."""

DType = Literal["float64", "float32"]


def adjusted(config: Experiment, *, dtype: DType = "float32", **train: Any) -> Experiment:
    """The experiment in another dtype and with other settings of training."""
    model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train))


def on_mesh(config: Experiment, mesh: MeshConfig, dtype: DType) -> Assembly:
    """The parts of a run on a mesh."""
    return assemble(adjusted(config, dtype=dtype, mesh=mesh), quiet=True)


def curve(run: Assembly, state: State, steps: int = STEPS) -> tuple[NDArray[np.float64], list[dict[str, NDArray]]]:
    """The loss of each step from a state, which is consumed, and the rows that each step read."""
    losses, rows = [], []
    for batch in run.batches("train", steps=steps):
        state, metrics = run.train_step(state, batch)
        losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
        rows.append({name: np.asarray(batch[name]) for name in ("row_ids", "tokens")})
    return np.array(losses), rows


def loss_gap(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The largest relative difference between two curves; infinite where one is not finite."""
    return float(np.max(np.where(np.isfinite(one - other), np.abs(one - other) / np.abs(one), np.inf)))


def gradient(run: Assembly, state: State, accumulate: int) -> Any:
    """The gradient of the first batch as the training step has it, taken in `accumulate` microbatches."""

    def keep(updates: Any, old: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(jnp.zeros_like, updates), updates

    optimizer = optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), keep)
    program = dataclasses.replace(run.program, optimizer=optimizer, accumulate=accumulate)
    (batch,) = run.batches("train", steps=1)
    kept = jax.jit(program.train_step)(state._replace(opt_state=optimizer.init(state.params)), {}, batch)[0]
    return jax.device_get(kept.opt_state)


def gradient_gap(one: Any, other: Any, noise: float) -> float:
    """The largest relative distance by norm between matching tensors; infinite where one is not finite.

    Tensors of which both are under `noise` of the global norm count as equal.
    """
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    norms = [(float(np.linalg.norm(a)), float(np.linalg.norm(b)), float(np.linalg.norm(a - b))) for a, b in pairs]
    whole = float(np.sqrt(sum(a**2 for a, _, _ in norms)))
    if not np.isfinite(whole):
        return float("inf")
    gaps = [gap / max(a, b) for a, b, gap in norms if not max(a, b) <= noise * whole]
    return max(gap if np.isfinite(gap) else float("inf") for gap in gaps)


def experiments() -> Iterator[Experiment]:
    """Each system on Python's documentation, dropout on."""
    dropout: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
    sizes: dict[str, Any] = {"layers": 2, "width": 32, "heads": 8}
    decoder = DecoderConfig(**sizes, max_length=32, **dropout)
    xlnet = XLNetConfig(**sizes, memory_length=16, dropout=0.1, attention_dropout=0.1)
    pair = ElectraConfig(**sizes, generator_fraction=0.5, generator_heads=8, max_length=32, **dropout)
    systems: dict[str, tuple[Any, Any]] = {
        "causal_lm": (CausalLM(), decoder),
        "masked_lm": (MaskedLM(), EncoderConfig(**sizes, max_length=32, **dropout)),
        "replaced_token_detection": (ReplacedTokenDetection(), pair),
        "permutation_lm": (PermutationLM(reuse=8), xlnet),
        "experts": (CausalLM(), dataclasses.replace(decoder, moe=MoEConfig(experts=8))),
    }
    for name, (objective, model) in systems.items():
        yield Experiment(
            name=name,
            data=DataConfig(tokenizer=SentencePieceConfig(vocab_size=512), length=32),
            model=model,
            objective=objective,
            train=TrainConfig(
                steps=STEPS, batch_size=8, optimizer=AdamW(schedule=ConstantSchedule(peak=3e-3, warmup_steps=4))
            ),
        )


def unequal(config: Experiment) -> Experiment:
    """The same with a number of predictions that differs from row to row."""
    if isinstance(config.objective, MaskedLM):
        objective = dataclasses.replace(config.objective, selection="bernoulli")
        return dataclasses.replace(config, objective=objective)
    return config


def measure_meshes(config: Experiment, dtype: DType, tell: Callable[..., None]) -> None:
    """Every mesh against one device."""
    run = on_mesh(config, ONE, dtype)
    one, rows = curve(run, run.initial_state())
    for mesh in (*(MESHES if dtype == "float64" else FEW), *(EXPERT_MESHES if config.name == "experts" else ())):
        run = on_mesh(config, mesh, dtype)
        other, read = curve(run, run.initial_state())
        jax.tree.map(np.testing.assert_array_equal, rows, read)
        axes = " ".join(f"{axis} {size}" for axis, size in vars(mesh).items() if size > 1)
        tell(config.name, dtype, axes, loss_gap(one, other), LOSS_LIMITS[dtype])


def measure_accumulation(config: Experiment, dtype: DType, tell: Callable[..., None]) -> None:
    """Every number of microbatches against one."""
    run = on_mesh(unequal(config), ONE, dtype)
    state = run.initial_state()
    whole, limit = gradient(run, state, 1), GRADIENT_LIMITS[dtype]
    for parts in (4, 8):
        gap = gradient_gap(whole, gradient(run, state, parts), noise=NOISE[dtype])
        tell(config.name, dtype, f"{parts} microbatches", gap, limit)


def main() -> int:
    """Prints one line per comparison."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="experiments with it in their name")
    only = parser.parse_args().only
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    missed = 0

    def tell(objective: str, dtype: str, what: str, gap: float, limit: float) -> None:
        nonlocal missed
        missed += not gap <= limit
        print(f"{objective:<25} {dtype:<8} {what:<30} {gap:9.1e}   limit {limit:.0e}", flush=True)

    dtypes: tuple[DType, ...] = ("float64", "float32")
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            for config in experiments():
                if only and not any(word in config.name for word in only):
                    continue
                measure_meshes(config, dtype, tell)
                measure_accumulation(config, dtype, tell)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
