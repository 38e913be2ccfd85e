"""Which mesh, recomputation and microbatches make a step fastest on given devices, among those that fit.

All settings are first judged by formulas, from shapes alone: what cannot fit is left out, and the rest is ranked by an
estimate of the step. Only the most promising are compiled, each of them corrects the formulas for what is left, and the
answer is the best of those compiled.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lmobj.errors import UserError
from lmobj.models import GATED, EncoderDecoderConfig
from lmobj.objectives import TermKind
from lmobj.train.assemble import Design, Experiment
from lmobj.train.collectives import Collective
from lmobj.train.devices import DeviceKind, device_kind
from lmobj.train.flops import model_flops
from lmobj.train.forecast import Forecast, NoRoomError, cut_heads, designed, forecast_on, multiplied_bytes
from lmobj.train.plan import shard_bytes
from lmobj.train.roofline import memory_traffic, roofline
from lmobj.train.sharding import MESH_AXES, MeshConfig, ways
from lmobj.train.targets import Target, make_target

__all__ = ["Candidate", "MeshSearchResult", "search"]

_LEFT_OUT = ("offload",)
"""Policies that are not tried: what moving activations to the host costs is not in the estimate."""


@dataclass(frozen=True)
class Candidate:
    """Settings, and what formulas say of them."""

    mesh: Mapping[str, int]
    remat: str | None
    accumulate: int
    seconds: float = 0.0
    """Of a step, by estimate."""
    state: int = 0
    """Bytes on each device that stay."""
    temporary: int = 0
    """Bytes on each device for gradients, activations and workspace, by estimate."""

    def applied(self, config: Any) -> Any:
        """The config with these settings."""
        train = dataclasses.replace(config.train, mesh=MeshConfig(**self.mesh), accumulate=self.accumulate)
        model = config.model if self.remat is None else dataclasses.replace(config.model, remat=self.remat)
        return dataclasses.replace(config, train=train, model=model)

    def overrides(self, config: Experiment) -> tuple[str, ...]:
        """What to add to the command line for them: settings that are not the config's own."""
        now = config.train
        given: dict[str, tuple[Any, Any]] = {
            f"train.mesh.{axis}": (getattr(now.mesh, axis), size) for axis, size in self.mesh.items()
        }
        given |= {
            "train.accumulate": (now.accumulate, self.accumulate),
            "model.remat": (getattr(config.model, "remat", None), self.remat),
        }
        return tuple(f"{key}={value}" for key, (before, value) in given.items() if value != before)


@dataclass(frozen=True)
class MeshSearchResult:
    """What was tried, and what was found."""

    tried: int
    """Meshes times recomputation policies."""
    refused: int
    """Of these, on meshes that some setting does not allow, that leave a dimension whole, or that cut through heads."""
    too_large: int
    """Of these, with no number of microbatches that fits by estimate."""
    compiled: int
    found: tuple[tuple[Candidate, Forecast], ...]
    """What was compiled and fits, fastest first."""


def search(
    config: Experiment,
    device: str,
    devices: int,
    *,
    compile_most: int = 6,
    progress: Callable[[str, int, int], None] = lambda doing, done, of: None,
) -> MeshSearchResult:
    """Tries all meshes of `devices` over the axes that the model and the batch are laid out by, and each recomputation
    policy of the model, with as few microbatches as fit.

    Args:
      config: the experiment; its own mesh, recomputation and microbatches do not matter.
      device: a name of `lmobj.train.devices`.
      devices: how many.
      compile_most: how many settings are compiled, at least 1.
      progress: called with what is being done, how much of it is done, and how much there is.

    Raises:
      UserError: as `forecast`.
    """
    if compile_most < 1:
        raise UserError(f"--compile is {compile_most}; accepted: 1 or more.")
    target = make_target(device_kind(device), devices)
    return _Search(config, target, compile_most, progress, forecast_on).run()


class _Search:
    """One search. `evaluate` makes the forecast of a config on a target."""

    def __init__(
        self,
        config: Experiment,
        target: Target,
        compile_most: int,
        progress: Callable[[str, int, int], None],
        evaluate: Callable[[Experiment, Target], Forecast],
    ) -> None:
        self.config, self.target, self.compile_most = config, target, compile_most
        self.progress, self.evaluate = progress, evaluate
        self.policies = _policies(config.model)
        self.refused = self.too_large = 0

    def run(self) -> MeshSearchResult:
        meshes = list(_factorisations(len(self.target.devices), self._axes()))
        open_: list[_Setting] = []
        for number, mesh in enumerate(meshes):
            self.progress("meshes", number, len(meshes))
            run = self._design(mesh)
            if run is None:
                self.refused += len(self.policies)
                continue
            settings = [_Setting(_Shapes(run), self.target.kind, policy) for policy in self.policies]
            possible = [setting for setting in settings if setting.next(1.0) is not None]
            self.too_large += len(settings) - len(possible)
            open_ += possible
        self.progress("meshes", len(meshes), len(meshes))
        found, compiled = [], 0
        scale: dict[str | None, float] = dict.fromkeys(self.policies, 1.0)
        while compiled < self.compile_most:
            choices = [(setting.next(scale[setting.remat]), setting) for setting in open_]
            fitting = [(candidate, setting) for candidate, setting in choices if candidate is not None]
            if not fitting:
                break
            candidate, setting = min(fitting, key=lambda choice: (choice[0].seconds, choice[0].temporary))
            self.progress("compiled", compiled, min(self.compile_most, compiled + len(open_)))
            compiled += 1
            setting.tried(candidate)
            try:
                forecast = self.evaluate(candidate.applied(self.config), self.target)
            except NoRoomError:  # it takes more than all that the state leaves
                takes = self.target.kind.memory - candidate.state
            except UserError:
                continue
            else:
                takes = forecast.memory.temporary
                if forecast.fits:
                    open_.remove(setting)
                    found.append((candidate, forecast))
            scale[setting.remat] *= takes / max(candidate.temporary, 1)
        self.progress("compiled", compiled, compiled)
        found.sort(key=lambda pair: (pair[1].roofline.step, pair[1].roofline.communication, pair[1].memory.peak))
        tried = len(meshes) * len(self.policies)
        return MeshSearchResult(tried, self.refused, self.too_large, compiled, tuple(found))

    def _axes(self) -> tuple[str, ...]:
        """The mesh axes that the model's parameters, the batch or its length are laid out by, and `data`."""
        alone = dataclasses.replace(self.target, devices=self.target.devices[:1])
        run, _ = designed(self._arranged(dict.fromkeys(MESH_AXES, 1), 1), alone)
        self.whole = len(run.replicated)
        used = {"data", *run.rules["length"]}
        for leaf in jax.tree.leaves(run.abstract_params):
            for entry in leaf.sharding.spec:
                used |= set((entry,) if isinstance(entry, str) else entry or ())
        return tuple(axis for axis in MESH_AXES if axis in used)

    def _arranged(self, mesh: Mapping[str, int], accumulate: int) -> Any:
        return Candidate(mesh, None, accumulate).applied(self.config)

    def _design(self, mesh: Mapping[str, int]) -> Design | None:
        """The design on a mesh; None where settings refuse it, or it leaves dimensions whole or cuts through heads."""
        try:
            run, _ = designed(self._arranged(dict.fromkeys(MESH_AXES, 1) | dict(mesh), 1), self.target)
        except UserError:
            return None
        return run if len(run.replicated) <= self.whole and not cut_heads(run) else None


def _policies(model: Any) -> tuple[str | None, ...]:
    """The recomputation policies of a model's settings; (None,) where it has none."""
    hint = typing.get_type_hints(type(model)).get("remat")
    return tuple(name for name in typing.get_args(hint) if name not in _LEFT_OUT) or (None,)


def _factorisations(count: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """All ways to write `count` as a product of one size for each axis."""
    if len(axes) == 1:
        yield {axes[0]: count}
        return
    for size in range(1, count + 1):
        if count % size == 0:
            for rest in _factorisations(count // size, axes[1:]):
                yield {axes[0]: size, **rest}


# --- estimates ----------------------------------------------------------------------------------------------------


class _Shapes:
    """What the estimates read of a design, once for all policies and microbatches."""

    def __init__(self, run: Design) -> None:
        state = run.abstract_state._asdict()
        self.run = run
        self.weights, self.optimizer = shard_bytes(state.pop("params")), shard_bytes(state.pop("opt_state"))
        self.state = self.weights + self.optimizer + shard_bytes((state, run.abstract_batch))
        self.multiplied = multiplied_bytes(run)
        self.flops = model_flops(run)
        batch, shards = run.config.train.batch_size, ways(run.mesh, run.rules, "batch")
        whole = TermKind.BATCH in run.objective.term_kinds.values()
        self.microbatches = [1] if whole else [n for n in range(1, batch + 1) if batch % (n * shards) == 0]


class _Setting:
    """A mesh and a policy, with the numbers of microbatches that have not been compiled."""

    def __init__(self, shapes: _Shapes, kind: DeviceKind, remat: str | None) -> None:
        self.shapes, self.kind, self.remat = shapes, kind, remat
        self._left = list(shapes.microbatches)

    def next(self, scale: float) -> Candidate | None:
        """The candidate with the fewest microbatches that fits by estimate, if one does.

        `scale` is what estimates of temporary memory have proven to be wrong by with this policy.
        """
        for accumulate in self._left:
            candidate = _estimate(self.shapes, self.kind, self.remat, accumulate, scale)
            if candidate.state + candidate.temporary <= self.kind.memory:
                return candidate
        return None

    def tried(self, candidate: Candidate) -> None:
        """Leaves a candidate out from now on, and those with fewer microbatches, which take more memory."""
        self._left = [accumulate for accumulate in self._left if accumulate > candidate.accumulate]


def _estimate(shapes: _Shapes, kind: DeviceKind, remat: str | None, accumulate: int, scale: float) -> Candidate:
    """What formulas say of a setting: of memory, and of the roofline's three times."""
    run, weights, multiplied = shapes.run, shapes.weights, shapes.multiplied
    model, length = run.config.model, run.config.data.length
    width, layers = getattr(model, "width", 0), _layers(run)
    tokens = run.tokens_per_step // accumulate // ways(run.mesh, run.rules, "batch", "length")
    kept, working = _activations(run, remat, tokens)
    temporary = int(scale * (weights + kept + working + 2 * multiplied / max(layers, 1)))

    # Recomputing a block is a third of its work again; recomputing all but products with weights, its attention.
    attention = 12 * layers * width * length * run.tokens_per_step
    flops = shapes.flops + (attention / 2 if run.objective.causal else 0)
    flops += {"none": 0, None: 0, "dots": attention / 3}.get(remat, flops / 3)
    exchanged = _exchanged(run, kind, remat, multiplied, weights, tokens, accumulate)
    traffic = memory_traffic(
        weights=weights,
        optimizer=shapes.optimizer,
        multiplied=multiplied,
        temporary=temporary,
        accumulate=accumulate,
    )
    times = roofline(kind, flops=flops / run.mesh.size, traffic=traffic, exchanged=exchanged)
    # Among settings with the same longest time the one that exchanges less comes first.
    seconds = times.step + 1e-3 * times.communication
    return Candidate(dict(run.mesh.shape), remat, accumulate, seconds, shapes.state, temporary)


def _activations(run: Design, remat: str | None, tokens: int) -> tuple[int, int]:
    """Bytes kept for the backward pass by all layers, and those at work in one, for `tokens` of a device.

    Per layer and token, of values in the model's dtype: a block's input, `width`; with `dots` also the results of the
    products with weights, 2 (width + kv width) + mlp + width, a second mlp with a gate; with `none` those of norms and
    activations too, 4 width + mlp, and attention's logits and probabilities, 4 + width bytes for each head and key
    (in the manner of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", sec. 4).
    """
    model = run.config.model
    width, heads = (getattr(model, name, 0) for name in ("width", "heads"))
    layers = _layers(run)
    if not (width and layers and heads):
        return 0, 0
    size = jax.numpy.dtype(getattr(model, "dtype", "float32")).itemsize
    mlp = (getattr(model, "mlp_width", None) or 4 * width) * (2 if getattr(model, "activation", "") in GATED else 1)
    keys = width * (getattr(model, "kv_heads", None) or heads) // heads
    by_heads, by_mlp = ways(run.mesh, run.rules, "heads"), ways(run.mesh, run.rules, "mlp")
    products = (width + 2 * keys) // by_heads + mlp // by_mlp + 2 * width
    rest = 4 * width + mlp // by_mlp
    logits = heads // min(by_heads, heads) * run.config.data.length * (4 + size)
    everything = tokens * (size * (width + products + rest) + logits)
    each = {"none": everything, None: everything, "dots": tokens * size * (width + products)}
    return int(layers * each.get(remat, tokens * size * width)), everything


def _exchanged(
    run: Design, kind: DeviceKind, remat: str | None, multiplied: int, weights: int, tokens: int, accumulate: int
) -> list[Collective]:
    """What devices send, by formula, for each microbatch.

    Over the axes that share out parameters: weights gathered forwards and backwards, gradients scattered. Over the rest
    of the batch's axes: a device's gradients reduced. Over `tensor`: hidden states reduced twice in each layer forwards
    and twice backwards, and twice more where a block is recomputed.
    """
    model = run.config.model
    size = jax.numpy.dtype(getattr(model, "dtype", "float32")).itemsize
    hidden = tokens * getattr(model, "width", 0) * size
    passes = 4 if remat in (None, "none", "dots") else 6
    sharing = set(run.rules["embed"])
    found = []
    for axis, members in run.mesh.shape.items():
        share = (members - 1) / members
        if axis in sharing:
            sent = 3 * multiplied * share
        elif axis in run.rules["batch"]:
            sent = 2 * weights * share
        elif axis in run.rules["length"]:  # keys and values go round
            sent = (passes - 2) * _layers(run) * hidden * (members - 1)
        else:
            sent = passes * _layers(run) * hidden * 2 * share
        across = kind.domain is not None and _span(run, axis) > kind.domain
        found.append(Collective(axis, across, accumulate, 0, accumulate * sent))
    return found


def _layers(run: Design) -> float:
    """Layers that each token goes through. A decoder's beside an encoder count by the tokens of its own rows, and by a
    third more: beside 12 width^2 weights, or about as many, they have 4 width^2 of attention over the encoder."""
    model = run.config.model
    if not isinstance(model, EncoderDecoderConfig):
        return getattr(model, "layers", 0)
    use = run.objective.use(run.config.data.length)
    uses = list(use.values()) if isinstance(use, Mapping) else [use]
    share = sum(one.decoder_length for one in uses) / sum(one.length for one in uses)
    return model.layers + 4 / 3 * (model.decoder_layers or model.layers) * share


def _span(run: Design, axis: str) -> int:
    """Consecutive devices that a group along a mesh axis reaches over."""
    axes = list(run.mesh.shape)
    return math.prod(run.mesh.shape[name] for name in axes[axes.index(axis) :])
