"""Time of one call of 128 pages by stage: milliseconds, of the fastest of several passes.

    .venv/bin/python benchmarks/timeline.py --dir DIR [--page-bytes 65536 262144 1048576] [--out NAME.csv]

Stages are methods with a clock around them; a stage contains those that are indented below it. ``wait`` is the
system call in which the ring submits and waits. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.io import mover, operations, ring, transfer
from flexkv_sglang.bench.contenders import BATCH, BenchPool, FlexKVContender
from flexkv_sglang.bench.memory import HostMemory
from flexkv_sglang.bench.ssd import environment
from flexkv_sglang.cache import engine, local_pages
from flexkv_sglang.integration import storage as adapter
from flexkv_sglang.pools import host_pages

PASSES = 7
STAGES: tuple[tuple[str, Any, str], ...] = (
    ("  page addresses", host_pages.HostPages, "outgoing"),
    ("  page addresses", host_pages.HostPages, "incoming"),
    ("  keys", adapter, "page_keys"),
    ("  engine", engine.CacheEngine, "get"),
    ("  engine", engine.CacheEngine, "put"),
    ("    plan", engine.GetPlan, "__init__"),
    ("    plan", local_pages.LocalPages, "reserve"),
    ("    move", mover.PageMover, "move"),
    ("      operations", operations.Operations, "__init__"),
    ("      wait", ring.Ring, "_enter"),
    ("      checksums", transfer.PageTransfer, "run_pending"),
    ("    records and index", engine.CacheEngine, "_commit"),
)


class Clock:
    """Seconds by stage since the last ``take``."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    def watch(self, stage: str, owner: Any, name: str) -> None:
        """Put a clock around ``owner.name``."""
        original: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._spent[stage] = self._spent.get(stage, 0.0) + time.perf_counter() - begin

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        """Seconds since the last ``take``; starts again at 0."""
        spent, self._spent = self._spent, {}
        return spent


def stages_of(
    store: FlexKVContender, direction: str, clock: Clock, generation: int, calls: int
) -> dict[str, float]:
    """Milliseconds per call of the fastest pass; ``call`` is the whole."""
    best: dict[str, float] = {}
    for number in range(PASSES):
        if direction == "read" and not number:
            store.write(generation)
        clock.take()
        sample = getattr(store, direction)(generation + (number if direction == "write" else 0))
        spent = {"call": sample.seconds} | clock.take()
        if not best or spent["call"] < best["call"]:
            best = spent
    return {stage: round(seconds / calls * 1e3, 3) for stage, seconds in best.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True)
    parser.add_argument("--page-bytes", type=int, nargs="+", default=[65536, 262144, 1 << 20])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    clock = Clock()
    for stage in STAGES:
        clock.watch(*stage)
    answer: dict[str, dict[str, dict[str, float]]] = {}
    order = ["call", *dict.fromkeys(stage for stage, _, _ in STAGES)]
    for page_bytes in options.page_bytes:
        memory = HostMemory(page_bytes, BATCH)
        with tempfile.TemporaryDirectory(dir=options.dir) as place:
            calls = 16
            store = FlexKVContender(Path(place), BenchPool(memory), calls * BATCH)
            store.write(0)
            found = {
                direction: stages_of(
                    store, direction, clock, 1 if direction == "write" else 90, calls
                )
                for direction in ("write", "read")
            }
            store.close()
        memory.close()
        answer[str(page_bytes)] = found
        print(f"{page_bytes >> 10} KiB, ms per call:   write    read")
        for stage in order:
            print(
                f"  {stage:32} {found['write'].get(stage, 0):7.2f} {found['read'].get(stage, 0):7.2f}"
            )
    if options.out:
        about = environment()
        with options.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["page_kib", "direction", "stage", "ms_per_call", *about])
            for size, found in answer.items():
                for direction, spent in found.items():
                    for stage in order:
                        row = [int(size) >> 10, direction, stage.strip(), spent.get(stage, 0.0)]
                        writer.writerow([*row, *about.values()])
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
