"""Checkpoints: bit-exact, on any mesh, complete or absent, and checked when they are read."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lmobj.errors import UserError
from lmobj.train import checkpoint, storage
from lmobj.train.checkpoint import Checkpoints


class Inner(NamedTuple):
    mu: Any
    nothing: Any = ()


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: Any
    params: Any
    inner: Inner
    empty: Any
    none: Any


def mesh_of(count: int) -> Mesh:
    return jax.make_mesh((count,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])


def make_state(mesh: Mesh, seed: int = 0) -> State:
    """Values that a lossy path would change: NaN payloads, negative zero, infinities, subnormals, the largest int."""
    rows, whole = NamedSharding(mesh, PartitionSpec("x")), NamedSharding(mesh, PartitionSpec())
    rng = np.random.default_rng(seed)
    wide = rng.integers(0, 2**32, (16, 8), np.uint32).view(np.float32)
    odd = np.array([np.nan, -np.nan, -0.0, np.inf, 1e-40, 3.0], np.float32)
    return State(
        step=jax.device_put(np.int32(2**31 - 1 - seed), whole),
        params={"model": {0: {"kernel": jax.device_put(wide, rows), "bias": jax.device_put(odd, whole)}}},
        inner=Inner({"model": jax.device_put(rng.normal(size=(8, 4)).astype(jnp.bfloat16), rows)}),
        empty={"a": (), "b": {}, "c": [], "rows": jax.device_put(np.zeros((0, 4), np.float32), whole)},
        none=None,
    )


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def bits(state: Any) -> dict[str, bytes]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


@pytest.fixture
def state() -> State:
    return make_state(mesh_of(8))


def fill(directory: pathlib.Path, state: Any, steps: range | list[int], **options: Any) -> None:
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, dataclasses.replace(state, step=jnp.int32(step)), metrics={"eval/loss": 1.0 / step})


def test_round_trip_is_bit_exact_and_moves_between_meshes(tmp_path: pathlib.Path) -> None:
    original = make_state(mesh_of(8))
    current = original
    for hop, count in enumerate((8, 1, 4)):
        target = make_state(mesh_of(count), seed=1)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(hop, current, metrics={"eval/loss": 2.5}, metadata={"data": "abc", "n": {"a": [1, None]}})
            restored = checkpoints.restore(abstract(target))
        assert restored.step == hop
        assert restored.metrics == {"eval/loss": 2.5}
        assert restored.metadata == {"data": "abc", "n": {"a": [1, None]}}
        assert restored.notes == ()
        current = restored.state
        assert bits(current) == bits(original)
        assert jax.tree.structure(current) == jax.tree.structure(original)
        assert jax.tree.map(lambda x: (x.sharding, x.dtype), current) == jax.tree.map(
            lambda x: (x.sharding, x.dtype), target
        )
    kernel = current.params["model"][0]["kernel"]
    assert [shard.data.shape for shard in kernel.addressable_shards] == [(4, 8)] * 4


def test_float64_and_default_placement(tmp_path: pathlib.Path) -> None:
    with jax.enable_x64(True), Checkpoints(tmp_path) as checkpoints:
        state = {"x": jnp.asarray(np.random.default_rng(0).normal(size=5)), "n": jnp.asarray(2**40)}
        checkpoints.save(7, state)
        restored = checkpoints.restore(jax.eval_shape(lambda: state)).state
        assert bits(restored) == bits(state)
        assert restored["x"].dtype == jnp.float64
        assert restored["n"].dtype == jnp.int64


def test_saving_does_not_wait_and_survives_donation(tmp_path: pathlib.Path) -> None:
    """The next steps overwrite the donated buffers while the save is still writing."""
    advance = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        for trial in range(3):
            tree = {f"w{i}": jnp.full((256, 1024), float(trial * 100 + i)) for i in range(4)}
            shapes = abstract(tree)
            checkpoints.save(trial, tree)
            for _ in range(10):
                tree = advance(tree)
            jax.block_until_ready(tree)
            restored = checkpoints.restore(shapes).state
            for i in range(4):
                np.testing.assert_array_equal(restored[f"w{i}"], trial * 100 + i)


def test_keeps_the_newest_and_the_best(tmp_path: pathlib.Path, state: State) -> None:
    losses = {1: 0.5, 2: math.nan, 3: 0.5, 4: 0.9, 5: 0.8, 6: 0.7}
    with Checkpoints(tmp_path, keep=2, best="eval/loss") as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state, metrics={"eval/loss": loss})
        checkpoints.save(7, state)
        checkpoints.wait()
        assert checkpoints.steps == [1, 6, 7]
        assert checkpoints.best_step == 1
        assert checkpoints.latest_step == 7
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "6", "7"]
    with Checkpoints(tmp_path, keep=1, best="eval/loss", mode="max") as checkpoints:
        assert checkpoints.best_step == 6
        checkpoints.save(8, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["6", "8"]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.best_step is None
        checkpoints.save(9, state, metadata={"run": 1})
        checkpoints.wait()
        assert checkpoints.steps == [9]
        assert checkpoints.metadata() == {"run": 1}
        assert checkpoints.metadata(3) is None


def test_saving_a_step_again_replaces_it(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for value in (1.0, 2.0):
            checkpoints.save(5, {"x": jnp.full(3, value)})
        assert checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}).state["x"].tolist() == [2.0] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["5.1"]
    # Killed after the manifest of the second save was written, before the first was removed: the second counts.
    shutil.copytree(tmp_path / "5.1", tmp_path / "5.10")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps == [5]
        flip(largest(tmp_path / "5.1" / "arrays"))
        assert checkpoints.restore({"x": jax.ShapeDtypeStruct((3,), jnp.float32)}).step == 5
        checkpoints.save(6, {"x": jnp.full(3, 3.0)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5.10", "6"]


def test_what_has_no_manifest_is_no_checkpoint(tmp_path: pathlib.Path, state: State) -> None:
    """As a save that was killed, or a removal, leaves it: passed over with a note, and removed by the next save."""
    fill(tmp_path, state, [10, 20, 30], keep=3)
    for step in (10, 30):
        (tmp_path / str(step) / "manifest.json").unlink()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps == [20]
        restored = checkpoints.restore(abstract(state))
        assert restored.step == 20
        (note,) = restored.notes  # of 10 nothing is said: it is older than what is used
        assert note == f"The save of step 30 in {tmp_path} was not finished: manifest.json is missing."
        checkpoints.save(25, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "25"]


# --- damage -------------------------------------------------------------------------------------------------------


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda folder: largest(folder / "arrays").open("r+b").truncate(40),
    "deleted": lambda folder: largest(folder / "arrays").unlink(),
    "flipped": lambda folder: flip(largest(folder / "arrays")),
    "manifest-flipped": lambda folder: flip(folder / "manifest.json"),
    "manifest-empty": lambda folder: (folder / "manifest.json").write_text(""),
    "arrays-deleted": lambda folder: shutil.rmtree(folder / "arrays"),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_latest_checkpoint_falls_back_and_says_so(
    tmp_path: pathlib.Path, state: State, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, state, [10, 20])
    DAMAGE[damage](tmp_path / "20")
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        with caplog.at_level(logging.WARNING):
            restored = checkpoints.restore(abstract(state))
        assert restored.step == 10
        assert bits(restored.state) == bits(dataclasses.replace(state, step=jnp.int32(10)))
        assert len(restored.notes) == 1
        assert "step 20" in restored.notes[0]
        assert "damaged" in restored.notes[0]
        assert restored.notes[0] in caplog.text
        assert "Using the checkpoint of step 10" in caplog.text
        # Training goes on from 10: the damaged one neither counts as one of the newest nor stays.
        assert checkpoints.latest_step == 10
        checkpoints.save(15, state)
        checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15"]


def test_damage_everywhere_is_an_error(tmp_path: pathlib.Path, state: State) -> None:
    fill(tmp_path, state, [1, 2])
    for step in ("1", "2"):
        flip(largest(tmp_path / step / "arrays"))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=r"step 2 .*damaged.*step 1 .*damaged"):
        checkpoints.restore(abstract(state))
    with Checkpoints(tmp_path / "none") as checkpoints, pytest.raises(UserError, match="no checkpoint in"):
        checkpoints.restore(abstract(state))
    assert not (tmp_path / "none").exists()


def test_another_model_is_refused_by_the_array_that_differs(tmp_path: pathlib.Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones((2, 3)), "b": jnp.ones(2)})
        float32 = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        for other, words in (
            ({"a": jax.ShapeDtypeStruct((2, 4), jnp.float32)}, r"a is float32\[2, 3\] in the .* and float32\[2, 4\]"),
            ({"a": float32}, r"b is float32\[2\] in the checkpoint and absent"),
            ({"a": float32, "c": float32}, "c is absent in the checkpoint"),
            ({"a": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}, r"bfloat16\[2, 3\] in this run"),
        ):
            with pytest.raises(UserError, match=words):
                checkpoints.restore(other)


def test_refusals(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="keep is 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(UserError, match="mode is 'least'"):
        Checkpoints(tmp_path, mode="least")  # type: ignore[arg-type]
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"key: .*key<fry>"):
            checkpoints.save(1, {"key": jax.random.key(0)})
        with pytest.raises(TypeError, match="count: "):
            checkpoints.save(1, {"count": 3})
        with pytest.raises(TypeError, match="serializable"):
            checkpoints.save(1, {"x": jnp.ones(1)}, metadata={"path": tmp_path})


# --- trouble while saving -----------------------------------------------------------------------------------------


def test_an_unwritable_directory_is_a_clear_error(tmp_path: pathlib.Path, state: State) -> None:
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(UserError, match=r"step 3 could not be written to .*complete checkpoint: none"):
        checkpoints.save(3, state)
    checkpoints.close()


def test_a_failure_in_the_background_is_raised_and_leaves_the_earlier_one(
    tmp_path: pathlib.Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, state, [1])

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "write_atomically", full)
            checkpoints.save(2, state)
            with pytest.raises(UserError, match=r"step 2 .*No space left.*complete checkpoint: 1\."):
                checkpoints.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["1"]
        checkpoints.save(3, state)
        assert checkpoints.restore(abstract(state)).step == 3


WRITER = """
    import resource, signal, sys
    import jax, jax.numpy as jnp
    from lmobj.errors import UserError
    from lmobj.train.checkpoint import Checkpoints

    directory, limit = sys.argv[1], int(sys.argv[2])
    checkpoints = Checkpoints(directory, keep=2, best="eval/loss")
    state = {f"w{i}": jnp.zeros((64, 64)) for i in range(4)} | {"step": jnp.int32(0)}
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    start = 0
    if checkpoints.latest_step is not None:
        restored = checkpoints.restore(state)
        start, state = restored.step, restored.state
    print("ready", start, flush=True)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for step in range(start + 1, start + 100_000):
        state = advance(state)
        if limit and step == start + 3:
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            state["noise"] = jax.random.normal(jax.random.key(0), (512, 512))
        try:
            checkpoints.save(step, state, metrics={"eval/loss": float(step % 7)})
            if limit:
                checkpoints.wait()
        except UserError as error:
            print("refused", error, flush=True)
            sys.exit(2)
"""


def write_until(directory: pathlib.Path, *, limit: int = 0) -> subprocess.Popen[str]:
    root = pathlib.Path(checkpoint.__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(directory), str(limit)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )


SHAPES = {f"w{i}": jax.ShapeDtypeStruct((64, 64), jnp.float32) for i in range(4)} | {
    "step": jax.ShapeDtypeStruct((), jnp.int32)
}


def test_killed_at_any_moment(tmp_path: pathlib.Path) -> None:
    """kill -9 while saving without pause: whatever has a checkpoint's name is whole and of its own step."""
    rng = np.random.default_rng(0)
    leftovers, last = 0, 0
    for _ in range(4):
        process = write_until(tmp_path)
        assert process.stdout is not None
        assert process.stdout.readline().split() == ["ready", str(last)]
        reader = Checkpoints(tmp_path)
        while (reader.latest_step or 0) <= last:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        leftovers += any(not (path / "manifest.json").exists() for path in tmp_path.iterdir())
        restored = reader.restore(SHAPES)
        assert not any("damaged" in note for note in restored.notes)
        assert restored.step > last
        for step in reader.steps:
            state = reader.restore(SHAPES, step=step).state
            for leaf in jax.tree.leaves(state):
                np.testing.assert_array_equal(leaf, step)
        last = restored.step
        reader.close()
    assert leftovers > 0  # at least one was killed in the middle of a save


def test_a_full_disk_leaves_the_earlier_checkpoints(tmp_path: pathlib.Path) -> None:
    """A limit on file sizes makes every larger write fail, as a full disk does."""
    process = write_until(tmp_path, limit=4096 * 16)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "refused The checkpoint of step 3 could not be written" in output
    assert "complete checkpoint: 1, 2." in output or "complete checkpoint: 2." in output
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(SHAPES)
        assert restored.step == 2
        checkpoints.save(4, restored.state)  # removes what Orbax's other writers may still have left behind
    assert all((path / "manifest.json").is_file() for path in tmp_path.iterdir())


def test_manifest_is_plain_json(tmp_path: pathlib.Path, state: State) -> None:
    fill(tmp_path, state, [4])
    manifest = json.loads((tmp_path / "4" / "manifest.json").read_text())["manifest"]
    assert manifest["arrays"]["params/model/0/kernel"] == [[16, 8], "float32"]
    assert manifest["metrics"] == {"eval/loss": 0.25}
    files = {path.relative_to(tmp_path / "4").as_posix() for path in (tmp_path / "4").rglob("*") if path.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
