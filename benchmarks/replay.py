"""Hit ratios of eviction policies on a trace, through the real index, without I/O.

    .venv/bin/python benchmarks/replay.py --trace FILE --capacity 1000,3000,10000,30000,50000 --json

A trace is JSON lines with ``hash_ids``: one id per page of a request, chained (equal ids mean equal
prefixes). A hit is a page of the leading run that is cached when the request comes. ``default`` is the
policy the engine uses, ``lru`` the reference, ``opt`` knows the future (benchmarks/belady.py).
With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from belady import optimum
from flexkv_sglang.cache.eviction.lru import Lru
from flexkv_sglang.cache.eviction.policy import EvictionPolicy
from flexkv_sglang.cache.eviction.reuse_density import ReuseDensity
from flexkv_sglang.cache.index.index import TierIndex
from flexkv_sglang.types import PageKey


def read_trace(path: Path) -> list[list[int]]:
    """``hash_ids`` of each request. Raises ValueError that names the line."""
    requests = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            requests.append([int(one) for one in json.loads(line)["hash_ids"]])
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{path}:{number}: not a JSON object with hash_ids: {err!r}") from err
    if not any(requests):
        raise ValueError(f"{path}: no pages in it")
    return requests


def hit_ratio(requests: Sequence[Sequence[int]], capacity: int, policy: EvictionPolicy) -> float:
    """Share of pages found in the leading run, with the real index and ``policy``."""
    index = TierIndex(capacity, policy)
    key_of = {
        one: PageKey(
            hashlib.blake2b(one.to_bytes(16, "little", signed=True), digest_size=32).digest()
        )
        for request in requests
        for one in request
    }
    hits = total = 0
    for request in requests:
        keys = [key_of[one] for one in request]
        slots = index.pin_run(keys)
        index.unpin(slots)
        hits, total = hits + len(slots), total + len(keys)
        if len(slots) < len(keys):
            rest = index.reserve(keys[len(slots) :], keys[len(slots) - 1] if slots else None)
            index.commit([slot for _, slot in reversed(rest.granted)])
    return hits / total


def whole_numbers(text: str) -> list[int]:
    """``"1000,3000"`` as numbers from 1 up, for argparse."""
    numbers = [int(one) for one in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers from 1 up")
    return numbers


def main() -> int:
    """Replay, print a table and, if asked for, the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument(
        "--capacity",
        type=whole_numbers,
        default=whole_numbers("1000,3000,10000,30000,50000"),
        metavar="N,N,...",
        help="pages",
    )
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    try:
        requests = read_trace(asked.trace)
    except (OSError, ValueError) as err:
        parser.error(str(err))
    pages = sum(map(len, requests))
    print(
        f"{len(requests)} requests, {pages} pages, {len({o for r in requests for o in r})} distinct"
    )
    print(f"{'capacity':>9} {'default':>8} {'lru':>8} {'opt':>8}   us per page: default, lru")
    answer: dict[str, dict[str, float]] = {"default": {}, "lru": {}, "opt": {}}
    for capacity in asked.capacity:
        print(f"replaying with {capacity} pages ...", file=sys.stderr, flush=True)
        took = []
        for name, policy in (("default", ReuseDensity(capacity)), ("lru", Lru(capacity))):
            begin = time.process_time()
            answer[name][str(capacity)] = round(hit_ratio(requests, capacity, policy), 6)
            took.append((time.process_time() - begin) / pages * 1e6)
        answer["opt"][str(capacity)] = round(optimum(requests, capacity), 6)
        row = [answer[name][str(capacity)] for name in ("default", "lru", "opt")]
        print(
            f"{capacity:9} {row[0]:8.4f} {row[1]:8.4f} {row[2]:8.4f}   {took[0]:.2f}, {took[1]:.2f}"
        )
    if asked.json:
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
