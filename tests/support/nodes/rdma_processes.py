"""Processes of ``rdma_node.py``, each in the environment of an RDMA transport (``scripts/setup-nixl``, ...)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
NODE = ROOT / "tests/support/nodes/rdma_node.py"
COUNT, BYTES = 16, 256 << 10
SLAB = 64 << 20


def python_of(transport: str) -> Path:
    """The interpreter of its environment; it may be missing."""
    return ROOT / f".venv-{transport}/bin/python"


class Node:
    """A process: ``serve COUNT BYTES`` or ``read``. ``variables``: of its environment."""

    def __init__(self, transport: str, *arguments: str, **variables: str) -> None:
        # Its own packages first; zmq and xxhash come from ours, which has the same Python
        path = [str(ROOT), str(ROOT / "tests/support"), *filter(None, sys.path)]
        self.process = subprocess.Popen(
            [str(python_of(transport)), "-c", _START, json.dumps(path), str(NODE), transport, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **variables},
        )  # fmt: skip
        self.first: dict[str, Any] = {}

    def hear(self) -> dict[str, Any]:
        """The next line of its output."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.end()
        heard: dict[str, Any] = json.loads(line)
        return heard

    def ask(self, **what: Any) -> dict[str, Any]:
        """Send one line, read one."""
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
        """Ask for its state or counts until ``name`` has ``value``."""
        end = time.monotonic() + 20
        while (state := self.ask(op="state")).get(name, 0) != value:
            assert time.monotonic() < end, state
            time.sleep(0.01)
        return state

    def end(self) -> tuple[int, str]:
        """Close its input and wait: (exit status, stderr)."""
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
