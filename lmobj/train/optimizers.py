"""Optimizers: settings, and the optax transformation that each describes.

Every optimizer is a chain: clip the gradient by its global norm, the rule itself, weight decay, learning rate.
Weight decay is decoupled and multiplied by the learning rate, p <- p - lr * (update + weight_decay * p), except for
`sgd`, where it is added to the gradient as in PyTorch. It touches only parameters of logical rank >= 2 that are not
called a bias or a scale.

Layers are stacked along a leading axis that the logical names do not count, so a rule that looks at a whole tensor
(LAMB's trust ratio, Adafactor's factors and norms, Muon's orthogonalisation) is applied to each layer by itself, and
stacked training equals unstacked training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib
from pydantic import Field

from lmobj.errors import UserError
from lmobj.train._parameters import Describe, Parameter, decay_mask, describer, map_described, per_layer
from lmobj.train.schedules import CosineSchedule, InverseSqrtSchedule, LinearSchedule, Schedule, ScheduleFn

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "BertAdam",
    "Lamb",
    "Lion",
    "Muon",
    "Optimizer",
    "decay_mask",
    "laid_out",
    "make_optimizer",
    "per_layer",
]

_CONFIG = {"extra": "forbid", "use_attribute_docstrings": True}


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2; decay times lr, as in PyTorch)."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["adamw"] = "adamw"
    """Adam with decoupled weight decay."""
    schedule: Schedule = CosineSchedule(peak=1e-3, warmup_fraction=0.05)  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; null: no clipping."""
    b1: float = 0.9
    """Decay of the first moment, [0, 1)."""
    b2: float = 0.999
    """Decay of the second moment, [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the second moment, > 0."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class BertAdam:
    """BERT's and ELECTRA's Adam, m / (sqrt(v) + eps) WITHOUT bias correction (google-research/bert optimization.py)."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["bert_adam"] = "bert_adam"
    """Adam without bias correction."""
    schedule: Schedule = LinearSchedule(peak=1e-4, warmup_fraction=0.01, warmup="replace")  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; null: no clipping."""
    b1: float = 0.9
    """Decay of the first moment, [0, 1)."""
    b2: float = 0.999
    """Decay of the second moment, [0, 1)."""
    eps: float = 1e-6
    """Added to the root of the second moment, > 0."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Lamb:
    """LAMB (You et al. 2020, algorithm 2): Adam's step, scaled per tensor to the norm of the parameter.

    The authors' code leaves biases and norm parameters out of the scaling; `adapt_vectors` puts them in, as the paper
    writes it. Bias correction follows the paper (their code has none).
    """

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["lamb"] = "lamb"
    """Layer-wise adaptive Adam, for large batches."""
    schedule: Schedule = LinearSchedule(peak=1e-3, warmup_fraction=0.05)  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.01
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; null: no clipping."""
    b1: float = 0.9
    """Decay of the first moment, [0, 1)."""
    b2: float = 0.999
    """Decay of the second moment, [0, 1)."""
    eps: float = 1e-6
    """Added to the root of the second moment, > 0."""
    adapt_vectors: bool = False
    """Scale biases and norm parameters by their trust ratio as well."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent, m <- momentum * m + g, with `weight_decay * p` added to the gradient (PyTorch's)."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["sgd"] = "sgd"
    """Stochastic gradient descent."""
    schedule: Schedule = CosineSchedule(peak=0.1, warmup_fraction=0.05)  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.0
    """L2 penalty, added to the gradient, >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; null: no clipping."""
    momentum: float = 0.9
    """Momentum, [0, 1); 0 keeps no state."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (Shazeer and Stern 2018, algorithm 4): factored second moments, update clipping, relative step size.

    The learning rate is relative: it multiplies max(1e-3, RMS of the parameter) unless `relative` is off. Weight
    decay is times the learning rate (optax's own `adafactor` leaves it out).
    """

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["adafactor"] = "adafactor"
    """Factored second moments: memory of one row and one column per matrix."""
    schedule: Schedule = InverseSqrtSchedule(peak=0.01, timescale=10_000)  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.0
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = None
    """Largest global norm of the gradient, > 0; null: no clipping."""
    decay_rate: float = 0.8
    """c of the second moment's decay 1 - t^-c, (0, 1]."""
    clip_threshold: float = 1.0
    """Largest root mean square of one tensor's update, >= 1."""
    momentum: float = 0.0
    """Decay of the first moment, [0, 1); 0 keeps none, which saves its memory."""
    relative: bool = True
    """Multiply the step by the parameter's root mean square."""
    min_factored_size: int = 128
    """Matrices with a smaller second-largest dimension keep whole second moments, >= 1."""

    def __post_init__(self) -> None:
        _check(self)
        if not 0.0 < self.decay_rate <= 1.0:
            raise UserError(f"adafactor: decay_rate is {self.decay_rate}; accepted: above 0, at most 1.")
        if not self.clip_threshold >= 1.0:
            raise UserError(f"adafactor: clip_threshold is {self.clip_threshold}; accepted: 1 or more.")
        if self.min_factored_size < 1:
            raise UserError(f"adafactor: min_factored_size is {self.min_factored_size}; accepted: 1 or more.")


@dataclass(frozen=True)
class Lion:
    """Lion (Chen et al. 2023, algorithm 2): the sign of an interpolated momentum."""

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["lion"] = "lion"
    """Sign of the momentum; takes a learning rate 3 to 10 times smaller than AdamW's."""
    schedule: Schedule = CosineSchedule(peak=1e-4, warmup_fraction=0.05)  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; null: no clipping."""
    b1: float = 0.9
    """Weight of the momentum in the step, [0, 1)."""
    b2: float = 0.99
    """Decay of the momentum, [0, 1)."""

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class Muon:
    """Muon (Jordan et al. 2024): orthogonalised momentum for the matrices of hidden layers, AdamW for all the rest.

    The rest is embeddings and output tables (logical axes `vocab` or `positions`), vectors, and parameters without
    logical names. With `consistent_rms` = 0.2 (Liu et al. 2025, eq. 4) one learning rate suits both parts; null gives
    Jordan's scale sqrt(max(1, out / in)), which wants a learning rate near 0.02 and `adam_ratio` near 0.015.
    """

    __pydantic_config__: ClassVar[Any] = _CONFIG

    name: Literal["muon"] = "muon"
    """Orthogonalised momentum for hidden matrices, AdamW for the rest."""
    schedule: Schedule = CosineSchedule(peak=1e-3, warmup_fraction=0.05)  # noqa: RUF009 (frozen)
    """Learning rate over steps."""
    weight_decay: float = 0.1
    """Decoupled weight decay, >= 0."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient, > 0; null: no clipping."""
    momentum: float = 0.95
    """Decay of the momentum of the matrices, [0, 1)."""
    nesterov: bool = True
    """Nesterov's form of the momentum."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations, >= 1."""
    consistent_rms: float | None = 0.2
    """Root mean square that the matrices' updates are scaled to, > 0; null: Jordan's scale."""
    adam_ratio: float = 1.0
    """Learning rate of AdamW's part over that of the matrices, > 0."""
    b1: float = 0.9
    """AdamW's decay of the first moment, [0, 1)."""
    b2: float = 0.95
    """AdamW's decay of the second moment, [0, 1)."""
    eps: float = 1e-8
    """AdamW's addition to the root of the second moment, > 0."""

    def __post_init__(self) -> None:
        _check(self)
        if self.newton_schulz_steps < 1:
            raise UserError(f"muon: newton_schulz_steps is {self.newton_schulz_steps}; accepted: 1 or more.")
        for key in ("consistent_rms", "adam_ratio"):
            value = getattr(self, key)
            if value is not None and not value > 0.0:
                raise UserError(f"muon: {key} is {value}; accepted: above 0.")


Optimizer = Annotated[
    AdamW | BertAdam | Lamb | SGD | Adafactor | Lion | Muon,
    Field(discriminator="name"),
]
"""Any optimizer's settings, told apart by `name`."""


def _check(config: Any) -> None:
    """Range checks of the fields that several optimizers have."""
    if config.schedule.peak < 0.0:
        raise UserError(f"{config.name}: schedule.peak is {config.schedule.peak}; accepted: 0 or more.")
    if not (math.isfinite(config.weight_decay) and config.weight_decay >= 0.0):
        raise UserError(f"{config.name}: weight_decay is {config.weight_decay}; accepted: 0 or more.")
    if config.clip_norm is not None and not config.clip_norm > 0.0:
        raise UserError(f"{config.name}: clip_norm is {config.clip_norm}; accepted: above 0, or null for none.")
    for key in ("b1", "b2", "momentum"):
        if not 0.0 <= getattr(config, key, 0.0) < 1.0:
            raise UserError(f"{config.name}: {key} is {getattr(config, key)}; accepted: 0 up to but not 1.")
    if not getattr(config, "eps", 1.0) > 0.0:
        raise UserError(f"{config.name}: eps is {config.eps}; accepted: above 0.")


class _MomentsState(NamedTuple):
    mu: Any
    nu: Any


def _scale_by_uncorrected_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """m / (sqrt(v) + eps) with the moments as they are, zero-started and never corrected for it."""

    def init(params: Any) -> _MomentsState:
        return _MomentsState(jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: _MomentsState, params: Any = None) -> tuple[Any, _MomentsState]:
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, updates, state.nu)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mu, nu), _MomentsState(mu, nu)

    return optax.GradientTransformation(init, update)


def _muon_rule(config: Muon, describe: Describe) -> optax.GradientTransformation:
    """Orthogonalised momentum for hidden matrices and Adam for the rest, both before weight decay and rate."""

    def label(params: Any) -> Any:
        labels = map_described(describe(params), lambda p: "matrix" if p.is_hidden_matrix else "rest")
        if "matrix" not in jax.tree.leaves(labels):
            raise UserError(
                "train.optimizer.name is muon, and no parameter is a hidden matrix with logical axes; accepted: a "
                "model whose parameters carry `axes`, or another optimizer, such as adamw."
            )
        return labels

    def dimensions(tree: Any) -> Any:
        return map_described(describe(tree), _muon_dimensions)

    def scale(updates: Any, params: Any) -> Any:
        return jax.tree.map(
            lambda u, d: u * _muon_scale(u.shape, _muon_dimensions(d), config), updates, describe(updates)
        )

    matrices = optax.chain(
        contrib.scale_by_muon(
            ns_steps=config.newton_schulz_steps,
            beta=config.momentum,
            nesterov=config.nesterov,
            weight_dimension_numbers=dimensions,
        ),
        optax.stateless(scale),
    )
    rest = optax.chain(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), optax.scale(config.adam_ratio))
    return optax.partition({"matrix": matrices, "rest": rest}, label)


def _muon_dimensions(parameter: Parameter) -> contrib.MuonDimensionNumbers:
    """Which axes of a matrix are its input and its output; layers and experts are a batch of matrices."""
    first, names = parameter.stacked, parameter.names
    axes = tuple(range(first, first + len(names)))
    if len(names) == 2:
        return contrib.MuonDimensionNumbers(axes[:1], axes[1:])
    if len(names) > 2 and names[0] == "embed":
        return contrib.MuonDimensionNumbers(axes[:1], axes[1:])
    if len(names) > 2 and names[-1] == "embed":
        return contrib.MuonDimensionNumbers(axes[:-1], axes[-1:])
    raise UserError(
        f"train.optimizer.name is muon, and the parameter {'/'.join(map(str, parameter.path))} with logical axes "
        f"{parameter.names} is no matrix; accepted: two axes, or more with `embed` as the first or the last."
    )


def _muon_scale(shape: tuple[int, ...], axes: contrib.MuonDimensionNumbers, config: Muon) -> float:
    """What an orthogonal update of these dimensions is multiplied by."""
    fan_in = math.prod(shape[axis] for axis in axes.reduction_axis)
    fan_out = math.prod(shape[axis] for axis in axes.output_axis)
    if config.consistent_rms is None:
        return math.sqrt(max(1.0, fan_out / fan_in))
    return config.consistent_rms * math.sqrt(max(fan_in, fan_out))


def make_optimizer(
    config: Optimizer, schedule_fn: ScheduleFn, *, logical_axes: Mapping[str, Any]
) -> optax.GradientTransformation:
    """The optax transformation that `config` describes; its updates are added to the parameters.

    Args:
      config: one of this module's settings.
      schedule_fn: number of finished updates -> learning rate (`make_schedule(config.schedule, total_steps)`).
      logical_axes: nested dicts like the parameters, with a tuple of logical names for each (`sharding.logical_axes`).

    Returns:
      A transformation whose state holds arrays like the parameters at the parameters' own paths, so that it is
      sharded like them.

    Raises:
      UserError: `muon` on a model without hidden matrices, or with one whose sides cannot be told apart.
    """

    def decays(params: Any) -> Any:
        return decay_mask(params, logical_axes)

    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    decay = [optax.add_decayed_weights(config.weight_decay, decays)] if config.weight_decay else []
    rate = optax.scale_by_learning_rate(schedule_fn)
    match config:
        case AdamW():
            return optax.chain(*clip, optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps), *decay, rate)
        case BertAdam():
            return optax.chain(*clip, _scale_by_uncorrected_adam(config.b1, config.b2, config.eps), *decay, rate)
        case Lamb():
            ratio = per_layer(optax.scale_by_trust_ratio(), logical_axes)
            return optax.chain(
                *clip,
                optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
                *decay,
                ratio if config.adapt_vectors else optax.masked(ratio, decays),
                rate,
            )
        case SGD():
            momentum = [optax.trace(config.momentum, nesterov=config.nesterov)] if config.momentum else []
            return optax.chain(*clip, *decay, *momentum, rate)
        case Adafactor():
            return optax.chain(*clip, *_adafactor_rule(config, schedule_fn, logical_axes, decays))
        case Lion():
            return optax.chain(*clip, optax.scale_by_lion(b1=config.b1, b2=config.b2), *decay, rate)
        case Muon():
            return optax.chain(*clip, _muon_rule(config, describer(logical_axes)), *decay, rate)
    raise TypeError(f"not an optimizer: {config!r}")


def laid_out(optimizer: optax.GradientTransformation, shardings: Any) -> optax.GradientTransformation:
    """The optimizer with its work laid out over devices by `shardings`, a tree like the parameters.

    Gradients and parameters that come in are cut so, which turns the sum of gradients over replicas into one where each
    device gets its part alone (reduce-scatter).
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, params = (jax.lax.with_sharding_constraint(x, shardings) for x in (updates, params))
        return optimizer.update(updates, state, params)

    return optax.GradientTransformation(optimizer.init, update)


def _adafactor_rule(
    config: Adafactor, schedule_fn: ScheduleFn, logical_axes: Mapping[str, Any], decays: Callable[[Any], Any]
) -> list[optax.GradientTransformation]:
    """Adafactor's chain; the momentum is over steps already scaled by the learning rate, as the authors have it."""
    tensor = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.decay_rate, min_dim_size_to_factor=config.min_factored_size, epsilon=1e-30
        ),
        optax.clip_by_block_rms(config.clip_threshold),
        optax.scale_by_param_block_rms() if config.relative else optax.identity(),
    )
    rule = [per_layer(tensor, logical_axes), optax.scale_by_learning_rate(schedule_fn, flip_sign=False)]
    if config.momentum:
        rule.append(optax.ema(config.momentum, debias=False))
    if config.weight_decay:
        rule.append(optax.add_decayed_weights(lambda step: config.weight_decay * schedule_fn(step), decays))
    return [*rule, optax.scale(-1.0)]
