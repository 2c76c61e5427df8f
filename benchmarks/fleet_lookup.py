"""Lookups of pages in the replica of other nodes: time, memory, delay of a change.

    flock QUIET python benchmarks/fleet_lookup.py --out benchmarks/results/fleet-lookup-DATE.csv

Real files in ``--dir`` (a tmpfs), a real writer and a real reader. A lookup is ``refresh`` and ``run`` until every
page has a peer or no peer has it, as in ``batch_exists``. Cases are interleaved. ``two peers`` are two runs.
``stairs``: all peers hold the prefix, each to another page, changes of all of them in the tables: the worst case.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.fleet.replica.files import Peer
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import BATCH_PAGES, NodeId, Op, Snapshot
from flexkv_sglang.bench.ssd import environment
from flexkv_sglang.types import U64

NAMESPACE = "n" * 26
COMMON = 20_000
CHAINS = 150
ROUNDS, CALLS = 30, 60


def no_peer(_: Peer) -> bool:
    """Pass over none."""
    return False


def spread(rng: np.random.Generator, count: int) -> U64:
    """Fingerprints, as SHA-256 makes them."""
    return rng.integers(0, 1 << 64, count, dtype=np.uint64)


class Fleet:
    """A writer that knows ``count`` peers with ``pages`` each, and a reader."""

    def __init__(self, run_dir: Path, count: int, pages: int) -> None:
        self.rng = np.random.default_rng(count)
        self.node_ids = [NodeId(f"node-{number}") for number in range(count)]
        self.writer = PeerSetsWriter(run_dir)
        self.common = spread(self.rng, COMMON)
        self.own: list[U64] = []
        self.reset_s: list[float] = []
        self.reader = PeerSetsReader(run_dir, NAMESPACE, 1e9)
        for number, node_id in enumerate(self.node_ids):
            fingerprints = np.sort(np.concatenate([spread(self.rng, pages - COMMON), self.common]))
            self.own.append(self.rng.choice(fingerprints, 20_000))
            self.writer.set_peer(node_id, number, f"host-{number}:1", up=True)
            begin = time.perf_counter()
            self.writer.reset(NAMESPACE, node_id, Snapshot(number, 0, fingerprints))
            self.reader.refresh()
            self.reader.run(self.common[:BATCH_PAGES], no_peer)
            self.reset_s.append(time.perf_counter() - begin)
        self.writer.tick()
        self.chains: list[U64] = []

    def change(self) -> float:
        """Chains that every peer holds to another page; seconds per fingerprint that was applied."""
        count, begin, changes = len(self.node_ids), time.perf_counter(), 0
        for _ in range(CHAINS):
            chain = spread(self.rng, BATCH_PAGES)
            for step, number in enumerate(self.rng.permutation(count).tolist()):
                held = chain[: -(-BATCH_PAGES * (step + 1) // count)]
                self.writer.apply(NAMESPACE, self.node_ids[number], Op.ADD, held)
                changes += len(held)
            self.chains.append(chain)
        return (time.perf_counter() - begin) / changes

    def questions(self) -> dict[str, Callable[[], U64]]:
        """By case: the next 128 fingerprints to ask for."""
        rng, half = self.rng, BATCH_PAGES // 2

        def one() -> U64:
            return rng.choice(self.own[rng.integers(len(self.own))], BATCH_PAGES)

        def two() -> U64:
            return np.concatenate([one()[:half], one()[:half]])

        cases = {
            "one peer": one,
            "all peers": lambda: rng.choice(self.common, BATCH_PAGES),
            "two peers": two,
            "first-page miss": lambda: spread(rng, BATCH_PAGES),
        }
        if self.chains:
            cases["stairs"] = lambda: self.chains[rng.integers(len(self.chains))]
        return cases

    def look_up(self, fingerprints: U64) -> int:
        """Find a peer for every page. How many have one."""
        self.reader.refresh()
        done = 0
        while done < len(fingerprints):
            answer = self.reader.run(fingerprints[done:], no_peer)
            if answer is None:
                break
            done += answer[1]
        return done


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one case, in us. ``cpu``: time of this thread on a core, without waiting for other threads."""

    us_p50: float
    us_p99: float
    cpu_us_p50: float
    cpu_us_p99: float
    found: float


def timed(fleet: Fleet) -> dict[str, Timing]:
    """Every case, interleaved."""
    times: dict[str, list[tuple[float, float]]] = {}
    found: dict[str, int] = {}
    questions = fleet.questions()
    for _, (case, ask) in itertools.product(range(ROUNDS), questions.items()):
        for _ in range(CALLS):
            fingerprints = ask()
            begin, cpu = time.perf_counter(), time.thread_time()
            count = fleet.look_up(fingerprints)
            spent = time.perf_counter() - begin, time.thread_time() - cpu
            times.setdefault(case, []).append(spent)
            found[case] = found.get(case, 0) + count
    return {case: timing(t, found[case]) for case, t in times.items()}


def timing(spent: list[tuple[float, float]], found: int) -> Timing:
    """Sum up (wall, CPU) seconds of calls."""
    figures = []
    for column in zip(*spent, strict=True):
        figures += [statistics.median(column) * 1e6, sorted(column)[int(len(column) * 0.99)] * 1e6]
    return Timing(*(round(figure, 1) for figure in (*figures, found / len(spent))))


def watch(run_dir: Path, pipe: Connection) -> None:
    """Another process: for each fingerprint from ``pipe``, when it was first seen (CLOCK_MONOTONIC, ns)."""
    reader = PeerSetsReader(run_dir, NAMESPACE, 1e9)
    reader.refresh()
    private = private_bytes()
    reader.run(np.zeros(1, np.uint64), no_peer)
    for _ in range(100):
        reader.refresh()
    pipe.send(private_bytes() - private)
    while (fp := pipe.recv()) is not None:
        wanted = np.array([fp], np.uint64)
        pipe.send(None)
        while True:
            reader.refresh()
            if reader.run(wanted, no_peer):
                break
        pipe.send(time.monotonic_ns())


def private_bytes() -> int:
    """Private memory of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def visibility(fleet: Fleet, run_dir: Path) -> tuple[float, float]:
    """Median and 99th percentile of apply -> seen by another process that looks all the time, in us."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=watch, args=(run_dir, there))
    process.start()
    here.recv()
    times = []
    for number in range(300):
        fp = spread(fleet.rng, 1)
        here.send(int(fp[0]))
        here.recv()
        time.sleep(0.001)
        begin = time.monotonic_ns()
        fleet.writer.apply(NAMESPACE, fleet.node_ids[number % len(fleet.node_ids)], Op.ADD, fp)
        times.append((here.recv() - begin) / 1e3)
    here.send(None)
    process.join()
    return statistics.median(times), sorted(times)[int(len(times) * 0.99)]


def network_calls(fleet: Fleet) -> int:
    """Socket events, from Python's audit hook, in 100 lookups of each case."""
    seen, armed = 0, True

    def hook(event: str, _: object) -> None:
        nonlocal seen
        seen += armed and event.startswith("socket.")

    sys.addaudithook(hook)
    for ask in fleet.questions().values():
        for _ in range(100):
            fleet.look_up(ask())
    armed = False
    return seen


def measure(run_dir: Path, count: int, pages: int) -> list[dict[str, object]]:
    """A row per case, first without changes in the tables, then with."""
    fleet, rows = Fleet(run_dir, count, pages), list[dict[str, object]]()
    file_bytes = sum(p.stat().st_blocks * 512 for p in run_dir.rglob("*") if p.is_file())
    shared: dict[str, object] = {
        "peers": count,
        "pages_per_peer": pages,
        "file_bytes_per_page": round(file_bytes / count / pages, 2),
        "reset_ms_p50": round(statistics.median(fleet.reset_s) * 1e3, 1),
        "reset_ms_max": round(max(fleet.reset_s) * 1e3, 1),
    }
    before = timed(fleet)
    shared["apply_us_per_page"] = round(fleet.change() * 1e6, 2)
    seen = visibility(fleet, run_dir)
    shared["visible_us_p50"], shared["visible_us_p99"] = round(seen[0], 1), round(seen[1], 1)
    for changed, figures in ((False, before), (True, timed(fleet))):
        for case, figure in figures.items():
            rows.append({"case": case, "changes": changed, **asdict(figure), **shared})
    calls = network_calls(fleet)
    return [row | {"network_calls": calls} for row in rows]


def main() -> None:
    """Run, write the CSV, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--peers", type=int, nargs="+", default=[8, 32, 100])
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for count in options.peers:
        with tempfile.TemporaryDirectory(dir=options.dir) as place:
            rows += measure(Path(place), count, options.pages)
    if options.out:
        rows = [{**row, "cpus": os.cpu_count(), **environment()} for row in rows]
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
