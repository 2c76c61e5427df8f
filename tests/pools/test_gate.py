"""Many pass or one is alone; every wait ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.pools.call_gate import CallGate
from stores.engines import wait_until


@contextmanager
def inside(gate: CallGate) -> Iterator[None]:
    """Another thread passes for the time of the block."""
    entered, leave = threading.Event(), threading.Event()

    def call() -> None:
        with gate.shared(10):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=call)
    thread.start()
    assert entered.wait(10)
    try:
        yield
    finally:
        leave.set()
        thread.join(10)


def test_calls_do_not_exclude_each_other() -> None:
    gate = CallGate()
    with inside(gate), inside(gate), gate.shared(0.01):
        pass


def test_nobody_passes_while_it_is_shut_and_the_wait_ends() -> None:
    gate = CallGate()
    with gate.exclusive(0.01) as alone:
        assert alone
        with pytest.raises(TierUnavailableError), gate.shared(0.01):
            pass
    with gate.shared(0.01):
        pass


def test_whoever_is_not_alone_in_time_is_told_and_it_is_open_again() -> None:
    gate = CallGate()
    with inside(gate):
        with gate.exclusive(0.01) as alone:
            assert not alone
        with gate.shared(0.01):
            pass
    with gate.exclusive(0.01) as alone:
        assert alone


def test_one_at_a_time_is_alone() -> None:
    gate = CallGate()
    with gate.exclusive(0.01) as first, gate.exclusive(0.01) as second:
        assert (first, second) == (True, False)


def test_it_is_shut_after_the_last_one_left_and_new_ones_wait() -> None:
    gate = CallGate()
    order: list[str] = []

    def shut() -> None:
        with gate.exclusive(10) as alone:
            order.append(f"shut {alone}")

    def call() -> None:
        with gate.shared(10):
            order.append("call")

    with inside(gate):
        closer = threading.Thread(target=shut)
        closer.start()
        assert wait_until(lambda: gate._shut)
        caller = threading.Thread(target=call)
        caller.start()
        assert order == []
    closer.join(10)
    caller.join(10)
    assert order == ["shut True", "call"]


def test_an_exception_leaves_it_open() -> None:
    gate = CallGate()
    with pytest.raises(ZeroDivisionError), gate.shared(1):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), gate.exclusive(1):
        raise ZeroDivisionError
    with gate.exclusive(0.01) as alone:
        assert alone
