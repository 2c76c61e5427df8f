"""Many share the gate, or one has it exclusively; every wait ends."""

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
    """Another thread shares the gate for the time of the block."""
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


def test_no_call_enters_while_one_is_alone_and_the_wait_ends() -> None:
    gate = CallGate()
    with gate.exclusive(0.01) as alone:
        assert alone
        with pytest.raises(TierUnavailableError), gate.shared(0.01):
            pass
    with gate.shared(0.01):
        pass


def test_a_wait_to_be_alone_ends_with_false_and_the_gate_is_open_again() -> None:
    gate = CallGate()
    with inside(gate):
        with gate.exclusive(0.01) as alone:
            assert not alone
        with gate.shared(0.01):
            pass
    with gate.exclusive(0.01) as alone:
        assert alone


def test_only_one_at_a_time_is_alone() -> None:
    gate = CallGate()
    with gate.exclusive(0.01) as first, gate.exclusive(0.01) as second:
        assert (first, second) == (True, False)


def test_one_is_alone_after_the_last_call_and_new_calls_wait() -> None:
    gate = CallGate()
    order: list[str] = []

    def close() -> None:
        with gate.exclusive(10) as alone:
            order.append(f"alone {alone}")

    def call() -> None:
        with gate.shared(10):
            order.append("call")

    with inside(gate):
        closer = threading.Thread(target=close)
        closer.start()
        assert wait_until(lambda: gate._taken)
        caller = threading.Thread(target=call)
        caller.start()
        assert order == []
    closer.join(10)
    caller.join(10)
    assert order == ["alone True", "call"]


def test_an_exception_leaves_it_open() -> None:
    gate = CallGate()
    with pytest.raises(ZeroDivisionError), gate.shared(1):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), gate.exclusive(1):
        raise ZeroDivisionError
    with gate.exclusive(0.01) as alone:
        assert alone
