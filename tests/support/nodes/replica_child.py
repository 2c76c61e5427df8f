"""Processes of the crash test of other nodes' sets: a writer that is killed, readers that check each lookup.

Each node has pages of its own, and there are fingerprints that no node ever has, in the same buckets and chains as
those. While the writer lives and dies a reader may see any set of a node's own pages there, and nothing else;
after that, exactly what the last writer said.
"""

from __future__ import annotations

import json
import random
import selectors
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support


import numpy as np

from flexkv_sglang.backends.failpoints import Failpoint, set_hook
from flexkv_sglang.backends.fleet.replica.files import Peer
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import NodeId, Op, Snapshot
from flexkv_sglang.types import U64
from stores.killer import KillAt

NAMESPACE = "n" * 26
NODES, PAGES = 6, 4000


def pages_of(node: int) -> U64:
    """uint64 ``[PAGES]``, in the order of their numbers: all pages that this node may have."""
    return np.random.default_rng(node).integers(0, 1 << 64, PAGES, dtype=np.uint64)


def never_added() -> U64:
    """uint64: fingerprints that no node ever has, of the same buckets and chains."""
    return np.concatenate([pages_of(node) ^ np.uint64(1 << 40) for node in range(NODES)])


def no_peer(peer: Peer) -> bool:
    """Skip no peer."""
    return False


def write(run_dir: str, seed: int, point: Failpoint | None) -> None:
    """Change everything at random for a while, until the process is killed, or at ``point``."""
    draw = random.Random(seed)
    if point is not None:
        set_hook(KillAt(point, draw.randrange(1, 8)))
    writer, pages = PeerSetsWriter(run_dir), [pages_of(node) for node in range(NODES)]
    for _ in range(100_000):
        number = draw.randrange(NODES)
        node, fingerprints = NodeId(f"node-{number}"), pages[number]
        turn = draw.random()
        some = np.array(draw.sample(range(PAGES), draw.randrange(1, 400)))
        if turn < 0.1:
            writer.set_peer(node, draw.getrandbits(63), f"host-{number}:{number}", turn < 0.09)
            writer.reset(NAMESPACE, node, Snapshot(1, 0, np.unique(fingerprints[some])))
        elif turn < 0.14:
            writer.remove_peer(node)
        elif turn < 0.15:
            writer.apply(NAMESPACE, node, Op.CLEAR, fingerprints[:0])
        elif turn < 0.2:
            writer.tick()
        else:
            writer.apply(NAMESPACE, node, Op.ADD if turn < 0.7 else Op.DROP, fingerprints[some])
        writer.heartbeat()


def settle(run_dir: str, seed: int) -> dict[str, list[int]]:
    """Take over from a killed writer; return the page numbers that each node has from then on."""
    draw, writer, held = random.Random(seed), PeerSetsWriter(run_dir), dict[str, list[int]]()
    for number in draw.sample(range(NODES), NODES - 1):
        node, fingerprints = NodeId(f"node-{number}"), pages_of(number)
        kept = sorted(draw.sample(range(PAGES), draw.randrange(1, PAGES // 2)))
        added = sorted(draw.sample(range(PAGES), 600))
        dropped = sorted(draw.sample(range(PAGES), 600))
        writer.set_peer(node, number, f"host-{number}:{number}", True)
        writer.reset(NAMESPACE, node, Snapshot(1, 0, np.unique(fingerprints[kept])))
        writer.apply(NAMESPACE, node, Op.ADD, fingerprints[added])
        writer.apply(NAMESPACE, node, Op.DROP, fingerprints[dropped])
        held[node] = sorted((set(kept) | set(added)) - set(dropped))
    writer.tick()
    writer.heartbeat()
    return held


def read(run_dir: str) -> None:
    """Judge until a line arrives: a JSON line with what each node should hold. Answers with a JSON line."""
    reader = PeerSetsReader(run_dir, NAMESPACE, 30.0)
    pages, foreign = [pages_of(node) for node in range(NODES)], never_added()
    draw, wrong, found = random.Random(0), list[str](), 0
    waiting = selectors.DefaultSelector()
    waiting.register(sys.stdin, selectors.EVENT_READ)
    print("ready", flush=True)
    for _ in range(1_000_000):
        if waiting.select(0):
            line = sys.stdin.readline()
            if not line:
                return
            answer = {"wrong": wrong, "found": found, "settled": settled(reader, json.loads(line))}
            print(json.dumps(answer), flush=True)
            wrong, found = [], 0
            continue
        reader.refresh()
        found += look(reader, pages, foreign, draw, wrong)


def look(
    reader: PeerSetsReader,
    pages: list[U64],
    foreign: U64,
    draw: random.Random,
    wrong: list[str],
) -> int:
    """Do one lookup of each kind; add impossible results to ``wrong``. Returns the number of pages found."""
    number = draw.randrange(NODES)
    some = pages[number][draw.sample(range(PAGES), 128)]
    at = draw.randrange(len(foreign) - 128)
    if reader.holds(foreign[at : at + 128], no_peer).any():
        wrong.append("holds says yes to what was never added")
    if reader.run(foreign[at : at + 128], no_peer) is not None:
        wrong.append("run found what was never added")
    halves = [p for p in reader.peers() if p.address != f"host-{p.node_id[5:]}:{p.node_id[5:]}"]
    wrong.extend(f"peer of two halves: {peer}" for peer in halves)
    answer = reader.run(some, no_peer)
    if answer is not None and answer[0].node_id != f"node-{number}":
        wrong.append(f"page of node {number} at {answer[0].node_id}")
    return int(reader.holds(some, no_peer).sum())


def settled(reader: PeerSetsReader, held: dict[str, list[int]]) -> bool:
    """Does the reader now see exactly this? It has ten seconds, and needs one refresh."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        reader.refresh()
        if {peer.node_id for peer in reader.peers()} == set(held) and all(
            sees_exactly(reader, NodeId(node_id), numbers) for node_id, numbers in held.items()
        ):
            return reader.page_count() == sum(map(len, held.values()))
    return False


def sees_exactly(reader: PeerSetsReader, node_id: NodeId, numbers: list[int]) -> bool:
    """Does the reader see exactly these pages of this node?"""
    seen = reader.holds(pages_of(int(node_id[5:])), lambda peer: peer.node_id != node_id)
    return np.flatnonzero(seen).tolist() == numbers


if __name__ == "__main__":
    read(sys.argv[1])
