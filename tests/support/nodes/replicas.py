"""Sets of other nodes on real files: nodes with random pages, readers after one refresh."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flexkv_sglang.backends.fleet.replica.files import Peer
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import NodeId, Snapshot
from flexkv_sglang.types import U64

SPACE, OTHER = "n" * 26, "m" * 26
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
RNG = np.random.default_rng(1)


def pages(count: int) -> U64:
    """Fresh fingerprints, sorted."""
    return np.unique(RNG.integers(0, 1 << 64, count, dtype=np.uint64))


def no_peer(peer: Peer) -> bool:
    """Skip no peer."""
    return False


def open_reader(run_dir: Path, namespace: str = SPACE, ttl_s: float = 30.0) -> PeerSetsReader:
    reader = PeerSetsReader(run_dir, namespace, ttl_s)
    reader.refresh()
    return reader


def fill(
    writer: PeerSetsWriter, node_id: NodeId, fingerprints: U64, namespace: str = SPACE
) -> None:
    writer.set_peer(node_id, 7, f"{node_id}:1", up=True)
    writer.reset(namespace, node_id, Snapshot(7, 0, fingerprints))
