"""AdaLoRA: LoRA in the form of a singular value decomposition, whose ranks go to where they matter most.

    y = x W + b + s ((x A) * e) B        A in R^{in x r}, e in R^r, B in R^{r x out}, e = 0 at first

Zhang et al. 2023, "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", whose P, Lambda and Q are B^T,
diag(e) and A^T (eq. 3). What is added to the loss keeps A and B near orthogonal (`orthogonality`, eq. 4); after every
update `allocate` weighs all triples (column of A, singular value, row of B) and sets the values of the least important
to zero, so that the number of those left follows a schedule (eq. 12):

    I = |w dL/dw|         I_bar <- beta1 I_bar + (1 - beta1) I         U_bar <- beta2 U_bar + (1 - beta2) |I - I_bar|
    importance of a triple = s(e_i) + mean_j s(A_ji) + mean_j s(B_ij)      s = I_bar U_bar               (eq. 7 to 11)

Order and details are those of the authors' code as it lives on in PEFT's RankAllocator: s = alpha / (r + 1e-5); norms
in the regulariser are not squared, and it is their mean over matrices where eq. 4 has squares in a sum; I is the
product of the updated weight with the gradient before the update; I_bar is updated before its distance from I is taken;
a triple whose importance equals the threshold is dropped; at step total_steps - final_steps the last allocation is
made, without another update of I_bar, and holds from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lmobj.adapt._adapted import AdaptedLinear, at_least, axes_of, positive, precise, product, replace_linears, trained
from lmobj.errors import UserError
from lmobj.models._layers import Linear, normal

__all__ = ["AdaLoRA", "AdaLoRALinear", "Allocation", "allocate", "init_allocation", "orthogonality", "rank_budget"]

Triples = dict[str, dict[str, Array]]
"""Path of an adapter -> its `lora_a` [..., in, r], `lora_e` [..., r] and `lora_b` [..., r, out]."""


@dataclass(frozen=True)
class AdaLoRA:
    """Low-rank adapters that share a budget of ranks."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: Literal["adalora"] = "adalora"
    """Low-rank adapters whose ranks are allocated in training (AdaLoRA)."""
    total_steps: int = 10_000
    """Steps of the run, which the schedule of the budget is laid out over."""
    initial_rank: int = 12
    """r of every adapter at first, above `target_rank`."""
    target_rank: int = 8
    """Mean rank of the adapters in the end, at least 1."""
    alpha: float = 16.0
    """Numerator of the scale, above 0; the initial rank is its denominator."""
    initial_steps: int = 0
    """Steps with the whole budget (PEFT's tinit)."""
    final_steps: int = 0
    """Steps at the end with the ranks as they are (tfinal)."""
    interval: int = 1
    """Steps from one allocation to the next (deltaT), at least 1."""
    beta1: float = 0.85
    """Decay of the mean of importances, in (0, 1)."""
    beta2: float = 0.85
    """Decay of the mean of their deviations, in (0, 1)."""
    orthogonality: float = 0.5
    """Coefficient of the regulariser, at least 0 (PEFT's orth_reg_weight)."""
    targets: tuple[str, ...] = ("query", "value")
    """Linear maps to adapt, by name."""

    def __post_init__(self) -> None:
        at_least(self, 1, "total_steps", "target_rank", "interval")
        at_least(self, 0, "initial_steps", "final_steps", "orthogonality")
        positive(self, "alpha")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"adapter.{name} is {getattr(self, name)}; it must be above 0 and below 1.")
        if self.initial_rank <= self.target_rank:
            raise UserError(
                f"adapter.initial_rank is {self.initial_rank} and adapter.target_rank is {self.target_rank}; it must "
                "be above that, or there is nothing to allocate: use lora."
            )
        if self.initial_steps + self.final_steps >= self.total_steps:
            raise UserError(
                f"adapter.initial_steps {self.initial_steps} and adapter.final_steps {self.final_steps} leave none of "
                f"adapter.total_steps, {self.total_steps}, to allocate ranks in; their sum must be below it."
            )

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.initial_rank + 1e-5)

    def adapt(self, model: nnx.Module, rngs: nnx.Rngs) -> None:
        """Puts the adapters into a model, in place."""
        replace_linears(model, self.targets, lambda _, linear: AdaLoRALinear(linear, self, rngs))


class AdaLoRALinear(AdaptedLinear):
    """y = x W + b + s ((x A) * e) B."""

    def __init__(self, base: Linear, config: AdaLoRA, rngs: nnx.Rngs) -> None:
        super().__init__(base)
        *stacked, into, out = self.kernel.shape
        axis_in, axis_out = axes_of(self)
        r, dtype, init = config.initial_rank, self.kernel.dtype, normal(0.02)
        self.lora_a = trained(init(rngs.params(), (*stacked, into, r), dtype), (axis_in, None))
        self.lora_e = trained(jnp.zeros((*stacked, r), dtype), (None,))
        self.lora_b = trained(init(rngs.params(), (*stacked, r, out), dtype), (None, axis_out))
        self.scale = config.scale

    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        singular = self.scale * self.lora_e[...].astype(x.dtype)
        return super().__call__(x) + product(product(x, self.lora_a) * singular, self.lora_b)

    def merged(self) -> Linear:
        """The linear map with the kernel W + s A diag(e) B."""
        kernel, a, e, b = precise(self.kernel, self.lora_a, self.lora_e, self.lora_b)
        kernel = kernel + self.scale * (a * e[..., None, :]) @ b
        return self.linear(kernel, None if self.bias is None else self.bias[...])


def orthogonality(params: Mapping[str, Any]) -> Float[Array, ""]:
    """Mean over all matrices A and B of ||A^T A - 1||_F and ||B B^T - 1||_F, to be added to the loss.

    `params` are nested dicts with the adapters' parameters among others. The gradient is 0 where a norm is.
    """
    norms = []
    for triple in _triples(params).values():
        for vectors in (triple["lora_a"], jnp.swapaxes(triple["lora_b"], -1, -2)):
            gram = jnp.einsum("...ir,...is->...rs", vectors, vectors)
            square = jnp.sum(jnp.square(gram - jnp.eye(gram.shape[-1], dtype=gram.dtype)), axis=(-2, -1))
            norms.append(jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0).reshape(-1))
    return jnp.mean(jnp.concatenate(norms))


class Allocation(NamedTuple):
    """What `allocate` carries from step to step: moving means like the triples, and which of them are kept."""

    importance: Triples
    uncertainty: Triples
    kept: dict[str, Bool[Array, "... r"]]


def init_allocation(params: Mapping[str, Any]) -> Allocation:
    """The state before the first step."""
    triples = _triples(params)
    zeros = jax.tree.map(jnp.zeros_like, triples)
    return Allocation(zeros, zeros, {path: jnp.ones(t["lora_e"].shape, bool) for path, t in triples.items()})


def allocate(
    config: AdaLoRA, params: dict[str, Any], grads: Mapping[str, Any], state: Allocation, step: Int[Array, ""] | int
) -> tuple[dict[str, Any], Allocation]:
    """Parameters with the least important singular values at zero, and the new state. To be called after each update.

    Args:
      config: the adapters' settings.
      params: the updated parameters, nested dicts with the adapters' among others.
      grads: their gradients, which the update was made of.
      state: `init_allocation(params)` before the first step.
      step: the number of the step; the schedule's is `config.total_steps`.
    """
    last = config.total_steps - config.final_steps
    step = jnp.asarray(step, jnp.int32)
    triples = _triples(params)

    def averaged(w: Array, g: Array, mean: Array, deviation: Array) -> tuple[Array, Array]:
        now = jnp.abs(w * g)
        new = config.beta1 * mean + (1 - config.beta1) * now
        spread = config.beta2 * deviation + (1 - config.beta2) * jnp.abs(now - new)
        return jnp.where(step < last, new, mean), jnp.where(step < last, spread, deviation)

    pairs = jax.tree.map(averaged, triples, _triples(grads), state.importance, state.uncertainty)
    importance, uncertainty = jax.tree.transpose(jax.tree.structure(triples), jax.tree.structure((0, 0)), pairs)

    scores = {path: _score(importance[path], uncertainty[path]) for path in triples}
    ranks = sum(score.size for score in scores.values())
    matrices = sum(score.size // score.shape[-1] for score in scores.values())
    dropped = ranks - rank_budget(config, matrices, step)
    ranked = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    threshold = ranked[jnp.maximum(dropped, 1) - 1]
    due = (step > config.initial_steps) & (step < last) & (step % config.interval == 0) | (step == last)
    kept = {
        path: jnp.where(due, (score > threshold) | (dropped == 0), state.kept[path]) for path, score in scores.items()
    }
    masked = due | (step > last)
    values = {path: jnp.where(masked & ~kept[path], 0, triples[path]["lora_e"]) for path in triples}
    return _with_values(params, values), Allocation(importance, uncertainty, kept)


def rank_budget(config: AdaLoRA, matrices: int, step: Int[Array, ""] | int) -> Int[Array, ""]:
    """How many triples of all matrices together are left at a step.

    b_0 up to the initial steps, then b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_f - t_i))^3, rounded down, and b_T in
    the final steps (eq. 12). It is counted from the steps at which it falls, which are found in Python's numbers:
    float32 would round some of them to the step before or after.
    """
    first = config.initial_rank * matrices
    return first - jnp.sum(jnp.asarray(_falls(config, matrices)) <= step)


@functools.cache
def _falls(config: AdaLoRA, matrices: int) -> np.ndarray:
    """The steps at which the budget falls by one, as often as it does."""
    first, target = config.initial_rank * matrices, config.target_rank * matrices
    start, end = config.initial_steps, config.total_steps - config.final_steps
    steps: list[int] = []
    for step in range(start + 1, end + 1):
        left = (1 - (step - start) / (end - start)) ** 3
        budget = int((first - target) * left + target)
        steps += [step] * (first - len(steps) - budget)
    return np.asarray(steps, np.int32)


def _score(importance: dict[str, Array], uncertainty: dict[str, Array]) -> Float[Array, "... r"]:
    """Importance of each triple."""
    a, e, b = (importance[name] * uncertainty[name] for name in ("lora_a", "lora_e", "lora_b"))
    return e + (jnp.mean(a, axis=-2) + jnp.mean(b, axis=-1))


def _triples(params: Mapping[str, Any]) -> Triples:
    """Every adapter's parameters by its path."""
    return dict(_found(params, ()))


def _found(params: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Array]]]:
    if "lora_e" in params:
        yield "/".join(path), {name: params[name] for name in ("lora_a", "lora_e", "lora_b")}
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _found(value, (*path, str(key)))


def _with_values(params: Mapping[str, Any], values: Mapping[str, Array], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The parameters with other singular values."""
    return {
        key: _with_values(value, values, (*path, str(key)))
        if isinstance(value, Mapping)
        else values["/".join(path)]
        if key == "lora_e"
        else value
        for key, value in params.items()
    }
