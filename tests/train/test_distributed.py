"""Several processes train as one, stop as one, and continue as any number. `tools/measure_processes.py` has the whole
matrix of process counts, meshes and misfortunes."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import pytest
from tiny_runs import experiment

from lmobj import config
from lmobj.cli import main
from lmobj.errors import UserError
from lmobj.models import GRUConfig
from lmobj.train import fit
from lmobj.train.distributed import AgreedError, Launch, Peers
from lmobj.train.roll_call import call_roll, ranges
from lmobj.train.signals import SharedStopRequest
from tools import measure_processes as measure

STEPS = 20
EXACT = 1e-10


@pytest.fixture
def quick_processes() -> dict[str, str]:
    """Variables that give other processes this session's compile cache and quick compilation."""
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",  # few writes: one that is killed half way stays
    }


# --- whole runs ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_stopped_killed_and_resumed_on_other_meshes_and_process_counts(
    corpus: pathlib.Path, tmp_path: pathlib.Path, quick_processes: dict[str, str]
) -> None:
    often = {"steps": STEPS, "checkpoint_every": 4, "evaluate_every": 5, "evaluate_batches": 1}
    model = GRUConfig(width=16, layers=1, dropout=0.1, dtype="float64", param_dtype="float64")  # quick to compile
    wanted = dataclasses.replace(experiment(corpus, tmp_path / "run", train=often, sample=()), model=model)
    (tmp_path / "tiny.yaml").write_text(config.dump(wanted))
    with jax.enable_x64(True):
        alone = fit(dataclasses.replace(wanted, run=str(tmp_path / "alone")), quiet=True)
    rows = {
        step: {row: tuple(ids) for row, ids in enumerate(batch["row_ids"].tolist())}
        for step, batch in enumerate(alone.assembly.batches("train", steps=STEPS), 1)
    }

    def two(*arguments: str, fault: str, trace: str) -> tuple[measure.Ended, measure.Ended]:
        options = ("--quiet", "--heartbeat", "10")
        first, second = measure.run(
            2, *arguments, *options, trace=tmp_path / trace, faults={1: fault}, environment=quick_processes
        )
        return first, second

    # Rows and parameters are split over both processes; a signal that one of them gets stops both.
    axes = ("train.mesh.data=1", "train.mesh.fsdp=4", "train.mesh.tensor=1")
    first, second = two("train", str(tmp_path / "tiny.yaml"), *axes, fault="6:term", trace="stopped")
    assert (first.code, second.code) == (143, 143), (first.err, second.err)
    assert (first.out, first.err, second.out, second.err) == ("", "", "", "")
    stopped = measure.saved(tmp_path / "run")
    assert 5 <= stopped <= 12, "the next part of this test kills in the 14th"

    # Both read all rows and each layer is split over them; one is killed.
    axes = ("train.mesh.data=1", "train.mesh.fsdp=1", "train.mesh.tensor=4")
    first, second = two("resume", str(tmp_path / "run"), *axes, fault="14:kill", trace="killed")
    assert (first.code, second.code) == (1, -signal.SIGKILL), (first.err, second.err)
    assert first.err.startswith("lmobj: another process was lost, and all others end (")
    assert first.err.count("\n") == 1

    killed = measure.saved(tmp_path / "run")
    assert stopped <= killed <= 13
    read = measure.rows_read(tmp_path / "stopped", last=stopped)
    assert set(read) == set(range(1, stopped + 1))
    read |= measure.rows_read(tmp_path / "killed")
    assert set(read) >= set(range(1, 14))
    for step, found in read.items():
        assert {row: one.row_id for row, one in found.items()} == rows[step], step

    with jax.enable_x64(True):
        assert main(["resume", str(tmp_path / "run"), "--quiet"]) == 0
    assert measure.metrics_gap(tmp_path / "alone", tmp_path / "run") <= EXACT
    assert measure.state_gap(tmp_path / "alone", tmp_path / "run") <= EXACT


def test_what_one_process_refuses_all_refuse(
    corpus: pathlib.Path, tmp_path: pathlib.Path, quick_processes: dict[str, str]
) -> None:
    (tmp_path / "tiny.yaml").write_text(config.dump(experiment(corpus, tmp_path / "run")))
    first, second = measure.run(
        2,
        *("train", str(tmp_path / "tiny.yaml")),
        trace=tmp_path / "rows",
        own={1: ["train.seed=3"]},
        environment=quick_processes,
    )
    assert (first.code, second.code) == (2, 2)
    assert first.err == (
        f"lmobj: In process 1 (on {socket.gethostname()}): train.seed is 3 here and 0 in process 0; accepted: the same "
        "in every process.\n"
    )
    assert (first.out, second.out, second.err) == ("", "", "")
    assert not (tmp_path / "run").exists()


# --- joining ------------------------------------------------------------------------------------------------------


def together(*work: Callable[[], Any]) -> list[Any]:
    """What each piece of work returns or raises, all of them at once in threads."""
    results: list[Any] = [None] * len(work)

    def note(place: int) -> None:
        try:
            results[place] = work[place]()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=note, args=(place,)) for place in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.fixture
def address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def roll(address: str, processes: int, process: int, timeout: float = 20.0) -> Callable[[], None]:
    return lambda: call_roll(address, processes, process, timeout)


def test_all_have_come(address: str) -> None:
    def later() -> None:
        time.sleep(0.3)
        call_roll(address, 4, 0, 20.0)

    assert together(*(roll(address, 4, process) for process in (3, 1, 2)), later) == [None] * 4
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass  # the port is free again at once, for JAX


def test_those_that_have_not_come_are_named_in_all_that_have(address: str) -> None:
    def stranger() -> None:
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
                    connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except ConnectionRefusedError:
                time.sleep(0.01)

    *errors, _ = together(*(roll(address, 7, process, 1.0) for process in (0, 2)), stranger)
    assert [type(error) for error in errors] == [UserError, UserError]
    assert str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith(
        f"processes 1, 3-6 of 7 did not join at {address} within 1 seconds; joined: 0, 2 on {socket.gethostname()}."
    )


def test_process_0_has_not_come(address: str) -> None:
    with pytest.raises(UserError, match=f"process 0 of 2 did not join: at {address} nothing answered process 1 within"):
        call_roll(address, 2, 1, 0.5)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ([(3, 1), (3, 1)], "--process 1 was given to two processes, on"),
        ([(4, 1)], "--processes is 4 in a process on .* and 3 in process 0"),
    ],
)
def test_processes_that_do_not_fit_together(address: str, others: list[tuple[int, int]], message: str) -> None:
    results = together(roll(address, 3, 0), *(roll(address, *other) for other in others))
    for error in results:
        assert isinstance(error, UserError)
        with pytest.raises(UserError, match=message):
            raise error


def test_ranges() -> None:
    assert [ranges(numbers) for numbers in ([], [3], [0, 1, 2, 5, 7, 8])] == ["", "3", "0-2, 5, 7-8"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"process": 1}, "--process is 1, and --coordinator and --processes are not given"),
        ({"coordinator": "a:1", "processes": 2}, "--coordinator is a:1, and --process is not given"),
        ({"coordinator": "a", "processes": 2, "process": 0}, "--coordinator is 'a'; accepted: HOST:PORT"),
        ({"coordinator": "a:99999", "processes": 2, "process": 0}, "accepted: HOST:PORT"),
        ({"coordinator": "a:1", "processes": 0, "process": 0}, "--processes is 0; accepted: 1 or more"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, "--process is 2; accepted: 0 to 1"),
        ({"join_timeout": 0.0}, "--join-timeout is 0.0; accepted: 1 second or more"),
        ({"heartbeat": -1}, "--heartbeat is -1; accepted"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Launch(**options)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        (  # the port is 65536 - 4096 + the job's number modulo 4096
            {
                "SLURM_JOB_ID": "4103",
                "SLURM_STEP_NODELIST": "node[07-09],other",
                "SLURM_NTASKS": "6",
                "SLURM_PROCID": "5",
                "SLURM_LOCALID": "1",
            },
            ("node07:61447", 6, 5, [1]),
        ),
        (  # the job's number is that of the URI over 4096
            {
                "OMPI_MCA_orte_hnp_uri": f"{4096 * 4100}.0;tcp://10.96.0.1,10.148.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            },
            ("10.96.0.1:61444", 2, 0, [0]),
        ),
    ],
)
def test_clusters_that_are_detected(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: tuple[str, int, int, list[int]]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place, devices = Launch(detect=True)._detected()
    assert (place.coordinator, place.processes, place.process, devices) == found


def test_no_cluster_to_detect() -> None:
    with pytest.raises(UserError, match="--distributed finds no cluster; accepted: under SLURM"):
        Launch(detect=True).join()


# --- deciding -----------------------------------------------------------------------------------------------------


class Store:
    """A key-value store as JAX's coordination service has it, for threads."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str) -> None:
        with self._changed:
            if key not in self._values:
                self._values[key] = value
                self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values, timeout_in_ms / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: no such key")
            return self._values[key]

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        with self._changed:
            return [(key, value) for key, value in self._values.items() if key.startswith(prefix)]

    def key_value_delete(self, prefix: str) -> None:
        with self._changed:
            self._values = {key: value for key, value in self._values.items() if not key.startswith(prefix)}


@pytest.fixture
def group() -> Iterator[list[Peers]]:
    """Three processes that are threads."""
    store = Store()
    peers = [Peers(index, 3, store) for index in range(3)]
    for one in peers:
        one.watch()
    yield peers
    for one in peers:
        one.close()


def test_a_meeting_gives_the_first_ones_value_and_every_error(group: list[Peers]) -> None:
    assert together(*(lambda p=p: p.meet("value", {"of": p.index}) for p in group)) == [{"of": 0}] * 3
    errors = together(*(lambda p=p: p.meet("check", error="no" if p.index else None) for p in group))
    assert [str(error) for error in errors] == [f"In processes 1-2 (on {socket.gethostname()}): no"] * 3
    assert all(isinstance(error, AgreedError) for error in errors)
    errors = together(*(lambda p=p: p.meet("check", error="nobody can") for p in group))
    assert [str(error) for error in errors] == ["nobody can"] * 3
    # One refuses before the others have come so far: its refusal reaches them at another point.
    errors = together(*(lambda p=p: p.meet(f"{p.index}", error=None if p.index else "early") for p in group))
    assert [str(error) for error in errors] == [f"In process 0 (on {socket.gethostname()}): early"] * 3


def test_processes_that_wait_for_one_another_stop_after_the_same_step(group: list[Peers]) -> None:
    """Each can be at most two steps ahead of the slowest, as devices have it, and none ever hangs."""
    requests = [SharedStopRequest(peers) for peers in group]
    done, moved = [0, 0, 0], threading.Condition()

    def train(index: int) -> tuple[int, int]:
        with group[index].reading(requests[index].read):
            for step in range(1, 10_000):
                with moved:
                    moved.wait_for(lambda step=step: min(done) >= step - 2, 60)
                    done[index] = step
                    moved.notify_all()
                if step == 40 and index == 1:
                    requests[index].received(signal.SIGINT)
                if step == 41 and index == 2:
                    requests[index].received(signal.SIGTERM)
                stopped = requests[index].after(step)
                if stopped is not None:
                    group[index].meet("the last step")
                    return step, stopped
        raise AssertionError("it never stopped")

    results = together(*(lambda i=i: train(i) for i in range(3)))
    assert len(set(results)) == 1, results
    assert results[0][0] >= 40
    assert results[0][1] in (signal.SIGINT, signal.SIGTERM)


def test_notices_are_json(group: list[Peers]) -> None:
    group[1].post("kind", [1, None])
    group[1].post("kind", "the first stays")
    assert group[2].notices() == json.loads('{"kind": {"1": [1, null]}}', object_hook=_numbered)


def _numbered(values: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}
