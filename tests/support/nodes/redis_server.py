"""A real redis-server (or sentinel) in a temporary directory: started, killed, stopped, continued, flushed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import redis

ACL = (
    "user fk on >{password} resetchannels ~fk1:* -@all +ping +hello +auth +eval +evalsha +script|load"
    " +time +zadd +zrange +zscore +zremrangebyscore +hset +hget +hmget +hdel +get +set +xadd +xread +pexpire"
)
"""The rule of docs/OPERATING.md."""


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class RedisServer:
    """One server on loopback. ``arguments``: further lines of its configuration. Not started by the constructor."""

    def __init__(
        self, directory: Path, *arguments: str, port: int = 0, sentinel: bool = False
    ) -> None:
        self.directory = directory
        self.port = port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._sentinel = sentinel
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: list[redis.Redis] = []

    def start(self) -> RedisServer:
        """Start, and wait until it answers; a refusal is an answer."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lines = [
            f"bind 127.0.0.1\ndir {self.directory}\n",
            *(f"{line}\n" for line in self._arguments),
        ]
        if not any("tls-port" in line for line in self._arguments):
            lines.append(f"port {self.port}\n")
        if not self._sentinel:
            lines.append('save ""\nappendonly no\n')
        config = self.directory / f"{self.port}.conf"
        config.write_text("".join(lines))
        command = ["redis-server", str(config), *(["--sentinel"] if self._sentinel else [])]
        with (self.directory / f"{self.port}.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
            except OSError:
                assert time.monotonic() < deadline, config.with_suffix(".log").read_text()
                assert self._process.poll() is None, config.with_suffix(".log").read_text()
                time.sleep(0.01)
            else:
                return self

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL; the next ``start`` finds nothing."""
        if self._process is not None:
            self.signal(signal.SIGCONT)
            self.signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self, **options: Any) -> redis.Redis:
        """A client for the test's own use; closed with the server."""
        self._clients.append(redis.Redis(port=self.port, protocol=2, **options))
        return self._clients[-1]

    def __enter__(self) -> RedisServer:
        return self.start()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.kill()
        for client in self._clients:
            client.close()
