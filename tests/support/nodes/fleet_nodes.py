"""Nodes of a fleet for tests: each has a directory, a run directory, an agent and rank processes.

On loopback, or on a host of a ``flexkv_bed.netns.Cluster``. Everything is a real process: agents are the ones that
rank processes start.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from flexkv_sglang.sharing.run_dir import RunDir

PAGE_BYTES = 64 << 10
ANSWER_S = 60.0
_SUPPORT = Path(__file__).resolve().parent


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Poll until it is true. False: the time is over."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return True


class Rank:
    """A running ``fleet_rank`` process. Calls are its commands."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("ab") as stderr:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
            )
        assert self._line() == {"ready": True}

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """One command, one answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._line()

    def put(self, seed: int, pages: int, start: int = 0) -> int:
        return int(self.ask("put", seed=seed, pages=pages, start=start)["done"])

    def prefix(self, seed: int, pages: int) -> int:
        return int(self.ask("prefix", seed=seed, pages=pages)["pages"])

    def get(self, seed: int, pages: int, seconds: float = 5.0) -> dict[str, Any]:
        answer = self.ask("get", seed=seed, pages=pages, seconds=seconds)
        assert answer["wrong"] == 0, answer
        assert answer["leading"], answer
        return answer

    def counters(self) -> dict[str, int]:
        return dict(self.ask("counters")["counters"])

    def stop(self) -> None:
        """End the process normally."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=30) == 0, self.log_text()
        self._close()

    def kill(self) -> None:
        """SIGKILL. A dead process is ignored."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        self._close()

    def log_text(self) -> str:
        return self._log.read_text(errors="replace")

    def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the rank process ended: {self.log_text()[-3000:]}"
        return dict(json.loads(line))

    def _close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None and not pipe.closed:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue


class Node:
    """One node. ``share``: settings added to the tests' defaults. ``prefix``: a command that runs others there.

    ``times``: fields of ``ShareConfig`` that are no settings, of the agent and the rank processes.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        size: int = 64 << 20,
        page_bytes: int = PAGE_BYTES,
        prefix: Sequence[str] = (),
        extra: dict[str, Any] | None = None,
        times: dict[str, float] | None = None,
        **share: Any,
    ) -> None:
        self.name = name
        self.directory = directory / name
        self.page_bytes = page_bytes
        self.pages_dir = self.directory / "pages"
        self.run_dir = RunDir(self.directory / "run")
        self._prefix = tuple(prefix)
        self._ranks: list[Rank] = []
        self.directory.mkdir(parents=True, exist_ok=True)
        self.times = {"heartbeat_s": 0.3, "node_ttl_s": 1.5, "agent_linger_s": 600, **(times or {})}
        self.config = {
            "path": str(self.pages_dir),
            "size": size,
            "share": {"nid": name, "run_dir": str(self.run_dir.path), **share},
            **(extra or {}),
        }
        self.config_path = self.directory / "config.json"
        self.write_config()

    def write_config(self) -> None:
        """Write the changed ``config``."""
        self.config_path.write_text(json.dumps(self.config))

    def rank(self) -> Rank:
        """Start a rank process, and so an agent."""
        command = [*self._prefix, sys.executable, "-P", str(_SUPPORT / "fleet_rank.py")]
        command += [str(self.config_path), str(self.page_bytes), json.dumps(self.times)]
        rank = Rank(command, self.directory / "rank.log")
        self._ranks.append(rank)
        return rank

    @property
    def agent_pid(self) -> int | None:
        """Process id of the living agent."""
        agent = self.run_dir.agent() if self.run_dir.path.exists() else None
        return agent.get("pid") if agent else None

    def status(self) -> dict[str, Any]:
        """The agent's last report."""
        try:
            return dict(json.loads(self.run_dir.status_path.read_text()))
        except (OSError, ValueError):
            return {}

    def peers(self) -> dict[str, dict[str, Any]]:
        """Other nodes, as this one's agent sees them."""
        return {peer["nid"]: peer for peer in self.status().get("peers", [])}

    def sees(self, other: str, pages: int) -> bool:
        """True if ``other`` is up with ``pages`` pages."""
        peer = self.peers().get(other, {})
        return peer.get("state") == "up" and peer.get("pages", -1) == pages

    def signal_agent(self, number: signal.Signals) -> int:
        """Send a signal to the agent; its process id."""
        assert eventually(lambda: self.agent_pid is not None, 15), self.agent_log()
        pid = self.agent_pid
        assert pid is not None
        os.kill(pid, number)
        return pid

    def agent_log(self) -> str:
        try:
            return self.run_dir.log_path.read_text(errors="replace")
        except OSError:
            return "no log"

    def close(self) -> None:
        """Kill everything of this node."""
        for rank in self._ranks:
            rank.kill()
        for _ in range(100):
            pid = self.agent_pid
            if pid is None:
                return
            for number in (signal.SIGCONT, signal.SIGKILL):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    break
            time.sleep(0.02)

    def __enter__(self) -> Node:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
