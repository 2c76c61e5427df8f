"""Page servers for tests: in this process, or in a process of their own that can be killed and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.reader.channel import Count
from flexkv_sglang.backends.fleet.reader.client import PeerClient, RemoteRead
from flexkv_sglang.backends.fleet.reader.read import Pending
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.transport import RdmaTransport
from flexkv_sglang.backends.fleet.vocabulary import (
    ChangeLog,
    NodeId,
    NodeInfo,
    PageSource,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire import curve
from flexkv_sglang.config.share import ShareConfig
from nodes.page_sources import MemorySource, PageMemory, keys_of

NID = NodeId("node-1")
EPOCH = 77
SPACE = bytes(range(16))
NAME = namespace_name(SPACE)
FULL = frozenset({ChecksumKind.XXH3_64})


def write_secret(path: Path, content: bytes = b"") -> str:
    """Write a secret file that only its owner may read."""
    path.write_bytes(content or os.urandom(48))
    path.chmod(0o600)
    return str(path)


@dataclass
class FixedNode:
    """A node with these pages and changes, by namespace."""

    sources: Mapping[str, PageSource] = field(default_factory=dict)
    logs: Mapping[str, ChangeLog] = field(default_factory=dict)
    transports: tuple[str, ...] = ("zmq",)

    def info(self) -> NodeInfo:
        """As ``ServedNode``, like the next two."""
        return NodeInfo(NID, EPOCH, "", namespaces=(NAME,), engines=self.transports)

    def pages_of(self, namespace: str) -> PageSource | None:
        return self.sources.get(namespace)

    def changes_of(self, namespace: str) -> ChangeLog | None:
        return self.logs.get(namespace)


@contextmanager
def serving(
    source: PageSource | None,
    share: ShareConfig | None = None,
    logs: Mapping[str, ChangeLog] | None = None,
    transport: RdmaTransport | None = None,
) -> Iterator[tuple[PageServer, str]]:
    """A page server in this process, and its address."""
    share = share or ShareConfig(listen="127.0.0.1:0")
    node = FixedNode({} if source is None else {NAME: source}, logs or {})
    server = PageServer(share, curve.load_secret(share), node, transport)
    node.transports = server.transports
    address = server.start()
    try:
        yield server, address
    finally:
        assert server.close()


@contextmanager
def reading(
    share: ShareConfig | None = None,
    transport: RdmaTransport | None = None,
    count: Count = lambda name, amount: None,
) -> Iterator[PeerClient]:
    """A client, closed at the end."""
    client = PeerClient(share or ShareConfig(), count, transport)
    try:
        yield client
    finally:
        client.close()


def begin(
    client: PeerClient,
    address: str,
    keys: list,
    memory: PageMemory,
    seconds: float = 10.0,
    accepted: frozenset[ChecksumKind] = FULL,
    epoch: int = EPOCH,
) -> Pending:
    """Start a read from the node of these tests."""
    deadline = time.monotonic() + seconds
    pending = client.begin(
        RemoteRead(NID, epoch, address, SPACE, keys, memory.buffers, accepted, deadline)
    )
    pending.memory = memory  # must live until wait has returned
    return pending


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until ``true()``."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not become true"
        time.sleep(0.005)


class ServerProcess:
    """A page server of ``count`` pages in a process of its own."""

    def __init__(self, count: int, payload_bytes: int, port: int = 0) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(count), str(payload_bytes), str(port)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert self._process.stdout is not None
        self.address = json.loads(self._process.stdout.readline())

    def stop(self) -> None:
        """SIGSTOP."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.wait(10)

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *ignored: object) -> None:
        self.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def main() -> None:
    """The process: serves until stdin ends."""
    count, payload_bytes, port = map(int, sys.argv[1:])
    source = MemorySource(keys_of(count), payload_bytes)
    with serving(source, ShareConfig(listen=f"127.0.0.1:{port}")) as (_, address):
        print(json.dumps(address), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
