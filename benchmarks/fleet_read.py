"""Reads of 128 pages at another process: our data plane beside one raw TCP stream, on loopback or over a cable.

    .venv/bin/python benchmarks/fleet_read.py [--dir DIR] [--reps 7] [--page-kib 128 1024 8192] [--out NAME.csv]
    .venv/bin/python benchmarks/fleet_read.py --gbit 10 ...      between two network namespaces; needs root

Each contender has a server process of its own; all fill the same host memory, two buffers per page. ``tcp`` is
sendall and recv_into of the same pages, checks nothing and asks for nothing; ours verifies every page before it
is copied. ``memory``: pages lie in the server's memory (copied into its slabs, as a memory tier would be);
``disk``: in a file read with O_DIRECT. Repetitions are interleaved; ratios are medians of ratios within one.
CPU time is of both processes, all threads. The last line printed is one JSON object.

On loopback nothing but the processors limits either side, and both sides share them. ``--gbit`` puts reader and
server on two hosts (network namespaces), with a cable of that rate between them (tc, token bucket).
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import json
import mmap
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_bed.netns import Cluster
from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.backends.fleet.reader.client import PeerClient, RemoteRead
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.vocabulary import (
    NodeId,
    NodeInfo,
    PageStatus,
    ServedPage,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire import curve
from flexkv_sglang.backends.io.probe import make_engine, probe_directory
from flexkv_sglang.backends.io.transfer import PageTransfer
from flexkv_sglang.bench.ssd import environment
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.types import PageBuffers, PageKey

PAGES = 128
NAMESPACE = bytes(range(16))
NID = NodeId("bench")
DISTINCT_BYTES = 256 << 20
LISTEN = "127.0.0.1"
SERVER_COMMAND: list[str] = []
CONTENDERS = ("tcp", "memory plain", "disk plain", "memory hmac", "memory curve", "disk curve")


def key_of(number: int) -> PageKey:
    """Key of one page."""
    return PageKey(number.to_bytes(8, "little") * 4)


class Pages:
    """The pages of a run in this process's memory; at most ``DISTINCT_BYTES`` of them, then they repeat."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.distinct = min(PAGES, DISTINCT_BYTES // page_bytes)
        self.map = mmap.mmap(-1, self.distinct * page_bytes)
        self.memory = np.frombuffer(self.map, np.uint8)
        piece = np.random.default_rng(7).integers(0, 256, 1 << 20, np.uint8)
        for start in range(0, len(self.memory), len(piece)):
            part = self.memory[start : start + len(piece)]
            part[:] = piece[: len(part)]
            part[:8] = np.frombuffer(start.to_bytes(8, "little"), np.uint8)

    def address(self, number: int) -> int:
        """Where page ``number`` lies."""
        return int(self.memory.ctypes.data) + number % self.distinct * self.page_bytes

    def checksum(self, number: int) -> int:
        """The checksum that its journal record would have."""
        return page_checksum(
            ChecksumKind.XXH3_64, key_of(number), [(self.address(number), self.page_bytes)]
        )


class Source:
    """A ``PageSource``: from memory, or from ``file``."""

    def __init__(self, pages: Pages, file: Path | None) -> None:
        self.payload_bytes = pages.page_bytes
        self._pages = pages
        self._sums = [pages.checksum(number) for number in range(PAGES)]
        self._fd = -1
        if file is not None:
            mode = probe_directory(str(file.parent))
            self._engine = make_engine(mode.engine)
            self._fd = os.open(file, os.O_RDONLY | mode.open_flags)

    def read(
        self, keys: Sequence[PageKey], addresses: Sequence[int], deadline: float
    ) -> list[ServedPage]:
        """As ``PageSource``."""
        numbers = [int.from_bytes(key[:8], "little") for key in keys]
        if self._fd < 0:
            for number, address in zip(numbers, addresses, strict=True):
                ctypes.memmove(address, self._pages.address(number), self.payload_bytes)
        else:
            rows = np.array(addresses, np.uint64)[:, None]
            transfer = PageTransfer(
                np.full(len(keys), self._fd, np.int32),
                np.array(numbers, np.uint64) * np.uint64(self.payload_bytes),
                (),
                PageBuffers(rows, np.array([self.payload_bytes], np.uint64)),
                deadline,
            )
            self._engine.move(transfer)
            assert (transfer.moved == self.payload_bytes).all()
        kind = ChecksumKind.XXH3_64
        return [ServedPage(PageStatus.OK, kind, self._sums[number]) for number in numbers]

    def reported_bad(self, keys: Sequence[PageKey]) -> None:
        """No page is bad here."""
        raise AssertionError(keys)


def count_nothing(_name: str, _amount: int) -> None:
    """Metrics that are not read."""


def share_of(contender: str, secret: Path) -> ShareConfig:
    """Settings of a contender, for both sides."""
    auth = contender.split()[1]
    secret_file = None if auth == "plain" else str(secret)
    return ShareConfig(
        listen=f"{LISTEN}:0",
        secret_file=secret_file,
        auth="hmac" if auth == "hmac" else "curve",
        insecure=auth == "plain",
    )


class OneNamespace:
    """A ``ServedNode`` with the pages of one source."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def info(self) -> NodeInfo:
        return NodeInfo(NID, 1, "")

    def pages_of(self, namespace: str) -> Source | None:
        return self._source if namespace == namespace_name(NAMESPACE) else None

    def changes_of(self, _namespace: str) -> None:
        return None


def serve(contender: str, page_bytes: int, place: Path) -> None:
    """The server's process: prints its address, then its CPU time for each line of input."""
    pages = Pages(page_bytes)
    if contender == "tcp":
        serve_tcp(pages)
        return
    share = share_of(contender, place / "secret")
    source = Source(pages, place / f"{page_bytes}" if contender.startswith("disk") else None)
    server = PageServer(share, curve.load_secret(share), OneNamespace(source))
    print(server.start(), flush=True)
    tell_cpu()
    server.close()


def serve_tcp(pages: Pages) -> None:
    """One byte in, 128 pages out."""
    import threading

    listener = socket.create_server((LISTEN, 0))
    print(f"{LISTEN}:{listener.getsockname()[1]}", flush=True)
    connection = listener.accept()[0]
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    views = [
        memoryview((ctypes.c_ubyte * pages.page_bytes).from_address(pages.address(number)))
        for number in range(PAGES)
    ]

    def answer() -> None:
        while connection.recv(1):
            for view in views:
                connection.sendall(view)

    threading.Thread(target=answer, daemon=True).start()
    tell_cpu()


def tell_cpu() -> None:
    """CPU seconds of this process for each line of stdin."""
    for _ in sys.stdin:
        print(time.process_time(), flush=True)


@dataclass
class Contender:
    """One server process and how its pages are read; ``read`` fills all targets."""

    name: str
    process: subprocess.Popen[str]
    read: Callable[[], None]
    close: Callable[[], None]

    def cpu(self) -> float:
        """CPU seconds of its server so far."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        """Close both sides."""
        self.close()
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


def start(name: str, page_bytes: int, place: Path, targets: np.ndarray) -> Contender:
    """Start the server of a contender and connect to it."""
    process = subprocess.Popen(
        [*SERVER_COMMAND, sys.executable, __file__, "--serve", name, "--page-kib", str(page_bytes >> 10),
         "--dir", str(place), "--listen", LISTEN],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    if name == "tcp":
        host, port = address.split(":")
        stream = socket.create_connection((host, int(port)))
        view = memoryview(targets).cast("B")

        def read_tcp() -> None:
            stream.sendall(b"x")
            filled = 0
            while filled < len(view):
                filled += stream.recv_into(view[filled:])

        return Contender(name, process, read_tcp, stream.close)
    client = PeerClient(share_of(name, place / "secret"), count_nothing)
    half = page_bytes // 2
    rows = targets.ctypes.data + np.arange(PAGES, dtype=np.uint64) * np.uint64(page_bytes)
    buffers = PageBuffers(
        np.stack([rows, rows + np.uint64(half)], axis=1), np.array([half, half], np.uint64)
    )
    keys = [key_of(number) for number in range(PAGES)]
    kinds = frozenset({ChecksumKind.XXH3_64})

    def read() -> None:
        outcomes = client.begin(
            RemoteRead(NID, 1, address, NAMESPACE, keys, buffers, kinds, time.monotonic() + 60)
        ).wait()
        assert set(outcomes) == {PageOutcome.OK}, outcomes

    return Contender(name, process, read, client.close)


def measure(contender: Contender, page_bytes: int) -> dict[str, float]:
    """GB/s and CPU seconds per GB of both sides."""
    batch = PAGES * page_bytes
    rounds = max(1, (256 << 20) // batch)
    server, client, begin = contender.cpu(), time.process_time(), time.perf_counter()
    for _ in range(rounds):
        contender.read()
    seconds = time.perf_counter() - begin
    client = time.process_time() - client
    server = contender.cpu() - server
    gb = rounds * batch / 1e9
    return {
        "gb_per_s": gb / seconds,
        "client_s_per_gb": client / gb,
        "server_s_per_gb": server / gb,
    }


def run_size(
    page_bytes: int, place: Path, reps: int, names: Sequence[str]
) -> list[dict[str, object]]:
    """All repetitions at one page size."""
    pages = Pages(page_bytes)
    with (place / f"{page_bytes}").open("wb") as file:
        for number in range(PAGES):
            file.write(ctypes.string_at(pages.address(number), page_bytes))
    targets = np.zeros((PAGES, page_bytes), np.uint8)
    contenders = [start(name, page_bytes, place, targets) for name in names]
    rows: list[dict[str, object]] = []
    try:
        for contender in contenders:
            targets[:] = 0
            contender.read()
            for number in range(PAGES):
                assert targets[number, 8:64].tobytes() == ctypes.string_at(
                    pages.address(number) + 8, 56
                )
        for rep in range(reps):
            for contender in random.sample(contenders, len(contenders)):
                result = measure(contender, page_bytes)
                rows.append({"page_kib": page_bytes >> 10, "contender": contender.name, "rep": rep + 1,
                             **{name: round(value, 4) for name, value in result.items()}})  # fmt: skip
    finally:
        for contender in contenders:
            contender.end()
        (place / f"{page_bytes}").unlink()
    return rows


def summary(rows: Sequence[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Per contender: median GB/s, median of its ratios to tcp in the same repetition, median CPU per GB."""
    answer: dict[str, dict[str, float]] = {}
    tcp = {row["rep"]: float(str(row["gb_per_s"])) for row in rows if row["contender"] == "tcp"}
    for name in dict.fromkeys(str(row["contender"]) for row in rows):
        own = [row for row in rows if row["contender"] == name]
        ratios = [float(str(row["gb_per_s"])) / tcp[row["rep"]] for row in own]
        answer[name] = {"of_tcp": round(statistics.median(ratios), 2)} | {
            field: round(statistics.median(float(str(row[field])) for row in own), 3)
            for field in ("gb_per_s", "client_s_per_gb", "server_s_per_gb")
        }
    return answer


def on_two_hosts(gbit: float) -> int:
    """This command again, on one of two hosts; its servers on the other."""
    with Cluster(["reader", "server"]) as cluster:
        shape = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf",
                 "rate", f"{gbit}gbit", "burst", "8mb", "latency", "20ms"]  # fmt: skip
        subprocess.run([*cluster.command("server"), *shape], check=True)
        again = [sys.executable, *sys.argv, "--server-netns", cluster.name("server")]
        again += ["--listen", cluster.address("server")]
        return subprocess.run([*cluster.command("reader"), *again], check=False).returncode


def main() -> int:
    """Measure, print, write the CSV."""
    global LISTEN, SERVER_COMMAND
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, help="where the files lie (default: a temporary directory)"
    )
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--page-kib", type=int, nargs="+", default=[128, 1024, 8192])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS[1:], default=CONTENDERS[1:])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--gbit", type=float, default=0, help="of the cable (default: loopback)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--listen", default=LISTEN, help=argparse.SUPPRESS)
    parser.add_argument("--server-netns", help=argparse.SUPPRESS)
    options = parser.parse_args()
    LISTEN = options.listen
    if options.server_netns:
        SERVER_COMMAND = ["ip", "netns", "exec", options.server_netns]
    elif options.gbit:
        return on_two_hosts(options.gbit)
    if options.serve:
        serve(options.serve, options.page_kib[0] << 10, options.dir)
        return 0
    rows: list[dict[str, object]] = []
    answer: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="flexkv-fleet-", dir=options.dir) as folder:
        place = Path(folder)
        (place / "secret").write_bytes(os.urandom(32))
        (place / "secret").chmod(0o600)
        for kib in options.page_kib:
            found = run_size(kib << 10, place, options.reps, ["tcp", *options.only])
            rows += [{**row, "gbit": options.gbit} for row in found]
            answer[str(kib)] = summary(found)
            for name, figures in answer[str(kib)].items():
                print(f"{kib:5} KiB  {name:13} {figures}", flush=True)
    if options.out:
        about = environment()
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *about])
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
