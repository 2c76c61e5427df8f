"""A fleet of 100 nodes with a million pages each, without its network: memory, catch-up, lookups, Redis traffic.

    python benchmarks/fleet_sim.py --out benchmarks/results/fleet-sim-DATE.csv

One node is real: its writer keeps real files of all the others, its reader looks pages up in them, their changes
are applied at the rate they would come. If memory does not allow that many sets, fewer are made (``real_peers``),
and sizes and times are scaled. Redis is arithmetic: nodes write, collect, send and read in simulated time,
and every command and answer is encoded as Redis' protocol does, so bytes are counted and not guessed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from fleet_lookup import NAMESPACE, Fleet, private_bytes, spread, timed
from flexkv_sglang.backends.fleet.vocabulary import CHANGE_KEYS, Op
from flexkv_sglang.bench.ssd import environment

HEARTBEAT_S = 2.0
INFO_BYTES = 400  # a node's entry in the member list
ENTRY_ID = "1764090000000-12"


def resp(parts: Iterable[bytes | str | int]) -> int:
    """Bytes of a list of strings in Redis' protocol."""
    sizes = [len(part if isinstance(part, bytes) else str(part).encode()) for part in parts]
    return len(f"*{len(sizes)}\r\n") + sum(len(f"${size}\r\n") + size + 2 for size in sizes)


def stream(number: int) -> str:
    """The stream of one node."""
    return f"fk1:{{default}}:{NAMESPACE}:log:gpu-host-{number:04d}-1a2b3c4d"


def fields(keys: int) -> list[bytes | str | int]:
    """Fields of an entry: epoch, number, operation, fingerprints."""
    return ["e", 1 << 63, "q", 123_456_789, "o", "A", "k", bytes(8 * keys)]


def traffic(nodes: int, rate: float, flush_s: float, pause_s: float) -> dict[str, object]:
    """Messages and bytes per second at Redis; ``rate``: pages each node writes per second.

    Ten simulated seconds. A node sends what it has collected every ``flush_s``; a follower asks for all streams
    again ``pause_s`` after an answer.
    """
    rng, seconds = np.random.default_rng(nodes), 10.0
    slots = int(seconds / flush_s)
    sent = rng.poisson(rate * flush_s, (nodes, slots))
    entries_in, bytes_in, entry_out = 0, 0, 0.0
    for keys in sent[sent > 0].tolist():
        for size in [CHANGE_KEYS] * (keys // CHANGE_KEYS) + [keys % CHANGE_KEYS]:
            if size:
                head: list[bytes | str | int] = ["XADD", stream(0), "MAXLEN", "~", 4096, "*"]
                entries_in += 1
                bytes_in += resp(head + fields(size))
                entry_out += len("*2\r\n") + len(f"$16\r\n{ENTRY_ID}\r\n") + resp(fields(size))
    asks = min(1 / pause_s, entries_in / seconds) if nodes > 1 else 0.0
    names = [stream(number) for number in range(nodes - 1)]
    question = resp(
        ["XREAD", "BLOCK", 1000, "COUNT", 256, "STREAMS", *names, *[ENTRY_ID] * len(names)]
    )
    ids_in_answer = min(nodes - 1, entries_in / seconds / max(asks, 1e-9))
    answer = ids_in_answer * (len("*2\r\n") + resp([stream(0)]))
    heartbeat = resp(
        [
            "EVALSHA",
            "0" * 40,
            3,
            *["fk1:{default}:live"] * 3,
            "n" * 22,
            bytes(INFO_BYTES),
            6000,
            "v" * 40,
        ]
    )
    out = nodes * asks * answer + entry_out / seconds * (nodes - 1)
    return {
        "nodes": nodes,
        "pages_per_s": rate,
        "flush_ms": flush_s * 1e3,
        "pause_ms": pause_s * 1e3,
        "entries_in_per_s": round(entries_in / seconds),
        "entries_out_per_s": round(entries_in / seconds * (nodes - 1)),
        "xread_per_s": round(nodes * asks),
        "xread_request_bytes": question,
        "redis_in_mb_s": round(
            (bytes_in / seconds + nodes * (asks * question + heartbeat / HEARTBEAT_S)) / 1e6, 2
        ),
        "redis_out_mb_s": round(out / 1e6, 2),
        "feed_bytes_per_page": round(bytes_in / max(int(sent.sum()), 1), 1),
        "beats_per_s": round(nodes / HEARTBEAT_S, 1),
        "member_list_mb_after_a_change": round(nodes * nodes * INFO_BYTES / 1e6, 3),
    }


def affordable(peers: int, pages: int) -> int:
    """How many peers' sets fit in half of the free memory."""
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if "MemAvailable" in x)
    return max(1, min(peers, int(line.split()[1]) * 1024 // 2 // (pages * 16)))


def steady(fleet: Fleet, rate: float, seconds: float) -> float:
    """Share of a core for applying the changes of all peers, merges included. Half of them are drops."""
    per_entry = max(1, int(rate * 0.1))
    added = [spread(fleet.rng, per_entry) for _ in fleet.node_ids]
    begin = time.process_time()
    for turn in range(int(seconds * 10)):
        for number, node_id in enumerate(fleet.node_ids):
            if turn % 2:
                fleet.writer.apply(NAMESPACE, node_id, Op.DROP, added[number])
            else:
                added[number] = spread(fleet.rng, per_entry)
                fleet.writer.apply(NAMESPACE, node_id, Op.ADD, added[number])
        if turn % 10 == 0:
            fleet.writer.tick()
            fleet.writer.heartbeat()
    return (time.process_time() - begin) / seconds


def one_node(place: Path, nodes: int, pages: int, rate: float) -> dict[str, object]:
    """Measures the replica of one real node of the fleet."""
    peers = nodes - 1
    real = affordable(peers, pages)
    before = private_bytes()
    fleet = Fleet(place, real, pages)
    files = sum(path.stat().st_blocks * 512 for path in place.rglob("*") if path.is_file())
    look_ups = timed(fleet)
    cpu = steady(fleet, rate, 10.0)
    after = timed(fleet)
    return {
        "nodes": nodes,
        "pages": pages,
        "real_peers": real,
        "replica_mb": round(files * peers / real / 1e6, 1),
        "replica_bytes_per_page": round(files / real / pages, 2),
        "agent_and_rank_private_mb": round((private_bytes() - before) / 1e6, 1),
        "snapshot_mb_per_peer": round(pages * 8 / 1e6, 2),
        "catch_up_ms_per_peer": round(statistics.median(fleet.reset_s) * 1e3, 1),
        "catch_up_s_all_peers": round(sum(fleet.reset_s) * peers / real, 2),
        "apply_core_share": round(cpu * peers / real, 4),
        **{f"{case} us_p50": timing.us_p50 for case, timing in look_ups.items()},
        **{f"{case} us_p99": timing.us_p99 for case, timing in look_ups.items()},
        **{f"{case} changing us_p50": timing.us_p50 for case, timing in after.items()},
    }


def main() -> None:
    """Run, write the CSV, print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--nodes", type=int, default=100)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument(
        "--rate", type=float, default=200.0, help="pages each node writes per second"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        rows = [
            {"part": "node", **one_node(Path(place), options.nodes, options.pages, options.rate)}
        ]
    cases = [(8, 0.01, 0.01), (32, 0.01, 0.01), (64, 0.1, 0.1), (100, 0.01, 0.01), (100, 0.1, 0.01)]
    cases += [(100, 0.1, 0.1), (1000, 0.1, 0.1)]
    for nodes, flush_s, pause_s in cases:
        rows.append({"part": "redis", **traffic(nodes, options.rate, flush_s, pause_s)})
    rows.append({"part": "redis", **traffic(100, options.rate * 10, 0.1, 0.1)})
    if options.out:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*names, "cpus", *environment()])
            writer.writeheader()
            writer.writerows({**row, "cpus": os.cpu_count(), **environment()} for row in rows)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
