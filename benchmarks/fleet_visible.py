"""How soon a page written on one node can be looked up on another: real agents, real Redis, rank processes.

    .venv/bin/python benchmarks/fleet_visible.py [--count 300] [--pages 1] [--out NAME.csv]

A rank process of node a stores pages and notes when ``put`` returned; one of node b looks up every half
millisecond and notes when it found them. Both clocks are CLOCK_MONOTONIC of this machine. Between two
writes lies a random pause, so that no poll interval is favoured. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from flexkv_sglang.bench.ssd import environment
from nodes.fleet_nodes import Node, Rank, eventually
from nodes.redis_server import RedisServer

PAGE_BYTES = 64 << 10


def measure(writer: Rank, reader: Rank, count: int, pages: int) -> list[float]:
    """Milliseconds from the end of each put to the moment it is seen."""
    found = []
    for number in range(count):
        seed = 1000 + number
        seen: list[float] = []
        waiting = threading.Thread(
            target=lambda seed=seed, seen=seen: seen.append(
                reader.ask("await_prefix", seed=seed, pages=pages)["at"]
            )
        )
        waiting.start()
        time.sleep(random.uniform(0.01, 0.06))
        written = writer.ask("put", seed=seed, pages=pages)["at"]
        waiting.join()
        found.append((seen[0] - written) * 1e3)
        if number % 50 == 49:
            print(f"{number + 1} of {count}", file=sys.stderr, flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """0 when measured."""
    parser = argparse.ArgumentParser(prog="fleet_visible", description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--pages", type=int, default=1)
    parser.add_argument("--out", type=Path, help="CSV with all values")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="flexkv-fleet-") as folder:
        place = Path(folder)
        with (
            RedisServer(place / "redis") as redis,
            Node(place, "a", redis_url=redis.url, page_bytes=PAGE_BYTES) as a,
            Node(place, "b", redis_url=redis.url, page_bytes=PAGE_BYTES) as b,
        ):
            writer, reader = a.rank(), b.rank()
            writer.put(1, 1)
            assert eventually(lambda: reader.prefix(1, 1) == 1, 60), b.agent_log()
            values = measure(writer, reader, options.count, options.pages)
    ordered = sorted(values)
    line = {
        "count": len(values),
        "pages": options.pages,
        "p50_ms": round(ordered[len(ordered) // 2], 2),
        "p90_ms": round(ordered[len(ordered) * 9 // 10], 2),
        "p99_ms": round(ordered[len(ordered) * 99 // 100], 2),
        "max_ms": round(ordered[-1], 2),
    }
    if options.out is not None:
        told = environment()
        with options.out.open("w", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["number", "pages", "visible_ms", *told])
            table.writerows(
                [n, options.pages, f"{value:.3f}", *told.values()] for n, value in enumerate(values)
            )
    print(json.dumps(line))
    return 0


if __name__ == "__main__":
    sys.exit(main())
