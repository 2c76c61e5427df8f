"""xxh3_64 (the checksum of pages) beside crc32c, over memory that is in no cache.

    .venv/bin/pip install crc32c && .venv/bin/python benchmarks/checksum.py [--out NAME.csv]

A page is two buffers (K and V) somewhere in 1 GiB of memory, visited in an order the prefetcher cannot
guess from page to page; CPU time of the calls as ``backends.checksum`` makes them, Python included. Medians
of interleaved repetitions. The last line printed is one JSON object: GB/s by page bytes.
"""

from __future__ import annotations

import argparse
import csv
import json
import mmap
import random
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import c_ubyte
from pathlib import Path

import crc32c
import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.bench.ssd import environment
from flexkv_sglang.types import PageKey

MEMORY = 1 << 30
PASS_BYTES = 256 << 20
PAGES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
KEY = PageKey(bytes(range(32)))
Parts = list[tuple[int, int]]


def xxh3(parts: Parts) -> int:
    """The one in use."""
    return page_checksum(ChecksumKind.XXH3_64, KEY, parts)


def crc(parts: Parts) -> int:
    """crc32c started with the key's first four bytes, chained over the buffers."""
    value = int.from_bytes(KEY[:4], "little")
    for address, length in parts:
        value = crc32c.crc32c((c_ubyte * length).from_address(address), value)
    return value


def one_pass(check: Callable[[Parts], int], base: int, page_bytes: int) -> float:
    """GB per CPU second over ``PASS_BYTES`` of pages in random order."""
    half = page_bytes // 2
    places = random.sample(range(MEMORY // page_bytes), PASS_BYTES // page_bytes)
    pages = [
        [(base + place * half, half), (base + MEMORY // 2 + place * half, half)] for place in places
    ]
    begin = time.process_time()
    for parts in pages:
        check(parts)
    return PASS_BYTES / 1e9 / (time.process_time() - begin)


def main() -> int:
    """Measure, print, write the CSV."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reps", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    assert crc32c.hardware_based, "crc32c runs in software here: nothing to compare"
    memory = np.frombuffer(mmap.mmap(-1, MEMORY), np.uint8)
    memory[:] = np.tile(np.frombuffer(random.randbytes(1 << 20), np.uint8), MEMORY >> 20)
    base = memory.ctypes.data
    contenders = {"xxh3_64": xxh3, "crc32c": crc}
    answer: dict[str, dict[str, float]] = {}
    rows = []
    for page_bytes in PAGES:
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for rep in range(options.reps):
            for name in random.sample(list(contenders), len(contenders)):
                speeds[name].append(one_pass(contenders[name], base, page_bytes))
                rows.append(
                    {
                        "page_kib": page_bytes >> 10,
                        "checksum": name,
                        "rep": rep + 1,
                        "gb_per_cpu_s": round(speeds[name][-1], 3),
                    }
                )
        medians = {name: round(statistics.median(values), 2) for name, values in speeds.items()}
        answer[str(page_bytes)] = medians
        print(f"{page_bytes >> 10:5} KiB  {medians}", flush=True)
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
