"""Several processes that train as one: they start together, decide together, and end together.

Over the devices they speak through JAX, as `jax.jit` arranges. Everything else goes over the key-value store of JAX's
coordination service, which needs no device and never waits for one:

    meetings   all processes come to the same point; process 0 hears what each has to say and answers all of them
    notices    one process tells, the others read it within a second: a wish to stop, or the error that ended it

A mistake that one process finds is so refused by all, and no process waits for one that has ended. With one process
all of this does nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from lmobj.compat import coordination, detect_cluster
from lmobj.errors import UserError
from lmobj.train.roll_call import call_roll, ranges

__all__ = [
    "AgreedError",
    "Launch",
    "Peers",
    "agreed",
    "appears",
    "first_alone",
    "is_first",
    "on_host",
    "one_fate",
    "peers",
    "same",
    "share",
    "together",
]

T = TypeVar("T")

_POLL = 0.5
"""Seconds between two looks at the notices."""
_SLICE_MS = 1000
"""Waiting in pieces of this length lets Ctrl-C through."""
_FAREWELL = 10.0
"""Seconds that a process which ends by an error waits for the others to have read of it."""


class AgreedError(UserError):
    """A mistake that every process knows of, so that all end alike and the first alone tells it."""


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    group = peers()
    return group is None or group.index == 0


# --- joining ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """How the processes of a run find each other. By default there is one, and it is alone."""

    detect: bool = False
    """Take coordinator, processes and process from the cluster: SLURM, Open MPI, Kubernetes or a TPU pod."""
    coordinator: str | None = None
    """HOST:PORT of process 0, with a port that is free there."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Which one this is, from 0."""
    join_timeout: float = 300
    """Seconds to wait for the last process to come."""
    heartbeat: int = 100
    """Seconds of silence after which a process is taken for dead, and the others end."""

    def __post_init__(self) -> None:
        given = {
            "--coordinator": self.coordinator, "--processes": self.processes, "--process": self.process,
        }  # fmt: skip
        absent = [option for option, value in given.items() if value is None]
        for option, value in given.items():
            if value is not None and absent and not self.detect:
                raise UserError(
                    f"{option} is {value}, and {' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not given; "
                    "accepted: all of --coordinator, --processes and --process, or --distributed, which asks the "
                    "cluster for what is not given."
                )
        if self.coordinator is not None:
            host, colon, port = self.coordinator.rpartition(":")
            if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
                raise UserError(f"--coordinator is {self.coordinator!r}; accepted: HOST:PORT, such as 10.0.0.1:9876.")
        if self.processes is not None and self.processes < 1:
            raise UserError(f"--processes is {self.processes}; accepted: 1 or more.")
        if self.process is not None and not 0 <= self.process < (self.processes or sys.maxsize):
            most = "" if self.processes is None else f" to {self.processes - 1}"
            raise UserError(f"--process is {self.process}; accepted: 0{most or ' or more'}.")
        for option, seconds in {"--join-timeout": self.join_timeout, "--heartbeat": self.heartbeat}.items():
            if not 1 <= seconds < 1e6:
                raise UserError(f"{option} is {seconds}; accepted: 1 second or more.")

    def join(self) -> None:
        """Starts JAX in this process as one of several. Nothing of JAX may have been used before.

        Raises:
          UserError: processes that do not come in time, no cluster to detect.
        """
        place, devices = self._detected() if self.detect else (self, None)
        if place.coordinator is None or place.processes is None or place.process is None or place.processes == 1:
            return
        call_roll(place.coordinator, place.processes, place.process, self.join_timeout)
        # JAX would catch SIGTERM from here on and keep it to itself.
        jax.config.update("jax_enable_preemption_service", False)
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            devices,
            initialization_timeout=60,
            heartbeat_timeout_seconds=self.heartbeat,
            shutdown_timeout_seconds=30,
        )

    def _detected(self) -> tuple[Launch, Sequence[int] | None]:
        """What JAX reads from the cluster's environment, and the local devices that it gives to this process."""
        try:
            coordinator, processes, process, devices = detect_cluster(
                self.coordinator, self.processes, self.process, int(self.join_timeout)
            )
        except RuntimeError as error:
            raise UserError(f"--distributed: the cluster was found, and its processes were not: {error}") from error
        if coordinator is None or processes is None or process is None:
            raise UserError(
                "--distributed finds no cluster; accepted: under SLURM (srun), Open MPI (mpirun), Kubernetes or on a "
                "TPU pod, or elsewhere --coordinator HOST:PORT --processes N --process I."
            )
        return dataclasses.replace(self, coordinator=coordinator, processes=processes, process=process), devices


@contextlib.contextmanager
def together(launch: Launch) -> Iterator[None]:
    """A command in several processes: they join, and end together with one message and one exit code.

    An error that only one of them meets ends this process here, and the others within seconds.
    """
    launch.join()
    group = peers()
    if group is None:
        yield
        return
    group.hard = True
    with one_fate():
        try:
            yield
        except AgreedError as error:
            group.leave()
            if group.index:
                raise SystemExit(error.exit_code) from None
            raise
        except SystemExit:  # all were stopped
            group.leave()
            raise
        group.leave()


# --- meetings and notices -----------------------------------------------------------------------------------------


class Peers:
    """This process among the others, as `peers()` gives it. All processes meet in the same order.

    Args:
      index: which process this is.
      count: how many there are.
      store: the key-value store of JAX's coordination service.
    """

    def __init__(self, index: int, count: int, store: Any) -> None:
        self.index, self.count = index, count
        self.hard = False
        """Whether an error ends the process at once, as in the command line."""
        self.meetings = 0
        """How many there have been."""
        self._store = store
        self._wake, self._closed = threading.Event(), threading.Event()
        self._readers: list[Callable[[dict[str, dict[int, Any]]], None]] = []
        self._thread: threading.Thread | None = None

    def meet(self, purpose: str, value: T = None, error: str | None = None) -> T:  # type: ignore[assignment]
        """Waits for every process, and returns the `value` of process 0.

        Args:
          purpose: what the meeting is about, the same in every process.
          value: anything that JSON can hold.
          error: why this process cannot go on.

        Raises:
          AgreedError: in every process, if one of them has an `error`.
        """
        self.meetings += 1
        place = f"lmobj/meeting/{self.meetings}"
        said = {"purpose": purpose, "error": error, "host": socket.gethostname()}
        self._store.key_value_set(f"{place}/{self.index}", json.dumps(said))
        if self.index == 0:
            heard = [json.loads(self._wait_for(f"{place}/{rank}")) for rank in range(self.count)]
            self._store.key_value_delete(f"lmobj/meeting/{self.meetings - 1}/")  # all have read its answer
            answer = {"value": value, "error": _first_error(heard)}
            self._store.key_value_set(f"{place}/answer", json.dumps(answer))
        answer = json.loads(self._wait_for(f"{place}/answer"))
        if answer["error"] is not None:
            raise AgreedError(answer["error"])
        return answer["value"]

    def post(self, kind: str, content: Any) -> None:
        """Puts up this process's notice of a kind; the first one stays."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.key_value_set(f"lmobj/notice/{kind}/{self.index}", json.dumps(content))

    def notices(self) -> dict[str, dict[int, Any]]:
        """What is put up: {kind: {process: content}}."""
        found: dict[str, dict[int, Any]] = {}
        for key, content in self._store.key_value_dir_get("lmobj/notice/"):
            kind, rank = key.rsplit("/", 2)[-2:]
            found.setdefault(kind, {})[int(rank)] = json.loads(content)
        return found

    @contextlib.contextmanager
    def reading(self, reader: Callable[[dict[str, dict[int, Any]]], None]) -> Iterator[None]:
        """Calls `reader` with all notices twice a second, and after `look`, from another thread."""
        self._readers.append(reader)
        try:
            yield
        finally:
            self._readers.remove(reader)

    def look(self) -> None:
        """Has the notices read now."""
        self._wake.set()

    def watch(self) -> None:
        """Begins to read notices; the error of another process then ends this one."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(_POLL)
            self._wake.clear()
            try:
                notices = self.notices()
            except jax.errors.JaxRuntimeError:  # process 0 has gone, and JAX itself will end this process
                return
            failed = {rank: error for rank, error in notices.get("failed", {}).items() if rank != self.index}
            if failed:
                self._end_like(*next(iter(failed.items())))
            for reader in self._readers.copy():
                reader(notices)

    def fail(self, error: BaseException) -> None:
        """Tells the others of an error that they know nothing of. In the command line this does not return."""
        text, code = _describe(error)
        lost = _lost_connection(text)
        if lost:  # perhaps because another has ended, which may have said why
            time.sleep(2 * _POLL)
            text = (
                f"another process was lost, and all others end ({text}). Continue from the last checkpoint with "
                "`lmobj resume`, on any number of processes."
            )
        self.post("failed", {"text": text, "code": code, "host": socket.gethostname()})
        if self.hard and not (isinstance(error, UserError) or lost):
            traceback.print_exception(error)
        elif self.hard:
            _print_error(text)
        self._farewell(2.0 if lost else _FAREWELL)
        if self.hard:
            _exit(code)

    def _end_like(self, rank: int, failed: dict[str, Any]) -> None:
        """Ends this process because of another's error."""
        self.post("gone", True)
        if self.index == 0:
            _print_error(f"Process {rank} on {failed['host']} ended: {failed['text']}")
        self._farewell(_FAREWELL)
        _exit(failed["code"])

    def _farewell(self, seconds: float) -> None:
        """Process 0, which holds the notices, goes last."""
        until = time.monotonic() + seconds
        while self.index == 0 and time.monotonic() < until:
            notices = self.notices()
            if len({*notices.get("gone", {}), *notices.get("failed", {}), 0}) == self.count:
                return
            time.sleep(0.05)

    def leave(self) -> None:
        """Waits for the others to have come to the end, then parts from them."""
        self.meet("the end")
        self.close()
        jax.distributed.shutdown()

    def close(self) -> None:
        """No longer reads notices."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _wait_for(self, key: str) -> str:
        while True:
            try:
                value: str = self._store.blocking_key_value_get(key, _SLICE_MS)
                return value
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


_peers: Peers | None = None


def peers() -> Peers | None:
    """The other processes; None where there are none."""
    global _peers
    if _peers is None and (joined := coordination()) is not None:
        _peers = Peers(joined.process, joined.processes, joined.client)
    return _peers


@contextlib.contextmanager
def one_fate() -> Iterator[None]:
    """An error in the block, unless all processes know of it, is told to the others and ends them."""
    group = peers()
    if group is None:
        yield
        return
    group.watch()
    try:
        yield
    except (AgreedError, SystemExit):
        raise
    except BaseException as error:
        group.fail(error)
        raise


@contextlib.contextmanager
def agreed(purpose: str) -> Iterator[None]:
    """What one process refuses in this block, all refuse. They wait for each other at its end."""
    group, error = peers(), None
    try:
        yield
    except AgreedError:
        raise
    except UserError as refusal:
        if group is None:
            raise
        error = str(refusal)
    if group is not None:
        group.meet(purpose, error=error)


def on_host(array: jax.Array) -> Any:
    """A whole array as NumPy; every process calls it, and where no single one holds all of it, it is gathered."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return jax.device_get(array)
    return multihost_utils.process_allgather(array, tiled=True)


def appears(path: pathlib.Path) -> bool:
    """Whether a file is there, or comes within a minute, as long as a network file system may hide a new one."""
    until = time.monotonic() + 60
    while not path.is_file():
        if peers() is None or time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def share(purpose: str, value: T) -> T:
    """The value that process 0 has, in every process; JSON must be able to hold it."""
    group = peers()
    return value if group is None else group.meet(purpose, value)


def first_alone(purpose: str, work: Callable[[], T]) -> T:
    """Has process 0 work first, then all others at once, who find done what it has left on a disk they share."""
    with agreed(purpose):
        result = work() if is_first() else None
    with agreed(purpose):
        return work() if result is None else result


def same(purpose: str, value: T, differ: Callable[[T, T], str | None]) -> None:
    """Refuses a value that is not process 0's.

    Args:
      purpose: what is compared.
      value: anything that JSON can hold, compared as JSON gives it back.
      differ: (that of process 0, that of this process) -> what differs, or None.

    Raises:
      AgreedError: naming the process.
    """
    group = peers()
    if group is not None:
        first, here = group.meet(purpose, value), json.loads(json.dumps(value))
        with agreed(purpose):
            difference = differ(first, here)
            if difference is not None:
                raise UserError(f"{difference}; accepted: the same in every process.")


def _first_error(heard: list[dict[str, Any]]) -> str | None:
    """What the processes agree on, from what each has said at a meeting."""
    failed = [rank for rank, said in enumerate(heard) if said["error"] is not None]
    if failed:
        error: str = heard[failed[0]]["error"]
        everywhere = len(failed) == len(heard) and len({said["error"] for said in heard}) == 1
        where = f"process{'es' * (len(failed) > 1)} {ranges(failed)} (on {heard[failed[0]]['host']})"
        return error if everywhere else f"In {where}: {error}"
    if len({said["purpose"] for said in heard}) > 1:
        raise RuntimeError(f"The processes are at different points: {[said['purpose'] for said in heard]}.")
    return None


# --- the end ------------------------------------------------------------------------------------------------------


def _describe(error: BaseException) -> tuple[str, int]:
    """An error in one paragraph, and the exit code that it gives."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted by Ctrl-C.", 128 + signal.SIGINT
    if isinstance(error, UserError):
        return str(error), error.exit_code
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}", 1


def _lost_connection(text: str) -> bool:
    """Whether an error is what the device reports when another process has died."""
    return any(sign in text for sign in ("Gloo", "gloo", "NCCL", "Connection reset", "Connection closed"))


def _print_error(text: str) -> None:
    print(f"lmobj: {text}", file=sys.stderr)


def _exit(code: int) -> None:
    """Ends this process without JAX's own end, which would wait for all the others and then abort."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
