"""Reads through the real Mooncake between two processes of its own environment. Skipped where it is not installed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from nodes.rdma_processes import BYTES, COUNT, SLAB, Node, python_of

pytestmark = pytest.mark.skipif(
    not python_of("mooncake").exists(),
    reason=".venv-mooncake is not there: run scripts/setup-mooncake",
)


def server_node() -> Node:
    """A server, once it serves."""
    server = Node("mooncake", "serve", str(COUNT), str(BYTES), MC_FORCE_TCP="1")
    server.first = server.hear()
    return server


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    """A server and a reader."""
    server, reader = server_node(), Node("mooncake", "read", MC_FORCE_TCP="1")
    reader.first = reader.hear()
    yield server, reader
    server.kill()
    reader.kill()


def test_pages_come_through_rdma_and_both_processes_end_cleanly(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    assert server.first["engines"] == ["zmq", "mooncake"]
    for number in (1, 2):
        result = reader.read(server)
        assert (result["outcomes"], result["right"]) == (["OK"] * COUNT, True)
        assert "pages_sent" not in server.until("pages_offered", number * COUNT)
    state = reader.until("free", SLAB)
    assert "remote_engine_failures" not in state
    for side in (reader, server):
        status, said = side.end()
        assert status == 0, said


def test_a_server_that_stops_before_the_fetch_costs_one_deadline(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    assert reader.read(server)["outcomes"] == ["OK"] * COUNT
    result = reader.read(server, 0.3, pid=server.process.pid, signal=signal.SIGSTOP)
    assert result["outcomes"] == ["LATE"] * COUNT
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


def test_a_server_that_stops_before_the_first_contact_delays_no_other_read(
    pair: tuple[Node, Node],
) -> None:
    stopped, reader = pair
    result = reader.read(stopped, 0.3, pid=stopped.process.pid, signal=signal.SIGSTOP)
    assert result["outcomes"] == ["LATE"] * COUNT
    other = server_node()
    try:
        result = reader.read(other)  # Mooncake's lock is held for a minute: over zmq
        assert (result["outcomes"], result["right"]) == (["OK"] * COUNT, True)
        assert result["seconds"] < 10
        other.until("pages_sent", COUNT)
    finally:
        other.kill()
    assert reader.ask(op="state")["free"] < SLAB
    status, said = reader.end()  # and the end of the process neither
    assert status == 0, said
    assert "its memory is kept" in said


@pytest.mark.parametrize("behind", [0, 1])
def test_a_server_that_dies_is_never_wrong_and_its_successor_is_read_through_rdma(
    pair: tuple[Node, Node], behind: int
) -> None:
    server, reader = pair
    result = reader.read(server, pid=server.process.pid, signal=signal.SIGKILL, behind=behind)
    assert result["right"]  # the pages that came before it died
    assert result["seconds"] < 10
    assert reader.ask(op="touched") == {"touched": []}
    assert behind or "OK" not in result["outcomes"]
    successor = server_node()
    try:
        result = reader.read(successor)  # another address: a new start for its breaker
        assert (result["outcomes"], result["right"]) == (["OK"] * COUNT, True)
        assert "pages_sent" not in successor.until("pages_offered", COUNT)
        if not behind:  # that memory rests for minutes
            reader.until("free", SLAB - COUNT * BYTES)
    finally:
        successor.kill()
    status, said = reader.end()
    assert status == 0, said
