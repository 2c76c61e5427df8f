"""Reads through the real NIXL between two processes of its own environment. Skipped where it is not installed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-nixl/bin/python"
NODE = ROOT / "tests/support/nixl_node.py"
COUNT, BYTES = 16, 256 << 10

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason=".venv-nixl is not there: run scripts/setup-nixl"
)


class Node:
    """A process of ``nixl_node.py``."""

    def __init__(self, *arguments: str) -> None:
        # Its own packages first; zmq and xxhash come from ours, which has the same Python. TCP as between two
        # machines: through shared memory a stopped server's pages are read all the same.
        path = [str(ROOT), str(ROOT / "tests/support"), *filter(None, sys.path)]
        self.process = subprocess.Popen(
            [str(PYTHON), "-c", _START, json.dumps(path), str(NODE), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "UCX_TLS": "tcp", "NIXL_LOG_LEVEL": "FATAL"},
        )  # fmt: skip
        self.first: dict[str, Any] = {}

    def hear(self) -> dict[str, Any]:
        """The next line it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        heard: dict[str, Any] = json.loads(line)
        return heard

    def ask(self, **what: Any) -> dict[str, Any]:
        """Say one line, hear one."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def read(self, server: Node, seconds: float = 20.0, **harm: int) -> dict[str, Any]:
        """Read all pages of a server."""
        address = server.first["address"]
        return self.ask(
            op="read", address=address, count=COUNT, bytes=BYTES, seconds=seconds, **harm
        )

    def until(self, name: str, value: int) -> dict[str, Any]:
        """Ask for its state or counts until one number in it is as given."""
        end = time.monotonic() + 20
        while (state := self.ask(op="state")).get(name, 0) != value:
            assert time.monotonic() < end, state
            time.sleep(0.01)
        return state

    def end(self) -> tuple[int, str]:
        """Let it end by itself: its status, and what it said on stderr."""
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said

    def kill(self) -> None:
        """SIGKILL, also if it is stopped."""
        self.process.kill()
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


_START = (
    "import json, runpy, sys; sys.path += json.loads(sys.argv[1]); del sys.argv[:2];"
    " runpy.run_path(sys.argv[0], run_name='__main__')"
)


@pytest.fixture
def pair() -> Iterator[tuple[Node, Node]]:
    """A server and a reader."""
    server, reader = Node("serve", str(COUNT), str(BYTES)), Node("read")
    server.first, reader.first = server.hear(), reader.hear()
    yield server, reader
    server.kill()
    reader.kill()


def test_pages_are_read_one_sided_and_both_sides_end_well(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    assert server.first["engines"] == ["zmq", "nixl"]
    for number in (1, 2):
        told = reader.read(server)
        assert (told["outcomes"], told["right"]) == (["OK"] * COUNT, True)
        assert "pages_sent" not in server.until("pages_offered", number * COUNT)
    state = reader.until("free", 64 << 20)
    assert "remote_engine_failures" not in state
    for node in (reader, server):  # memory is deregistered before it is freed, else SIGSEGV
        status, said = node.end()
        assert status == 0, said


def test_a_server_that_stops_before_the_fetch_costs_one_deadline(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    assert reader.read(server)["outcomes"] == ["OK"] * COUNT
    told = reader.read(server, 0.3, pid=server.process.pid, signal=signal.SIGSTOP)
    assert told["outcomes"] == ["LATE"] * COUNT
    assert told["seconds"] < 1.0
    state = reader.until("remote_engine_failures", 1)  # behind the read's deadline
    assert state["free"] == (64 << 20) - COUNT * BYTES
    server.process.send_signal(signal.SIGCONT)
    reader.until("free", 64 << 20)  # the late bytes have come, into the slab
    assert reader.ask(op="touched") == {"touched": []}
    end = time.monotonic() + 20
    while reader.read(server)["outcomes"] != ["OK"] * COUNT:
        assert time.monotonic() < end, "it did not come back"
        time.sleep(0.05)
    counts = server.ask(op="counts")  # over zmq, for a minute
    assert (counts["pages_offered"], counts["pages_sent"] > 0) == (2 * COUNT, True)


def test_a_reader_that_ends_during_a_transfer_ends_well(pair: tuple[Node, Node]) -> None:
    server, reader = pair
    told = reader.read(server, 0.3, pid=server.process.pid, signal=signal.SIGSTOP)
    assert told["outcomes"] == ["LATE"] * COUNT
    status, said = reader.end()
    assert status == 0, said
    assert "its memory is kept" in said


def test_a_server_that_dies_before_the_fetch_fails_at_once_and_its_successor_is_read_one_sided(
    pair: tuple[Node, Node],
) -> None:
    server, reader = pair
    told = reader.read(server, pid=server.process.pid, signal=signal.SIGKILL)
    assert "OK" not in told["outcomes"]
    assert told["seconds"] < 10
    assert reader.ask(op="touched") == {"touched": []}
    successor = Node("serve", str(COUNT), str(BYTES))
    try:
        successor.first = successor.hear()
        told = reader.read(successor)  # another address: a new start for its breaker
        assert (told["outcomes"], told["right"]) == (["OK"] * COUNT, True)
        successor.until("pages_offered", COUNT)
    finally:
        successor.kill()
    status, said = reader.end()
    assert status == 0, said
