"""Reads through the real NIXL between two processes of its own environment. Skipped where it is not installed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from nodes.rdma_processes import BYTES, COUNT, SLAB, Node, python_of

pytestmark = pytest.mark.skipif(
    not python_of("nixl").exists(), reason=".venv-nixl is not there: run scripts/setup-nixl"
)


def node(*arguments: str) -> Node:
    """Uses TCP as between two machines: shared memory would still deliver a stopped server's pages."""
    return Node("nixl", *arguments, UCX_TLS="tcp", NIXL_LOG_LEVEL="FATAL")


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    """A server and a reader."""
    server, reader = node("serve", str(COUNT), str(BYTES)), node("read")
    server.first, reader.first = server.hear(), reader.hear()
    yield server, reader
    server.kill()
    reader.kill()


def test_pages_come_through_rdma_and_both_processes_end_cleanly(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    assert server.first["engines"] == ["zmq", "nixl"]
    for number in (1, 2):
        result = reader.read(server)
        assert (result["outcomes"], result["right"]) == (["OK"] * COUNT, True)
        assert "pages_sent" not in server.until("pages_offered", number * COUNT)
    state = reader.until("free", SLAB)
    assert "remote_engine_failures" not in state
    for side in (reader, server):  # memory is deregistered before it is freed, else SIGSEGV
        status, said = side.end()
        assert status == 0, said


def test_a_server_that_stops_before_the_fetch_costs_one_deadline(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    assert reader.read(server)["outcomes"] == ["OK"] * COUNT
    result = reader.read(server, 0.3, pid=server.process.pid, signal=signal.SIGSTOP)
    assert result["outcomes"] == ["LATE"] * COUNT
    assert result["seconds"] < 1.0
    state = reader.until("remote_engine_failures", 1)  # behind the read's deadline
    assert state["free"] == SLAB - COUNT * BYTES
    server.process.send_signal(signal.SIGCONT)
    reader.until("free", SLAB)  # the late bytes have come, into the slab
    assert reader.ask(op="touched") == {"touched": []}
    end = time.monotonic() + 20
    while reader.read(server)["outcomes"] != ["OK"] * COUNT:
        assert time.monotonic() < end, "it did not come back"
        time.sleep(0.05)
    counts = server.ask(op="counts")  # over zmq, for a minute
    assert (counts["pages_offered"], counts["pages_sent"] > 0) == (2 * COUNT, True)


def test_a_reader_that_ends_during_a_transfer_ends_cleanly(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    result = reader.read(server, 0.3, pid=server.process.pid, signal=signal.SIGSTOP)
    assert result["outcomes"] == ["LATE"] * COUNT
    status, said = reader.end()
    assert status == 0, said
    assert "its memory is kept" in said


def test_a_server_that_dies_before_the_fetch_fails_at_once_and_its_successor_is_read_through_rdma(
    pair: tuple[Node, Node],
) -> None:
    server, reader = pair
    result = reader.read(server, pid=server.process.pid, signal=signal.SIGKILL)
    assert "OK" not in result["outcomes"]
    assert result["seconds"] < 10
    assert reader.ask(op="touched") == {"touched": []}
    successor = node("serve", str(COUNT), str(BYTES))
    try:
        successor.first = successor.hear()
        result = reader.read(successor)  # another address: a new start for its breaker
        assert (result["outcomes"], result["right"]) == (["OK"] * COUNT, True)
        successor.until("pages_offered", COUNT)
    finally:
        successor.kill()
    status, said = reader.end()
    assert status == 0, said
