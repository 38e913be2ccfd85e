"""What a signal does while somebody listens, and after."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from lmobj.train.signals import Stopped, StopRequest, listen


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that reach the handlers which were there before anybody listened."""
    numbers: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, frame: numbers.append(number))
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_request_and_the_second_acts(received: list[int], number: signal.Signals) -> None:
    with listen() as request:
        assert request.signal_number is None
        signal.raise_signal(number)
        assert request.signal_number == number
        assert received == []
        signal.raise_signal(number)
        assert received == [number]


def test_handlers_are_put_back(received: list[int]) -> None:
    with listen():
        pass
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyError), listen():
        raise KeyError
    signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


def test_elsewhere_than_in_the_main_thread_nothing_is_installed(received: list[int]) -> None:
    requests: list[StopRequest] = []

    def work() -> None:
        with listen() as request:
            requests.append(request)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    signal.raise_signal(signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert requests[0].signal_number is None


def test_exit_codes_are_those_that_schedulers_know() -> None:
    assert Stopped(signal.SIGTERM).code == 143
    assert Stopped(signal.SIGINT).code == 130
