"""Measures that neither the device mesh nor gradient accumulation changes what is computed, with dropout on.

    python tools/measure_exactness.py            about 10 minutes on 2 cores

Meshes: the loss of each of 20 steps on 8 fake devices against one device, the largest relative difference. The
learning rate is 3e-3 after 4 steps of warm-up. Accumulation: the gradient of the first batch in 4 and 8 microbatches
against one, the largest relative distance by norm of one tensor; tensors whose norms are both rounding noise (a key
bias has no gradient) count as equal. Ends with exit code 1 if a limit is missed: losses 1e-10 in float64 and 1e-5 in
float32, gradients 1e-12 and 1e-6.
"""

from __future__ import annotations

import dataclasses
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
from lmobj.models import DecoderConfig, EncoderConfig
from lmobj.objectives import CausalLM, MaskedLM
from lmobj.train import Assembly, State, TrainConfig, assemble
from lmobj.train.optimizers import AdamW
from lmobj.train.schedules import ConstantSchedule
from lmobj.train.sharding import MeshConfig

STEPS = 20
MESHES = ((8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4))
"""(data, fsdp, tensor)."""
LOSS_LIMITS = {"float64": 1e-10, "float32": 1e-5}
GRADIENT_LIMITS = {"float64": 1e-12, "float32": 1e-6}
NOISE = {"float64": 1e-12, "float32": 1e-7}
"""Tensors with gradients under this share of the global norm are rounding noise."""

DType = Literal["float64", "float32"]


def adjusted(config: Experiment, *, dtype: DType = "float32", **train: Any) -> Experiment:
    """The experiment in another dtype and with other settings of training."""
    model = dataclasses.replace(config.model, dtype=dtype, param_dtype=dtype)
    return dataclasses.replace(config, model=model, train=dataclasses.replace(config.train, **train))


def on_mesh(config: Experiment, mesh: tuple[int, int, int], dtype: DType) -> Assembly:
    """The parts of a run on (data, fsdp, tensor) devices."""
    return assemble(adjusted(config, dtype=dtype, mesh=MeshConfig(*mesh)), quiet=True)


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
    """A decoder under the causal and an encoder under the masked objective, each on Python's documentation."""
    dropout: dict[str, Any] = {"dropout": 0.1, "attention_dropout": 0.1, "embedding_dropout": 0.1}
    sizes: dict[str, Any] = {"layers": 2, "width": 32, "heads": 4, "max_length": 32, **dropout}
    for objective, model in ((CausalLM(), DecoderConfig(**sizes)), (MaskedLM(), EncoderConfig(**sizes))):
        yield Experiment(
            name=objective.name,
            data=DataConfig(tokenizer=SentencePieceConfig(vocab_size=512), length=32),
            model=model,
            objective=objective,
            train=TrainConfig(
                steps=STEPS, batch_size=8, optimizer=AdamW(schedule=ConstantSchedule(peak=3e-3, warmup_steps=4))
            ),
        )


def unequal(config: Experiment) -> Experiment:
    """The same with a number of predictions that differs from row to row."""
    if config.objective.name == "masked_lm":
        objective = dataclasses.replace(config.objective, selection="bernoulli")
        return dataclasses.replace(config, objective=objective)
    return config


def measure_meshes(config: Experiment, dtype: DType, tell: Callable[..., None]) -> None:
    """Every mesh against one device."""
    run = on_mesh(config, (1, 1, 1), dtype)
    one, rows = curve(run, run.initial_state())
    for mesh in MESHES:
        run = on_mesh(config, mesh, dtype)
        other, read = curve(run, run.initial_state())
        jax.tree.map(np.testing.assert_array_equal, rows, read)
        tell(config.name, dtype, "data {} fsdp {} tensor {}".format(*mesh), loss_gap(one, other), LOSS_LIMITS[dtype])


def measure_accumulation(config: Experiment, dtype: DType, tell: Callable[..., None]) -> None:
    """Every number of microbatches against one."""
    run = on_mesh(unequal(config), (1, 1, 1), dtype)
    state = run.initial_state()
    whole, limit = gradient(run, state, 1), GRADIENT_LIMITS[dtype]
    for parts in (4, 8):
        gap = gradient_gap(whole, gradient(run, state, parts), noise=NOISE[dtype])
        tell(config.name, dtype, f"{parts} microbatches", gap, limit)


def main() -> int:
    """Prints one line per comparison."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    missed = 0

    def tell(objective: str, dtype: str, what: str, gap: float, limit: float) -> None:
        nonlocal missed
        missed += not gap <= limit
        print(f"{objective:<10} {dtype:<8} {what:<23} {gap:9.1e}   limit {limit:.0e}", flush=True)

    dtypes: tuple[DType, ...] = ("float64", "float32")
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"):
            for config in experiments():
                measure_meshes(config, dtype, tell)
                measure_accumulation(config, dtype, tell)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
