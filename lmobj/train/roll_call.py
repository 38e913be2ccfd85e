"""Who has come: every process reports to process 0 before JAX is started, and learns who is missing.

JAX's own start waits for all processes too, but where one does not come it aborts the others without naming it. So
process 0 listens first on the coordinator's address, each process sends its number and its host in one line of JSON,
and after the last, or when the time is over, process 0 answers all of them. Then the address is free for JAX.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lmobj.errors import UserError

__all__ = ["call_roll", "ranges"]

_LONGEST_LINE = 1 << 20
_GRACE = 10.0
"""Seconds beyond the time-out in which process 0's answer is waited for."""
_PATIENCE = 2.0
"""Seconds that one connection may take to say who it is."""
_REPORT = {"process": int, "processes": int, "host": str}


def call_roll(address: str, processes: int, process: int, timeout: float) -> None:
    """Returns once all processes have called it with the same address and number of processes.

    Args:
      address: HOST:PORT of process 0.
      processes: how many there are.
      process: which one this is, from 0.
      timeout: seconds to wait for the last.

    Raises:
      UserError: in every process that has come, naming those that have not, or the two that claim one number.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    if process == 0:
        _lead(address, int(port), processes, deadline, timeout)
    else:
        _report(host.strip("[]"), int(port), processes, process, deadline, timeout)


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text: 1, 4-7, 9."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


# --- process 0 ----------------------------------------------------------------------------------------------------


def _lead(address: str, port: int, processes: int, deadline: float, timeout: float) -> None:
    present: dict[int, socket.socket] = {}
    hosts = {0: socket.gethostname()}
    with contextlib.ExitStack() as connections:
        server = connections.enter_context(_listening(address, port))
        try:
            while len(hosts) < processes:
                arrival = _arrival(server, deadline)
                if arrival is None:
                    missing = [rank for rank in range(processes) if rank not in hosts]
                    raise UserError(
                        f"process{'es' * (len(missing) > 1)} {ranges(missing)} of {processes} did not join at "
                        f"{address} within {timeout:g} seconds; joined: {_told(hosts)}. Start all of them within that "
                        "time, each with its own number, where that address can be reached; --join-timeout sets the "
                        "time."
                    )
                connection, report = arrival
                connections.enter_context(connection)
                for gone in [rank for rank, other in present.items() if _closed(other)]:
                    del present[gone], hosts[gone]
                _check(report, processes, hosts, connection)
                present[report["process"]], hosts[report["process"]] = connection, report["host"]
        except UserError as error:
            _answer(present, {"error": str(error)})
            raise
        _answer(present, {"go": True})


def _check(report: Mapping[str, Any], processes: int, hosts: Mapping[int, str], connection: socket.socket) -> None:
    """Refuses, here and in the process that reports, what does not fit those that are there."""
    process, host = report["process"], report["host"]
    if report["processes"] != processes:
        error = f"--processes is {report['processes']} in a process on {host} and {processes} in process 0"
    elif process in hosts:
        error = f"--process {process} was given to two processes, on {hosts[process]} and on {host}"
    else:
        return
    error += f"; accepted: one number of processes in all, which are numbered 0 to {processes - 1}."
    _answer({process: connection}, {"error": error})
    raise UserError(error)


def _arrival(server: socket.socket, deadline: float) -> tuple[socket.socket, dict[str, Any]] | None:
    """The next process that reports, or None at the deadline; what else connects is hung up on."""
    while (left := deadline - time.monotonic()) > 0:
        server.settimeout(left)
        try:
            connection, _ = server.accept()
        except TimeoutError:
            return None
        report = _read(connection, time.monotonic() + _PATIENCE)
        if report is not None and all(isinstance(report.get(name), kind) for name, kind in _REPORT.items()):
            return connection, report
        connection.close()
    return None


def _answer(present: Mapping[int, socket.socket], answer: dict[str, Any]) -> None:
    """Tells everybody, and lets them hang up first, which leaves the port free at once."""
    for connection in present.values():
        with contextlib.suppress(OSError):
            _send(connection, answer)
    until = time.monotonic() + _PATIENCE
    for connection in present.values():
        _read(connection, until)


def _listening(address: str, port: int) -> socket.socket:
    """A socket on all of this machine's addresses, as JAX's coordinator listens."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"The coordinator's address is {address}, and process 0 cannot listen there ({error.strerror}); accepted: "
            "an address of the machine of process 0 with a free port."
        ) from None


def _closed(connection: socket.socket) -> bool:
    """Whether the other side has hung up."""
    connection.settimeout(0)
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


# --- the other processes ------------------------------------------------------------------------------------------


def _report(host: str, port: int, processes: int, process: int, deadline: float, timeout: float) -> None:
    """Reports to process 0 and waits for its answer; tries again while process 0 is not there."""
    report = {"process": process, "processes": processes, "host": socket.gethostname()}
    why = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())) as connection:
                _send(connection, report)
                # Process 0 may have come later, and waits from then on.
                answer = _read(connection, time.monotonic() + timeout + _GRACE)
        except OSError as error:
            answer, why = None, error.strerror or str(error)
        if answer is not None and "error" in answer:
            raise UserError(answer["error"])
        if answer is not None and "go" in answer:
            return
        time.sleep(0.2)
    raise UserError(
        f"process 0 of {processes} did not join: at {host}:{port} nothing answered process {process} within "
        f"{timeout:g} seconds ({why}). Start process 0 on that host within that time; accepted: the same coordinator "
        "HOST:PORT in every process, reachable from all; --join-timeout sets the time."
    )


# --- lines of JSON ------------------------------------------------------------------------------------------------


def _send(connection: socket.socket, value: dict[str, Any]) -> None:
    connection.settimeout(_PATIENCE)
    connection.sendall(json.dumps(value).encode() + b"\n")


def _read(connection: socket.socket, until: float) -> dict[str, Any] | None:
    """One line that the other side sends; None if it hangs up, stays silent, or talks otherwise."""
    line = b""
    try:
        while not line.endswith(b"\n") and len(line) < _LONGEST_LINE:
            connection.settimeout(max(0.01, until - time.monotonic()))
            piece = connection.recv(4096)
            if not piece:
                return None
            line += piece
        value = json.loads(line)
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _told(hosts: Mapping[int, str]) -> str:
    """The processes that have come, host by host; the first few hosts."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(hosts):
        by_host.setdefault(hosts[rank], []).append(rank)
    told = [f"{ranges(ranks)} on {host}" for host, ranks in by_host.items()]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} hosts more" if len(told) > 8 else "")
