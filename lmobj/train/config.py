"""Settings of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from lmobj.errors import UserError
from lmobj.train.best import Best
from lmobj.train.ema import EMA
from lmobj.train.guard import Guard
from lmobj.train.optimizers import AdamW, Optimizer
from lmobj.train.profile import Profile
from lmobj.train.schedules import Schedule
from lmobj.train.sharding import MeshConfig
from lmobj.train.sinks import WandB

__all__ = ["TrainConfig"]

_MOST_STEPS = 2**31 - 1
"""Steps are counted in int32."""
_MOST_ROWS = 2**20
"""In a global batch: far more than anybody trains on, and few enough to be read."""


@dataclass(frozen=True)
class TrainConfig:
    """How long, on what mesh, with which optimizer, and how often to look."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "use_attribute_docstrings": True}

    seed: int = 0
    """Seed of initialisation, data order, noise and dropout."""
    steps: int = 1000
    """Global batches to train on, at least 1."""
    batch_size: int = 16
    """Rows in a global batch, over all devices and microbatches; a multiple of accumulate x data x fsdp x expert."""
    accumulate: int = 1
    """Microbatches that a global batch is taken in, to save memory; the result is that of the whole batch."""
    optimizer: Optimizer = field(default_factory=AdamW)
    """The optimizer and its learning-rate schedule."""
    layer_decay: float = 1.0
    """Factor by which each layer learns more slowly than the one above it, in (0, 1]; for fine-tuning, 0.65 to 0.95."""
    unfreeze_every: int | None = None
    """For fine-tuning: train the heads alone at first, and one layer more from the top down every so many steps, the
    embeddings last (gradual unfreezing); null: everything from the beginning."""
    stochastic_rounding: bool = False
    """With model.param_dtype bfloat16: optimizer state and updates in float32, and the new parameter rounded up or down
    at random, its expectation exact, so that small updates add up where rounding to nearest would lose them."""
    guard: Guard = field(default_factory=Guard)
    """What to do about losses and gradients that are not finite, and about loss spikes."""
    ema: EMA | None = None
    """Moving average of the weights, which evaluation, samples and generation then use; absent: none is kept."""
    coefficients: dict[str, float | Schedule] = field(default_factory=dict)
    """Weight of each of the objective's terms, a number or a schedule; the objective's own where absent."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How the devices are arranged."""
    zero: bool = False
    """Cut optimizer state and moving average over `data` as well (ZeRO stage 1): less memory, the same result."""
    sharding: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Logical axis name -> mesh axes, for the names that differ from the default table."""
    log_every: int = 10
    """Steps between lines of metrics, at least 1."""
    evaluate_every: int | None = None
    """Steps between evaluations on the validation split; absent: only at the end."""
    evaluate_batches: int | None = None
    """Batches per evaluation during training; absent: the whole split. The last evaluation always takes all of it."""
    checkpoint_every: int | None = None
    """Steps between checkpoints; absent: only at the end. A signal always saves."""
    keep: int = 2
    """Newest checkpoints kept, at least 1; the best is kept beside them."""
    best: Best = field(default_factory=Best)
    """Which checkpoint is the best, and when no better one is waited for (early stopping)."""
    profile: Profile | None = None
    """Trace a few steps for XProf into the run folder's profile/; absent: none."""
    wandb: WandB | None = None
    """Log to Weights & Biases as well; absent: do not."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "log_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}; accepted: 1 or more.")
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"train.seed is {self.seed}; accepted: a whole number of at most 64 bits, sign included.")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"train.layer_decay is {self.layer_decay}; accepted: above 0, at most 1.")
        if self.unfreeze_every is not None and self.unfreeze_every < 1:
            raise UserError(f"train.unfreeze_every is {self.unfreeze_every}; accepted: 1 or more steps, or null.")
        for name, most in (("steps", _MOST_STEPS), ("batch_size", _MOST_ROWS)):
            if getattr(self, name) > most:
                raise UserError(f"train.{name} is {getattr(self, name)}; accepted: 1 to {most}.")
        for name in ("evaluate_every", "evaluate_batches", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"train.{name} is {value}; accepted: 1 or more, or null for only at the end.")
        if self.best.patience is not None and self.evaluate_every is None:
            raise UserError(
                f"train.best.patience is {self.best.patience} and train.evaluate_every is null, so that there is one "
                "evaluation, at the end; accepted: a number of steps between evaluations, or no patience."
            )
        if self.profile is not None and self.profile.steps[1] > self.steps:
            raise UserError(
                f"train.profile.steps is {list(self.profile.steps)} and train.steps is {self.steps}; accepted: [a, b] "
                f"with 1 <= a <= b <= {self.steps}."
            )
        if self.batch_size % self.accumulate:
            raise UserError(
                f"train.accumulate is {self.accumulate}; accepted: a divisor of train.batch_size, {self.batch_size}."
            )
