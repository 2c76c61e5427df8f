"""The engine's index at a million pages: start-up, exists-checks, memory.

    .venv/bin/python benchmarks/index.py --dir DIR [--pages 1000000] [--out benchmarks/results/NAME.csv]

Makes a journal with that many pages (their bytes are never read), opens it as a restarted server would,
and asks. Start-up is CPU time of this process; the rest is wall time, median of many calls. Memory is the
growth of the process from before to after the opening. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import gc
import json
import logging
import os
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.slots.journal import keys_field, new_records
from flexkv_sglang.backends.slots.records import RecordOp, SlotClass
from flexkv_sglang.backends.slots.slot_file import OwnedStore
from flexkv_sglang.backends.slots.space.places import open_places
from flexkv_sglang.bench.ssd import environment
from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.config.settings import FlexKVConfig, TierConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.types import PageKey

PAGE = 4096
CHAIN = 128


def make_store(config: FlexKVConfig, count: int, keys: list[PageKey]) -> None:
    """A dead owner with ``count`` pages in chains of 128."""
    modes = prepare_tiers(config)[0]
    place = open_places(modes, "ns", {})[0]
    store = OwnedStore.create(place.directory, "ns", SlotClass(PAGE, PAGE, count), place.mode)
    for start in range(0, count, CHAIN * 64):
        rows = np.arange(start, min(start + CHAIN * 64, count))
        records = new_records(RecordOp.PUT, len(rows))
        records["slot"], records["len"], records["flags"] = rows, PAGE, ChecksumKind.XXH3_64
        records["key"] = keys_field([keys[row] for row in rows.tolist()])
        records["parent"] = np.where(rows % CHAIN == 0, records["parent"], rows - 1)
        store.journal.append(records)
    store.close()


def resident_bytes() -> int:
    """Resident memory of this process."""
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize()


def median_us(calls: int, call: Callable[[int], object]) -> tuple[float, float]:
    """(median, 99th percentile) of ``call(i)`` in microseconds."""
    times = []
    for number in range(calls):
        begin = time.perf_counter()
        call(number)
        times.append((time.perf_counter() - begin) * 1e6)
    times.sort()
    return statistics.median(times), times[int(len(times) * 0.99)]


def measure(directory: Path, count: int) -> dict[str, float]:
    """All figures for ``count`` pages."""
    keys = [PageKey(random.randbytes(32)) for _ in range(count)]
    config = FlexKVConfig(tiers=(TierConfig((str(directory),), count * PAGE),))
    make_store(config, count, keys)
    starts = [random.randrange(count // CHAIN) * CHAIN for _ in range(2000)]
    asked = [[PageKey(bytes(bytearray(k))) for k in keys[s : s + CHAIN]] for s in starts]
    absent = [[PageKey(random.randbytes(32))] for _ in range(2000)]
    del keys
    prepared = prepare_tiers(config)
    gc.collect()
    memory, cpu, wall = resident_bytes(), time.process_time(), time.perf_counter()
    store = open_tiers(
        config, prepared, "ns", {}, PAGE, [Quota(tier.size) for tier in config.tiers], Metrics()
    )
    start_cpu, start_wall = time.process_time() - cpu, time.perf_counter() - wall
    gc.collect()
    grown = resident_bytes() - memory
    assert store.page_count() == count
    assert store.prefix(asked[0]) == CHAIN
    hit = median_us(len(asked), lambda i: store.prefix(asked[i]))
    miss = median_us(len(absent), lambda i: store.prefix(absent[i]))
    store.close()
    return {
        "pages": count,
        "start_cpu_s": round(start_cpu, 3),
        "start_wall_s": round(start_wall, 3),
        "bytes_per_page": round(grown / count, 1),
        "exists_128_us_p50": round(hit[0], 1),
        "exists_128_us_p99": round(hit[1], 1),
        "miss_us_p50": round(miss[0], 2),
        "miss_us_p99": round(miss[1], 2),
    }


def main() -> None:
    """Run, write the CSV, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="an empty place on a disk")
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        figures = measure(Path(place), options.pages)
    if options.out:
        row = {**figures, "cpus": os.cpu_count(), **environment()}
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
