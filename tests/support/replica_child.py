"""Processes of the replica's crash test: a writer that is killed, readers that judge what they see.

The oracle is arithmetic: in round ``r`` node ``p`` holds the fingerprints ``page(p, i)`` with
``low(r) <= i < high(r)``. The writer lets rounds go by for ever; a fingerprint outside of 0 <= i < PAGES was
never added by anybody, nor was one of a node that does not exist.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.failpoints import set_hook
from flexkv_sglang.backends.fleet import NodeId, Op, Snapshot
from flexkv_sglang.backends.replica_files import Peer
from flexkv_sglang.backends.replica_reader import ReplicaReader
from flexkv_sglang.backends.replica_writer import ReplicaWriter
from flexkv_sglang.types import U64
from killer import kill_at

NAMESPACE = "n" * 26
NODES, PAGES = 6, 4000


def pages_of(node: int) -> U64:
    """uint64 ``[PAGES]``, in the order of their numbers: what this node may ever hold."""
    return np.random.default_rng(node).integers(0, 1 << 64, PAGES, dtype=np.uint64)


def never_added() -> U64:
    """uint64: what nobody ever holds, but of the same buckets and chains."""
    return np.concatenate([pages_of(node) ^ np.uint64(1 << 40) for node in range(NODES)])


def nobody(peer: Peer) -> bool:
    """Pass over none."""
    return False


def write(run_dir: str, seed: int, point: int, times: int) -> None:
    """Change everything at random until killed; ``point`` >= 0: at its ``times``-th pass."""
    if point >= 0:
        set_hook(kill_at(point, times))
    draw, writer = random.Random(seed), ReplicaWriter(run_dir)
    pages = [pages_of(node) for node in range(NODES)]
    print("ready", flush=True)
    while True:
        number = draw.randrange(NODES)
        node, fps = NodeId(f"node-{number}"), pages[number]
        turn = draw.random()
        some = np.array(draw.sample(range(PAGES), draw.randrange(1, 400)))
        if turn < 0.1:
            writer.set_peer(node, draw.getrandbits(63), f"host-{number}:{number}", turn < 0.09)
            writer.reset(NAMESPACE, node, Snapshot(1, 0, np.unique(fps[some])))
        elif turn < 0.14:
            writer.remove_peer(node)
        elif turn < 0.15:
            writer.apply(NAMESPACE, node, Op.CLEAR, fps[:0])
        elif turn < 0.2:
            writer.tick()
        else:
            writer.apply(NAMESPACE, node, Op.ADD if turn < 0.7 else Op.DROP, fps[some])
        writer.beat()


def settle(run_dir: str, seed: int) -> dict[str, list[int]]:
    """Take over from the one that was killed; what each node holds from then on, by number of page."""
    draw, writer, held = random.Random(seed), ReplicaWriter(run_dir), dict[str, list[int]]()
    for number in draw.sample(range(NODES), NODES - 1):
        node, fps = NodeId(f"node-{number}"), pages_of(number)
        kept = sorted(draw.sample(range(PAGES), draw.randrange(1, PAGES // 2)))
        added = sorted(draw.sample(range(PAGES), 600))
        dropped = sorted(draw.sample(range(PAGES), 600))
        writer.set_peer(node, number, f"host-{number}:{number}", True)
        writer.reset(NAMESPACE, node, Snapshot(1, 0, np.unique(fps[kept])))
        writer.apply(NAMESPACE, node, Op.ADD, fps[added])
        writer.apply(NAMESPACE, node, Op.DROP, fps[dropped])
        held[node] = sorted((set(kept) | set(added)) - set(dropped))
    writer.tick()
    writer.beat()
    return held


def read(run_dir: str) -> None:
    """Judge until a line arrives: a JSON line with what each node should hold. Answers with a JSON line."""
    reader = ReplicaReader(run_dir, NAMESPACE, 30.0)
    pages, foreign = [pages_of(node) for node in range(NODES)], never_added()
    draw, wrong, found = random.Random(0), list[str](), 0
    lines = iter(sys.stdin.readline, "")
    print("ready", flush=True)
    import selectors

    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    for _ in range(1_000_000):
        if waiting.select(0):
            line = next(lines, "")
            if not line:
                return
            answer = {"wrong": wrong, "found": found, "settled": settled(reader, json.loads(line))}
            print(json.dumps(answer), flush=True)
            wrong, found = [], 0
            continue
        reader.refresh()
        found += look(reader, pages, foreign, draw, wrong)


def look(
    reader: ReplicaReader,
    pages: list[U64],
    foreign: U64,
    draw: random.Random,
    wrong: list[str],
) -> int:
    """One look-up of each kind; what is impossible goes to ``wrong``. How many pages were found."""
    number = draw.randrange(NODES)
    some = pages[number][draw.sample(range(PAGES), 128)]
    at = draw.randrange(len(foreign) - 128)
    if reader.holds(foreign[at : at + 128], nobody).any():
        wrong.append("holds says yes to what was never added")
    if reader.run(foreign[at : at + 128], nobody) is not None:
        wrong.append("run found what was never added")
    for peer in reader.peers():
        if peer.address != f"host-{peer.nid[5:]}:{peer.nid[5:]}":
            wrong.append(f"peer of two halves: {peer}")
    answer = reader.run(some, nobody)
    if answer is not None and answer[0].nid != f"node-{number}":
        wrong.append(f"page of node {number} at {answer[0].nid}")
    return int(reader.holds(some, nobody).sum())


def settled(reader: ReplicaReader, held: dict[str, list[int]]) -> bool:
    """Does the reader now see exactly this? It has a thousand refreshes for it."""
    import time

    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        reader.refresh()
        if {peer.nid for peer in reader.peers()} == set(held) and all(
            sees_exactly(reader, NodeId(nid), numbers) for nid, numbers in held.items()
        ):
            return reader.page_count() == sum(map(len, held.values()))
    return False


def sees_exactly(reader: ReplicaReader, nid: NodeId, numbers: list[int]) -> bool:
    """Is what this node holds, as far as the reader sees, what it should hold?"""
    seen = reader.holds(pages_of(int(nid[5:])), lambda peer: peer.nid != nid)
    return np.flatnonzero(seen).tolist() == numbers


if __name__ == "__main__":
    if sys.argv[1] == "read":
        read(sys.argv[2])
    else:
        write(sys.argv[2], *map(int, sys.argv[3:]))
    Path()
