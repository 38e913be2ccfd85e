"""The search for settings: what it tries, leaves out, compiles and prefers, with forecasts that are made up."""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
from tiny_runs import experiment

from lmobj import config
from lmobj.errors import UserError
from lmobj.train.devices import device_kind
from lmobj.train.forecast import Forecast, Memory, NoRoomError, designed
from lmobj.train.mesh_search import Candidate, MeshSearchResult, _Search, search
from lmobj.train.roofline import Roofline
from lmobj.train.sharding import MeshConfig
from lmobj.train.targets import Target, make_target

_DESIGNS: dict[str, Any] = {}


def _designed_once(config: Any, target: Target) -> Any:
    """`designed`: of the target it looks at devices and topology alone, which are the same in all that follows."""
    key = repr(config)
    if key not in _DESIGNS:
        _DESIGNS[key] = designed(config, target)
    return _DESIGNS[key]


@pytest.fixture(autouse=True)
def _share_designs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The searches below look at the same meshes of the same models."""
    monkeypatch.setattr(sys.modules["lmobj.train.mesh_search"], "designed", _designed_once)


def tiny(**model: Any) -> Any:
    return experiment(pathlib.Path("unread.txt"), "unwritten", model=model)


def made_up(settings: Any, target: Target, *, seconds: float = 1.0, temporary: int = 2**20) -> Forecast:
    """A forecast that takes so long, and so much memory."""
    return Forecast(
        device=target.kind.name,
        devices=8,
        mesh={axis: size for axis, size in vars(settings.train.mesh).items() if isinstance(size, int)},
        remat=getattr(settings.model, "remat", None),
        accumulate=settings.train.accumulate,
        parameters=1,
        tokens_per_step=128,
        memory=Memory(2**20, 2**21, temporary, 0, target.kind.memory),
        model_flops=1.0,
        counted_flops=None,
        collectives=(),
        roofline=Roofline(seconds, 0.0, 0.0),
        compiler="CPU",
        compile_seconds=0.0,
        replicated=(),
        notes=(),
        peak_flops=1.0,
    )


def searched(
    settings: Any, evaluate: Callable[[Any, Target], Forecast], most: int, kind: Any = None
) -> tuple[MeshSearchResult, list[Any]]:
    """The result of a search on eight devices, and the configs that it compiled."""
    target = make_target(device_kind("h100"), 8)
    target = target if kind is None else dataclasses.replace(target, kind=kind)
    seen: list[Any] = []

    def noted(changed: Any, target: Target) -> Forecast:
        seen.append(changed)
        return evaluate(changed, target)

    return _Search(settings, target, most, lambda *told: None, noted).run(), seen


def settings_of(changed: Any) -> tuple[Any, ...]:
    mesh = changed.train.mesh
    return mesh.data, mesh.fsdp, mesh.tensor, changed.model.remat, changed.train.accumulate


def test_all_meshes_and_policies_are_tried_and_the_fastest_is_first() -> None:
    def evaluate(changed: Any, target: Target) -> Forecast:
        mesh = changed.train.mesh
        fast = (mesh.data, mesh.fsdp, mesh.tensor) == (2, 4, 1) and changed.model.remat == "dots"
        return made_up(changed, target, seconds=1.0 if fast else 2.0)

    result, seen = searched(tiny(heads=8), evaluate, 1000)
    policies = {changed.model.remat for changed in seen}
    assert {"none", "dots"} < policies
    assert "offload" not in policies
    # 8 = 2^3 is a product of four factors in C(6, 3) = 20 ways. Experts are of no use to this model.
    assert result.tried == 20 * len(policies)
    assert result.compiled == len(seen) == len(set(map(settings_of, seen))) == result.tried - result.refused
    assert (result.too_large, len(result.found)) == (0, result.compiled)
    assert settings_of(seen[0])[-1] == 1, "microbatches only where they are needed"
    best, told = result.found[0]
    assert (told.roofline.step, best.mesh["data"], best.mesh["fsdp"], best.remat) == (1.0, 2, 4, "dots")


def test_meshes_that_cut_heads_or_leave_axes_whole_are_passed_over() -> None:
    result, seen = searched(tiny(heads=2), made_up, 1000)
    policies = len({changed.model.remat for changed in seen})
    # Of the 20 meshes four have 4 or 8 devices to split two heads: 4 x 2 in three ways, and 8.
    assert result.refused == 4 * policies
    assert {changed.train.mesh.tensor for changed in seen} == {1, 2}


def test_a_batch_that_does_not_split_is_refused() -> None:
    settings = tiny(heads=8)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=2))
    _, seen = searched(settings, made_up, 1000)
    assert {changed.train.mesh.data * changed.train.mesh.fsdp for changed in seen} == {1, 2}


def test_only_the_most_promising_are_compiled() -> None:
    result, seen = searched(tiny(heads=8), made_up, 2)
    assert result.compiled == len(seen) == 2
    with pytest.raises(UserError, match="--compile is 0; accepted: 1 or more"):
        search(tiny(), "h100", 8, compile_most=0)


def test_what_proves_too_large_is_tried_with_more_microbatches() -> None:
    # A GPU of 8 MiB, 3 of which the state takes; all that is kept is 16 MiB of the whole batch of a device.
    small = dataclasses.replace(device_kind("h100"), memory=8 * 2**20)

    def evaluate(changed: Any, target: Target) -> Forecast:
        return made_up(changed, target, temporary=2**24 // changed.train.accumulate)

    settings = tiny(heads=8)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=64))
    result, seen = searched(settings, evaluate, 12, small)
    assert result.found
    assert {told.accumulate for _, told in result.found} == {4}, "16 MiB / 4 and 3 are below 8, 16 MiB / 2 is not"
    assert len(seen) > len(result.found)


def test_states_that_cannot_fit_are_left_out_without_compiling() -> None:
    # 14,000 parameters in float32 with two moments are 168,000 bytes on one device, and 21,000 shared by eight.
    nothing = dataclasses.replace(device_kind("h100"), memory=10_000)
    result, seen = searched(tiny(heads=8), made_up, 1000, nothing)
    assert (result.compiled, result.found, len(seen)) == (0, (), 0)
    assert result.too_large == result.tried - result.refused
    some = dataclasses.replace(device_kind("h100"), memory=150_000)
    result, seen = searched(tiny(heads=8), made_up, 1000, some)
    assert 0 < result.too_large < result.tried - result.refused
    assert all(changed.train.mesh.fsdp * changed.train.mesh.tensor > 1 for changed in seen)


def test_errors_that_are_no_refusals_stop_the_search() -> None:
    def broken(changed: Any, target: Target) -> Forecast:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        searched(tiny(heads=8), broken, 3)

    def refused(changed: Any, target: Target) -> Forecast:
        raise UserError("no")

    result, seen = searched(tiny(heads=8), refused, 3)
    assert (result.found, result.compiled) == ((), 3)
    assert len(set(map(settings_of, seen))) == 3, "none is tried twice"


def test_a_policy_that_a_compiler_found_no_room_for_is_thought_larger() -> None:
    def cramped(changed: Any, target: Target) -> Forecast:
        if changed.model.remat == "none":
            raise NoRoomError("no")
        return made_up(changed, target)

    def refused(changed: Any, target: Target) -> Forecast:
        raise UserError("no")

    settings = tiny(heads=8)
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, batch_size=64))

    def whole_batches(evaluate: Callable[[Any, Target], Forecast]) -> int:
        _, seen = searched(settings, evaluate, 1000)
        return sum(changed.model.remat == "none" and changed.train.accumulate == 1 for changed in seen)

    # The ten meshes keep about the same, so that one of them teaches what the others take. A refusal teaches nothing.
    assert whole_batches(cramped) == 1
    assert whole_batches(refused) == 20


def test_overrides_are_what_differs_and_can_be_pasted(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: {name: decoder, remat: dots}\nobjective: {name: causal_lm}\ntrain: {batch_size: 16, accumulate: 2}\n"
    )
    plain = config.load(path)
    axes = {name: 1 for name in vars(MeshConfig()) if name != "data"}
    candidate = Candidate({"data": 4, **axes, "fsdp": 2}, "none", 1)
    overrides = candidate.overrides(plain)
    assert set(overrides) == {"train.mesh.data=4", "train.mesh.fsdp=2", "train.accumulate=1", "model.remat=none"}
    assert config.load(path, overrides) == candidate.applied(plain)


def test_a_model_without_policies_has_its_meshes_tried(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: {name: gru}\nobjective: {name: causal_lm}\ntrain: {batch_size: 16}\n")
    result, seen = searched(config.load(path), made_up, 2)
    assert result.compiled == len(seen) == 2
    assert all(candidate.remat is None for candidate, _ in result.found)
