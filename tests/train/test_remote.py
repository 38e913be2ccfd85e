"""Runs and checkpoints in an object store: killed at every operation, refused as local ones are, resumed elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import fsspec
import jax
import jax.numpy as jnp
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from tiny_runs import metric_lines, stored_bits

from lmobj import config
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.train import FitResult, RunFolder, fit, loop, storage
from lmobj.train.checkpoint import Checkpoints
from lmobj.train.storage import LocalFolder, open_folder


class Killed(BaseException):
    """What kill -9 does: nothing of ours that catches errors sees it."""


class Shelf(MemoryFileSystem):
    """An object store in this process: objects are put whole, and there is neither a rename nor an append.

    The process can be killed at any operation that changes something.
    """

    protocol = "shelf"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    done: ClassVar[list[str]] = []
    lives: float = float("inf")
    failure: BaseException = Killed()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.replace("shelf://", "memory://"))

    def change(self, what: str, path: str) -> None:
        if Shelf.lives <= 0:
            raise Shelf.failure
        Shelf.lives -= 1
        Shelf.done.append(f"{what} {path}")

    def pipe_file(self, path: str, value: bytes, *arguments: Any, **options: Any) -> None:
        self.change("put", path)
        super().pipe_file(path, value, *arguments, **options)

    def put_file(self, source: str, path: str, *arguments: Any, **options: Any) -> None:
        self.change("put", path)
        super().pipe_file(path, pathlib.Path(source).read_bytes())

    def rm_file(self, path: str) -> None:
        self.change("delete", path)
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        for name in self.find(path):  # one object after the other, and the manifest last, if it is there
            self.change("delete", name)
            MemoryFileSystem.rm_file(self, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Folders are but the names of objects."""

    def mv(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("an object store renames nothing")

    def cp_file(self, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError("copying is not needed")

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        assert mode in ("rb", "wb"), "an object is put whole"
        return super().open(path, mode, **options)


fsspec.register_implementation("shelf", Shelf)


@pytest.fixture(autouse=True)
def shelf(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty store, and a cache folder for working copies."""
    monkeypatch.setenv("LMOBJ_CACHE", str(tmp_path / "cache"))
    Shelf.lives, Shelf.failure = float("inf"), Killed()
    Shelf.store.clear()
    Shelf.done.clear()
    yield
    Shelf.lives = float("inf")


def working_copies(tmp_path: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


SHAPE = {"x": jax.ShapeDtypeStruct((3,), jnp.float32)}


def stored(place: str, step: int | None = None) -> tuple[int, float]:
    """Step and value of the newest checkpoint, as another process reads it."""
    with Checkpoints(place) as checkpoints:
        restored = checkpoints.restore(SHAPE, step=step)
        return restored.step, float(restored.state["x"][0])


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_checkpoints_in_a_store(tmp_path: pathlib.Path) -> None:
    place = "shelf://bucket/run/checkpoints"
    with Checkpoints(place, keep=1, best="loss") as checkpoints:
        assert checkpoints.steps == []
        for step in (1, 2, 3):
            checkpoints.save(step, {"x": jnp.full(3, float(step))}, metrics={"loss": step % 3}, metadata={"n": step})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best_step, checkpoints.metadata()) == ([3], 3, {"n": 3})
        checkpoints.save(4, {"x": jnp.full(3, 4.0)}, metrics={"loss": 7})
        checkpoints.wait()
        assert (checkpoints.steps, checkpoints.best_step, checkpoints.metadata(3)) == ([3, 4], 3, {"n": 3})
        assert stored(place) == (4, 4.0)
        assert stored(place, step=3) == (3, 3.0)
    assert {name.split("/")[4] for name in Shelf.store} == {"3", "4"}
    assert working_copies(tmp_path) == []
    assert all("manifest.json" in put for put in (entries_of(step)[-1] for step in (1, 2, 3, 4)))


def entries_of(step: int) -> list[str]:
    return [entry for entry in Shelf.done if entry.startswith(f"put /bucket/run/checkpoints/{step}/")]


def test_a_store_with_folders_of_its_own(tmp_path: pathlib.Path) -> None:
    """As fsspec's in memory is: they must be made before a file is put into them, and removed."""
    place = f"memory://{tmp_path.name}/checkpoints"
    with Checkpoints(place, keep=1) as checkpoints:
        for value in (1.0, 2.0):
            checkpoints.save(1, {"x": jnp.full(3, value)})
    assert stored(place) == (1, 2.0)
    assert open_folder(place).names() == ["1.1"]
    open_folder(place).remove()
    assert open_folder(place).names() == []


@pytest.mark.parametrize("damage", ["flipped", "deleted", "truncated", "half a manifest"])
def test_damage_in_a_store_is_noticed(damage: str) -> None:
    place = "shelf://bucket/checkpoints"
    with Checkpoints(place) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {"x": jnp.full(3, float(step))})
    manifest = "/bucket/checkpoints/2/manifest.json"
    arrays = [name for name in Shelf.store if name.startswith("/bucket/checkpoints/2/arrays/")]
    largest = max(arrays, key=lambda name: len(Shelf().cat_file(name)))
    content = bytearray(Shelf().cat_file(largest))
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        Shelf().pipe_file(largest, bytes(content))
    elif damage == "truncated":
        Shelf().pipe_file(largest, bytes(content[:40]))
    elif damage == "deleted":
        Shelf().rm_file(largest)
    else:
        Shelf().pipe_file(manifest, Shelf().cat_file(manifest)[:50])
    with Checkpoints(place) as checkpoints:
        restored = checkpoints.restore(SHAPE)
        assert restored.step == 1
        (note,) = restored.notes
        assert "step 2 in shelf://bucket/checkpoints is damaged" in note


class Mortal(LocalFolder):
    """A local folder whose process is killed as that of a `Shelf`; removing takes one file after the other."""

    def child(self, name: str) -> LocalFolder:
        return Mortal(self.path / name)

    def write(self, name: str, content: bytes) -> None:
        Shelf().change("put", f"{self.path.name}/{name}")
        super().write(name, content)

    def delete(self, name: str) -> None:
        Shelf().change("delete", f"{self.path.name}/{name}")
        super().delete(name)

    def remove(self) -> None:
        for name in [*self.sizes(), "."]:
            Shelf().change("remove", f"{self.path.name}/{name}")
            path = self.path / name
            path.unlink() if path.is_file() else super().remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["store", "disk"])
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_killed_at_every_operation_of_a_save(
    kind: str, again: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a kill anywhere, the newest whole checkpoint is the last completed one, and saving goes on."""
    if kind == "disk":
        monkeypatch.setattr("lmobj.train.checkpoint.open_folder", lambda place: Mortal(pathlib.Path(place)))
    before, after = (2, 2) if again else (1, 2)
    committed: list[bool] = []
    places = "shelf://bucket/" if kind == "store" else f"{tmp_path}/"
    with Checkpoints(f"{places}first", keep=1) as checkpoints:
        checkpoints.save(before, {"x": jnp.full(3, 10.0)})
    for moment in range(100):
        place = f"{places}{moment}"
        if kind == "store":
            for name in Shelf().find("/bucket/first"):
                Shelf().pipe_file(name.replace("first", str(moment), 1), Shelf().cat_file(name))
        else:
            shutil.copytree(tmp_path / "first", place)
        Shelf.done.clear()
        Shelf.lives = moment
        checkpoints = Checkpoints(place, keep=1)
        try:
            checkpoints.save(after, {"x": jnp.full(3, 20.0)})
            checkpoints.wait()
        except Killed:
            pass
        killed, done = Shelf.lives <= 0, list(Shelf.done)
        Shelf.lives = float("inf")
        checkpoints._thread.shutdown()
        committed.append(any(entry.startswith("put ") and entry.endswith("manifest.json") for entry in done))
        assert stored(place) == ((after, 20.0) if committed[-1] else (before, 10.0)), done
        with Checkpoints(place) as checkpoints:
            steps = checkpoints.steps
        assert [stored(place, step)[0] for step in steps] == steps  # one half removed does not look whole
        with Checkpoints(place, keep=1) as checkpoints:  # the run that resumes
            checkpoints.save(3, {"x": jnp.full(3, 30.0)})
        assert stored(place) == (3, 30.0)
        assert open_folder(place).names() == ["3"]
        if not killed:
            break
    # Killed at every operation before the commit and after it, until one save was not killed at all.
    assert not killed
    assert committed == sorted(committed)
    assert False in committed
    assert committed[-2]


def test_a_store_that_fails_is_told_and_loses_nothing() -> None:
    place = "shelf://bucket/checkpoints"
    with Checkpoints(place) as checkpoints:
        checkpoints.save(1, {"x": jnp.full(3, 1.0)})
        checkpoints.wait()
        Shelf.lives, Shelf.failure = 1, PermissionError("403 no access to bucket")
        checkpoints.save(2, {"x": jnp.full(3, 2.0)})
        with pytest.raises(UserError, match=r"step 2 could not be written to shelf://.*403 no access.*checkpoint: 1\."):
            checkpoints.wait()
        Shelf.lives = float("inf")
        assert stored(place) == (1, 1.0)
        checkpoints.save(3, {"x": jnp.full(3, 3.0)})
    assert stored(place) == (3, 3.0)
    assert open_folder(place).names() == ["1", "3"]


# --- places -------------------------------------------------------------------------------------------------------


def test_what_is_a_store_and_what_a_path(tmp_path: pathlib.Path) -> None:
    assert RunFolder("file:///data/run").path == pathlib.Path("/data/run")
    assert not RunFolder("runs/x/").in_store
    assert str(RunFolder("runs/x/")) == "runs/x"
    folder = RunFolder("shelf://bucket/run/")
    assert folder.in_store
    assert folder.path.is_relative_to(tmp_path / "cache" / "runs")
    assert folder.path == RunFolder("shelf://bucket/run").path != RunFolder("shelf://bucket/run2").path
    assert folder.checkpoints == "shelf://bucket/run/checkpoints"
    assert folder.resume_command == "lmobj resume shelf://bucket/run"
    with pytest.raises(UserError, match=r"'tape://x' cannot be opened .*accepted: a path, or a URL that fsspec knows"):
        RunFolder("tape://x")


@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_missing_package_is_named() -> None:
    with pytest.raises(UserError, match=r"accepted: for it `pip install 'lmobj\[gcs\]'`"):
        RunFolder("gs://bucket/run")


# --- runs ---------------------------------------------------------------------------------------------------------


def settings(reference: FitResult, tmp_path: pathlib.Path, run: str) -> str:
    """The config of a finished run with another run folder, in a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(config.dump(replace(reference.assembly.config, run=run)))
    return str(path)


def downloaded(url: str, folder: pathlib.Path) -> pathlib.Path:
    filesystem, root = fsspec.core.url_to_fs(url)
    for name in filesystem.find(root):
        target = folder / name.removeprefix(root).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(filesystem.cat_file(name))
    return folder


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_in_a_store_is_killed_and_resumed_on_another_machine(
    causal: FitResult, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    url = "shelf://bucket/runs/tiny"
    file = settings(causal, tmp_path, url)

    class Dies(loop.Tracker):
        def log(self, step: int, values: Mapping[str, float]) -> None:
            super().log(step, values)
            if step == 10:
                raise Killed

    seen: list[tuple[int, int]] = []
    change = Shelf.change

    def commits(self: Shelf, what: str, path: str) -> None:
        change(self, what, path)
        if what == "put" and path.endswith("manifest.json"):  # what another machine would find at this moment
            lines = self.cat_file("/bucket/runs/tiny/metrics.jsonl").decode().splitlines()
            seen.append((int(pathlib.Path(path).parent.name), json.loads(lines[-1])["step"]))

    monkeypatch.setattr(Shelf, "change", commits)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "Tracker", Dies)
        with pytest.raises(Killed):
            main(["train", file, "--quiet"])
    assert [step for step, _ in seen] == [4, 8]
    assert not Shelf().exists("/bucket/runs/tiny/report.html")

    monkeypatch.setenv("LMOBJ_CACHE", str(tmp_path / "elsewhere"))
    assert main(["resume", url]) == 0
    out = capsys.readouterr().out
    assert "Resuming from step 8." in out
    assert f"Report: {url}/report.html" in out
    assert [step for step, _ in seen] == [4, 8, 12]
    assert all(logged >= step for step, logged in seen)

    run = downloaded(url, tmp_path / "downloaded")
    assert metric_lines(run) == metric_lines(causal.run_dir)
    abstract = causal.assembly.abstract_state
    assert stored_bits(run, abstract) == stored_bits(causal.run_dir, abstract)
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in causal.run_dir.iterdir()}
    for name in ("baselines.json", "samples.json"):
        assert (run / name).read_bytes() == (causal.run_dir / name).read_bytes()
    assert len(list((run / "tensorboard").iterdir())) == 2

    # The finished run is used as a local one is, by a third machine that has nothing of it.
    monkeypatch.setenv("LMOBJ_CACHE", str(tmp_path / "third"))
    assert main(["eval", url, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["loss"] == causal.metrics["eval/loss"]
    assert main(["generate", url, "--prompt", "the quick", "--tokens", "2"]) == 0
    assert main(["train", file]) == 2
    refused = capsys.readouterr().err
    assert f"run is '{url}', which already exists; continue it with `lmobj resume {url}`" in refused
    assert main(["resume", "shelf://bucket/nothing"]) == 2
    assert "'shelf://bucket/nothing' is not a run folder: it holds no config.yaml" in capsys.readouterr().err


def test_several_processes_are_refused_before_anything_is_in_the_store(
    causal: FitResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match=r"shelf://bucket/run.*a kind of store that only a single process can save to"):
        fit(replace(causal.assembly.config, run="shelf://bucket/run"), quiet=True)
    assert Shelf.store == {}


# --- a full disk --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_disk_that_fills_up_stops_the_run_and_harms_nothing(
    causal: FitResult, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever file it is that has no room left: the metrics, or the checkpoint."""
    for kind in ("metrics", "checkpoint"):
        run = tmp_path / kind
        file = settings(causal, tmp_path, str(run))
        with monkeypatch.context() as patch:
            if kind == "metrics":

                class Full(loop.Tracker):
                    def log(self, step: int, values: Mapping[str, float]) -> None:
                        if step == 10:
                            raise OSError(28, "No space left on device")
                        super().log(step, values)

                patch.setattr(loop, "Tracker", Full)
            else:
                write = storage.write_atomically

                def full(path: pathlib.Path, content: str | bytes, write: Any = write) -> None:
                    if path.name == "manifest.json" and path.parent.name == "12":
                        raise OSError(28, "No space left on device")
                    write(path, content)

                patch.setattr(storage, "write_atomically", full)
            assert main(["train", file, "--quiet"]) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert "No space left on device" in error
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "8"]
        assert main(["resume", str(run), "--quiet"]) == 0
        assert metric_lines(run) == metric_lines(causal.run_dir)
        abstract = causal.assembly.abstract_state
        assert stored_bits(run, abstract) == stored_bits(causal.run_dir, abstract)


# --- Google Cloud Storage -----------------------------------------------------------------------------------------

_SERVER = """
import sys
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="bucket").run()
"""

_TRAIN_AND_DIE = """
import os, signal, sys
from lmobj.cli import main
from lmobj.train import loop

log = loop.Tracker.log

def log_and_die(self, step, values):
    log(self, step, values)
    if step == 10:
        os.kill(os.getpid(), signal.SIGKILL)

loop.Tracker.log = log_and_die
main(["train", sys.argv[1], "--quiet"])
"""

_RESUME_AND_DOWNLOAD = """
import sys
import fsspec
from lmobj.cli import main

url, folder = sys.argv[1:]
assert main(["resume", url]) == 0
assert main(["eval", url]) == 0
fsspec.filesystem("gs").get(url, folder, recursive=True)
"""


@contextlib.contextmanager
def emulator() -> Iterator[dict[str, str]]:
    """A server that speaks as Google Cloud Storage does, and the settings that lead to it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-c", _SERVER, str(port)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)
        yield {
            "STORAGE_EMULATOR_HOST": url,
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_google_cloud_storage(causal: FitResult, tmp_path: pathlib.Path) -> None:
    """Orbax writes to gs:// by itself: run where the packages gcp-storage-emulator and gcsfs are installed."""
    pytest.importorskip("gcp_storage_emulator")
    pytest.importorskip("gcsfs")
    url = "gs://bucket/runs/tiny"
    settings_of_jax = {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    with emulator() as settings_of_store:

        def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [sys.executable, "-c", code, *arguments],
                env={**os.environ, **settings_of_jax, **settings_of_store},
                cwd=pathlib.Path(__file__).parents[2],
                capture_output=True,
                text=True,
                timeout=300,
            )

        killed = python(_TRAIN_AND_DIE, settings(causal, tmp_path, url))
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        shutil.rmtree(tmp_path / "cache")  # on another machine
        resumed = python(_RESUME_AND_DOWNLOAD, url, str(tmp_path / "downloaded"))
        assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"Resuming from step [48]\.", resumed.stdout)
    run = tmp_path / "downloaded"
    assert metric_lines(run) == metric_lines(causal.run_dir)
    abstract = causal.assembly.abstract_state
    assert stored_bits(run, abstract) == stored_bits(causal.run_dir, abstract)
    assert not list((tmp_path / "cache" / "runs").rglob("arrays"))  # nothing was staged
