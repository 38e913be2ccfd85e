"""What a step takes on devices that are not there, against shapes and arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import typing
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny_runs import experiment

from lmobj.errors import UserError
from lmobj.models import DecoderConfig
from lmobj.train import forecast as room
from lmobj.train.collectives import Collective, collectives
from lmobj.train.devices import DEVICE_KINDS, device_kind, known_kind
from lmobj.train.flops import model_flops
from lmobj.train.forecast import Forecast, designed, forecast
from lmobj.train.plan import make_plan
from lmobj.train.roofline import memory_traffic, roofline
from lmobj.train.sharding import MeshConfig, make_mesh
from lmobj.train.targets import make_target, topology

_ROOT = pathlib.Path(__file__).parent.parent.parent
WIDTH, LAYERS, ROWS, LENGTH, PIECES, TABLE, POSITIONS = 16, 2, 8, 16, 320, 384, 32
"""Of `tiny_runs.experiment`; the table of the pieces is padded to a multiple of 128."""


def tiny(**mesh: int) -> Any:
    """The tiny decoder, with nothing recomputed."""
    model = {"remat": "none"}
    return experiment(pathlib.Path("unread.txt"), "unwritten", model=model, train={"mesh": MeshConfig(**mesh)})


# --- exchange in compiled programs --------------------------------------------------------------------------------


def exchanged(function: Any, mesh: jax.sharding.Mesh, shapes: list[tuple[tuple[int, ...], Any]], out: Any) -> Any:
    """What a function of float32 arrays, laid out so, exchanges; {kind: (count, payload)}."""
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, spec in shapes
    ]
    sharding = jax.sharding.NamedSharding(mesh, out)
    text = jax.jit(function, out_shardings=sharding).lower(*arrays).compile().as_text()
    return {found.kind: (found.count, found.payload) for found in collectives(text or "")}


def test_a_shared_kernel_is_gathered_and_nothing_else() -> None:
    mesh, P = make_mesh(MeshConfig(data=1, fsdp=8)), jax.sharding.PartitionSpec
    rows, kernel = ((64, 32), P("fsdp", None)), ((32, 48), P("fsdp", None))
    assert exchanged(jnp.matmul, mesh, [rows, kernel], P("fsdp", None)) == {"all-gather": (1, 4 * 32 * 48)}

    # Five layers in a loop, each gathered as its turn comes.
    def layers(x: Any, kernels: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, kernels)[0]

    stack = ((5, 32, 32), P(None, "fsdp", None))
    assert exchanged(layers, mesh, [rows, stack], P("fsdp", None)) == {"all-gather": (5, 5 * 4 * 32 * 32)}


def test_sums_over_devices_are_reduced() -> None:
    mesh, P = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2)), jax.sharding.PartitionSpec
    # Partial products of a contracted axis that two devices share; 16 rows on each of the four.
    split = [((64, 32), P("data", "tensor")), ((32, 48), P("tensor", None))]
    assert exchanged(jnp.matmul, mesh, split, P("data", None)) == {"all-reduce": (1, 4 * 16 * 48)}
    # Moved from rows to columns: each device's eighth of 8 rows is split among all.
    mesh = make_mesh(MeshConfig(data=8))
    turned = exchanged(lambda x: x * 2, mesh, [((64, 32), P("data", None))], P(None, "data"))
    assert turned == {"all-to-all": (1, 4 * 8 * 32)}


# --- roofline -----------------------------------------------------------------------------------------------------


def test_the_roofline_is_arithmetic() -> None:
    h100 = device_kind("h100")
    sent = [
        Collective("all-gather", False, 3, 0, 45e9),
        Collective("all-reduce", False, 3, 0, 45e9),
        Collective("all-reduce", True, 1, 0, 10e9),
    ]
    times = roofline(h100, flops=98.9e12, traffic=335e9, exchanged=sent)
    # 98.9 of 989 TFLOP/s; 335 of 3,350 GB/s; 90 of 450 GB/s by NVLink and 10 of 50 GB/s by the network.
    assert (times.compute, times.memory) == pytest.approx((0.1, 0.1))
    assert times.communication == pytest.approx(0.4)
    assert (times.bound, times.step) == ("communication", times.communication)
    alone = roofline(h100, flops=98.9e12, traffic=1.0, exchanged=())
    assert (alone.bound, alone.step, alone.communication) == ("compute", pytest.approx(0.1), 0.0)


def test_memory_traffic_by_hand() -> None:
    # Weights of 10 and a state of 20, read and written: 60. Each of three microbatches: 40 + 10 + 100, twice.
    assert memory_traffic(weights=10, optimizer=20, multiplied=40, temporary=100, accumulate=3) == 60 + 3 * 300


def test_names_of_devices() -> None:
    assert device_kind("Trillium") is device_kind("v6e")
    assert known_kind("TPU v6 lite") is device_kind("trillium")
    assert known_kind("NVIDIA H100 PCIe") is device_kind("h100-pcie")
    names = [name for kind in DEVICE_KINDS for name in (kind.name, *kind.aliases)]
    assert len(set(names)) == len(names)
    with pytest.raises(UserError, match=r"--device-kind is 'h99'; accepted: h100, .*trillium"):
        device_kind("h99")


# --- devices to compile for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "count", "name"),
    [
        ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 8, "v5p:2x2x2"),
        ("v5p", 64, "v5p:4x4x4"),
        ("v5p", 256, "v5p:4x8x8"),
        ("v5p", 768, "v5p:8x8x12"),
        ("v5e", 8, "v5e:2x4"),
        ("trillium", 256, "v6e:16x16"),
    ],
)
def test_slices(kind: str, count: int, name: str) -> None:
    assert topology(device_kind(kind), count) == name


@pytest.mark.parametrize(("kind", "count", "near"), [("v5e", 512, "256"), ("v5p", 6, "8"), ("v5e", 24, "16, 32")])
def test_numbers_of_chips_without_a_slice(kind: str, count: int, near: str) -> None:
    with pytest.raises(UserError, match=f"--devices is {count} and --device-kind {kind}.*accepted: .*{near}"):
        topology(device_kind(kind), count)


def test_numbers_of_devices_that_cannot_be() -> None:
    with pytest.raises(UserError, match="--devices is 0; accepted: 1 or more"):
        make_target(device_kind("h100"), 0)
    with pytest.raises(UserError, match="--devices is 64, and jax has started with 8 CPU devices"):
        make_target(device_kind("h100"), 64)


# --- forecasts ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told() -> Forecast:
    """The tiny decoder shared by eight."""
    return forecast(tiny(data=1, fsdp=8), "h100", 8)


def test_memory_is_that_of_shapes(told: Forecast) -> None:
    layer = 4 * WIDTH * WIDTH + 2 * 4 * WIDTH * WIDTH
    matrices = (TABLE + POSITIONS) * WIDTH + LAYERS * layer
    # Of each layer: biases of 4 attention products, 4 * WIDTH and WIDTH of the feed-forward part, two norms.
    vectors = LAYERS * (4 + 4 + 1 + 4) * WIDTH + 2 * WIDTH
    assert told.parameters == matrices + vectors
    # Each matrix has an axis of the model's width, which all eight divide; a vector is shared or whole.
    assert 4 * matrices / 8 < told.memory.weights <= 4 * (matrices / 8 + vectors)
    assert told.memory.optimizer == pytest.approx(2 * told.memory.weights, abs=16)
    assert told.memory.peak == sum(
        getattr(told.memory, part) for part in ("weights", "optimizer", "temporary", "other")
    )
    assert told.fits


def test_operations_are_those_of_shapes(told: Forecast) -> None:
    tokens = ROWS * LENGTH
    weights = LAYERS * 12 * WIDTH * WIDTH + TABLE * WIDTH
    attention = LAYERS * 4 * LENGTH * WIDTH
    # What runs is all of attention; what is needed is half of it, and 6 for every weight in a product, of the table
    # those of real pieces.
    # The loss takes a table shared by eight in several blocks, and computes their logits once more backwards.
    assert told.counted_flops == (3 * (2 * weights + attention) + 2 * TABLE * WIDTH) * tokens
    needed = 6 * (LAYERS * 12 * WIDTH * WIDTH + PIECES * WIDTH) + 3 * attention / 2
    assert told.model_flops == needed * tokens
    assert told.mfu == pytest.approx(told.model_flops / (8 * 989e12) / told.roofline.step)
    assert told.tokens_per_second == pytest.approx(tokens / told.roofline.step)


def test_shared_weights_are_gathered_and_their_gradients_scattered(told: Forecast) -> None:
    by_kind = {found.kind: found for found in told.collectives}
    # Twice, forwards and backwards, each layer's matrices, and once the numbers of tokens and positions, which each
    # device looks up in its part of the tables' width; the vectors change places. The output's table is used where it
    # lies. Gradients of the matrices, once. Figures and computation are float32.
    kernels = LAYERS * 12 * WIDTH * WIDTH
    assert by_kind["all-gather"].payload == 4 * (2 * kernels + 2 * ROWS * LENGTH)
    assert by_kind["reduce-scatter"].payload == pytest.approx(4 * kernels, rel=0.1)
    assert by_kind["all-to-all"].count >= 2
    assert not any(found.across for found in told.collectives)


@pytest.mark.slow
def test_replicas_reduce_their_gradients_once() -> None:
    config = tiny(data=8)
    make_plan(designed(config, make_target(device_kind("h100"), 8))[0])  # jax's cache on disk has this program now
    found = {part.kind: part for part in forecast(config, "h100", 8).collectives}
    assert jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    parameters = (TABLE + POSITIONS) * WIDTH + LAYERS * (12 + 13 / WIDTH) * WIDTH * WIDTH + 2 * WIDTH
    assert set(found) == {"all-reduce"}
    # The table's gradient comes from two sides, as input and as output.
    assert found["all-reduce"].payload == pytest.approx(4 * (parameters + TABLE * WIDTH), rel=0.1)


def test_untied_tables_and_bidirectional_attention_count_as_they_should() -> None:
    mesh = make_mesh(MeshConfig(data=8))
    target = dataclasses.replace(make_target(device_kind("h100"), 8), devices=tuple(mesh.devices.flat))
    untied = tiny(data=8)
    untied = dataclasses.replace(untied, model=dataclasses.replace(untied.model, tie_embeddings=False))
    tied, apart = (model_flops(designed(config, target)[0]) for config in (tiny(data=8), untied))
    assert apart == tied, "a table that is only looked up multiplies nothing"
    masked = experiment(pathlib.Path("unread.txt"), "unwritten", "masked_lm", train={"mesh": MeshConfig(data=8)})
    # All of attention; and of 16 tokens round(0.15 * 16) = 2 are predicted, by a dense layer and the pieces' table.
    each = 2 * LAYERS * 12 * WIDTH * WIDTH + 4 * LAYERS * LENGTH * WIDTH
    head = 2 * (WIDTH * WIDTH + WIDTH * PIECES)
    assert model_flops(designed(masked, target)[0]) == 3 * ROWS * (LENGTH * each + 2 * head)


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        ({"data": 3}, 8, "does not divide the 8 devices"),
        ({"data": 2, "fsdp": 2}, 8, "--devices is 8, and .* uses 4; accepted: sizes that multiply to all"),
        ({"data": 8, "fsdp": -1}, 8, None),
        ({"data": -1}, 6, "train.batch_size is 8, which does not split"),
    ],
)
def test_meshes_that_do_not_fit(mesh: dict[str, int], devices: int, message: str | None) -> None:
    target = make_target(device_kind("h100"), devices)
    if message is None:
        assert designed(tiny(**mesh), target)[0].mesh.size == devices
    else:
        with pytest.raises(UserError, match=message):
            designed(tiny(**mesh), target)


def test_what_is_not_divided_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny(data=1, tensor=8)
    assert isinstance(config.model, DecoderConfig)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, heads=2, mlp_width=60))
    run, notes = designed(config, make_target(device_kind("h100"), 8))
    assert [line for line in run.replicated if "mlp" in line and "tensor = 8 does not divide it" in line]
    assert "model.heads is 2, which tensor = 8 does not divide" in notes[0]
    assert not caplog.records, "it is told once"


def test_flash_attention_that_cannot_be_compiled_here_is_told() -> None:
    config = tiny(data=8)
    plain = {"attention_dropout": 0.0, "dtype": "bfloat16", "attention_backend": "cudnn"}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **plain))
    run, notes = designed(config, make_target(device_kind("h100"), 8))
    assert run.config.model.attention_backend == "xla"  # type: ignore[attr-defined]
    assert "for want of cudnn" in notes[0]


def test_the_way_to_the_tpus_own_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmobj.train.targets._has_libtpu", lambda: False)
    told = forecast(tiny(), "v5p", 1)
    assert told.compiler == "CPU"
    assert told.collectives == (), "one device has nobody to talk to"
    assert told.roofline.communication == 0
    assert any("pip install 'lmobj[tpu]'" in note for note in told.notes)


@pytest.mark.slow
def test_the_tpus_own_compiler_counts_the_same() -> None:
    pytest.importorskip("libtpu")
    told, here = (forecast(tiny(data=1, fsdp=8), kind, 8) for kind in ("v5e", "h100"))
    assert (told.compiler, here.compiler) == ("TPU (v5e:2x4)", "CPU")
    assert told.counted_flops == here.counted_flops
    assert (told.memory.weights, told.memory.optimizer) == (here.memory.weights, here.memory.optimizer)
    assert told.collectives
    assert not told.notes


def test_a_tpu_without_room_says_how_much_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    target = dataclasses.replace(make_target(device_kind("v5e"), 8), topology="v5e:2x4")

    def complain(run: Any) -> None:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (118.15G) "
            "exceeds available HBM (15.75G)."
        )

    monkeypatch.setattr(room, "make_plan", complain)
    with pytest.raises(UserError, match=r"does not fit on 8 x v5e: the TPU's compiler needs 118.15G of 15.75G on each"):
        room.forecast_on(tiny(data=8), target)


@pytest.mark.slow
def test_eight_billion_parameters_on_256_devices() -> None:
    def plan(*overrides: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "lmobj", "plan", "configs/pretrain/decoder_8b.yaml"]
        options = ["--devices", "256", "--device-kind", "v5p", "--json", "train.accumulate=2", *overrides]
        env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}  # which asks for 8 devices
        done = subprocess.run([*command, *options], cwd=_ROOT, check=True, capture_output=True, text=True, env=env)
        return typing.cast(dict[str, Any], json.loads(done.stdout))

    told, half = plan(), plan("model.layers=16")
    assert told["mesh"]["fsdp"] == told["devices"] == 256
    # Llama 3 8B: width 4,096, of which keys and values have a quarter; three matrices of 14,336; two tables.
    width, layers, length, vocabulary = 4096, 32, 8192, 128256
    layer = 2 * width * width + 2 * width * width // 4 + 3 * width * 14336
    parameters = layers * layer + 2 * vocabulary * width  # norms: 0.003%
    assert told["parameters"] == pytest.approx(parameters, rel=1e-3)
    # Weights in float32 and Adam's two moments, an even share for each device.
    assert told["memory"]["weights"] == pytest.approx(4 * parameters / 256, rel=0.1)
    assert told["memory"]["optimizer"] == pytest.approx(8 * parameters / 256, rel=0.1)
    # What each layer adds to the rest: its input, kept in bfloat16 for one row of 8,192 tokens (512 rows, 256 devices,
    # 2 microbatches); and a device's share of its gradients, of the microbatch and summed, and of its weights in
    # bfloat16, which are made before the loop. The rest, which is one layer at work, is the same at any depth.
    added = (told["memory"]["temporary"] - half["memory"]["temporary"]) / 16
    assert added == pytest.approx(2 * length * width + (4 + 4 + 2) * layer / 256, rel=0.1)
    assert told["fits"]
    # Operations that the model needs: six for each parameter that multiplies, and half of attention's.
    tokens = 512 * length
    multiplied = layers * layer + vocabulary * width
    assert told["model_flops"] == pytest.approx((6 * multiplied + 12 * layers * width * length / 2) * tokens, rel=0.1)
    # Those that run: forwards twice, backwards as much again as two of them, with all of attention; less the last
    # product of each block when it is recomputed. The head: logits twice, and two products backwards.
    block = 4 * (2 * layer + 4 * length * width) - 2 * 14336 * width
    counted = (layers * block + 8 * vocabulary * width) * tokens
    assert told["counted_flops"] == pytest.approx(counted, rel=0.01)
    # Each microbatch gathers layers forwards and backwards, and scatters their gradients; no table. All in bfloat16.
    kinds = {part["kind"]: part["payload"] for part in told["collectives"]}
    assert kinds["reduce-scatter"] == pytest.approx(2 * 2 * layers * layer, rel=0.1)
    assert kinds["all-gather"] == pytest.approx(2 * 2 * 2 * layers * layer, rel=0.1)
