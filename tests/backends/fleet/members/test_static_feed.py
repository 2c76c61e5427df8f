"""Peers without Redis over the real wire, both ways at once, and two processes that meet in Redis."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.config.share import ShareConfig
from nodes.fleet_bed import NS, WireNode, eventually, fingerprints
from nodes.redis_server import RedisServer, free_port

logger = logging.getLogger(__name__)

SUPPORT = Path(__file__).resolve().parents[3] / "support" / "nodes"
SHARE = ShareConfig(heartbeat_s=0.2, node_ttl_s=0.8)


pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture(autouse=True)
def soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("ASK_AGAIN_S", 0.2), ("NEW_EPOCH_S", 0.1)):
        monkeypatch.setattr(f"flexkv_sglang.backends.fleet.members.follower.{name}", seconds)


@pytest.fixture
def pair() -> Iterator[tuple[WireNode, WireNode]]:
    one, two = WireNode(SHARE, "a"), WireNode(SHARE, "b")
    yield one, two
    one.close()
    two.close()


def test_static_peers_follow_each_other(pair: tuple[WireNode, WireNode]) -> None:
    one, two = pair
    one.logs.log(NS).add(np.arange(3000, dtype=np.uint64))
    share = replace(SHARE, peers=(one.address, two.address))  # the same list everywhere
    one.meet(share)
    two.meet(share)
    assert eventually(lambda: two.holds("a") == set(range(3000)) and one.holds("b") == set())
    one.logs.log(NS).drop(np.arange(5, dtype=np.uint64))
    two.logs.log(NS).add(fingerprints(7))
    assert eventually(lambda: two.holds("a") == set(range(5, 3000)) and one.holds("b") == {7})
    one.logs.log(NS).clear()
    assert eventually(lambda: two.holds("a") == set())
    assert set(one.peer_sets.peers) == {"b"}
    assert two.counts["share_snapshots"] == 1
    assert one.counts["share_renamed"] == 0


def test_a_follower_that_fell_behind_the_ring_takes_a_snapshot(
    pair: tuple[WireNode, WireNode],
) -> None:
    one, two = pair
    two.meet(replace(SHARE, peers=(one.address,)))
    assert eventually(lambda: two.holds("a") == set())
    ring = one.logs.log(NS)
    with one.logs.lock:
        ring.forget_locked()
    one.logs.log(NS).add(fingerprints(1))
    with one.logs.lock:
        ring.forget_locked()
    one.logs.log(NS).add(fingerprints(2))
    assert eventually(lambda: two.holds("a") == {1, 2})


def test_a_static_peer_that_is_gone_is_down_and_comes_back(pair: tuple[WireNode, WireNode]) -> None:
    one, two = pair
    address = f"127.0.0.1:{free_port()}"
    third = WireNode(replace(SHARE, listen=address), "c")
    third.logs.log(NS).add(fingerprints(3))
    two.meet(replace(SHARE, peers=(address, one.address)))
    assert eventually(lambda: two.holds("c") == {3})
    third.close()
    assert eventually(lambda: two.holds("c") is None)
    assert eventually(lambda: two.holds("a") == set())
    again = WireNode(replace(SHARE, listen=address), "c")
    again.logs.log(NS).add(fingerprints(4))
    assert eventually(lambda: two.holds("c") == {4})
    again.close()


def test_a_static_peer_with_our_name_makes_one_of_us_take_another(
    pair: tuple[WireNode, WireNode],
) -> None:
    one, two = pair
    two.node_id = one.node_id
    share = replace(SHARE, peers=(one.address, two.address))
    one.meet(share)
    two.meet(share)
    assert eventually(lambda: one.own_info().node_id != two.own_info().node_id)
    assert eventually(
        lambda: two.holds(one.own_info().node_id) == one.holds(two.own_info().node_id) == set()
    )


def test_redis_and_static_peers_at_once(pair: tuple[WireNode, WireNode], tmp_path: Path) -> None:
    one, two = pair
    with RedisServer(tmp_path) as server:
        share = replace(SHARE, redis_url=server.url, peers=(one.address, two.address))
        one.meet(share)
        two.meet(share)
        one.logs.log(NS).add(fingerprints(1, 2))
        assert eventually(lambda: two.holds("a") == {1, 2} and one.holds("b") == set())
        server.kill()
        one.logs.log(NS).add(fingerprints(3))
        assert eventually(lambda: two.holds("a") == {1, 2, 3})
        two.peer_sets.was_down.clear()
        server.start()
        one.logs.log(NS).drop(fingerprints(1))
        assert eventually(lambda: two.holds("a") == {2, 3})
        assert not two.peer_sets.was_down


def test_ranks_find_the_pages_of_other_nodes_in_the_replica(
    pair: tuple[WireNode, WireNode], tmp_path: Path
) -> None:
    one, two = pair
    two.peer_sets = writer = PeerSetsWriter(tmp_path / "run")  # type: ignore[assignment]
    pages = np.random.default_rng(1).integers(0, 1 << 63, 100_000, np.uint64)
    one.logs.log(NS).add(pages)
    reader = PeerSetsReader(tmp_path / "run", NS, 30.0)
    wanted = pages[:128]

    def found() -> tuple[str, int] | None:
        reader.refresh()
        run = reader.run(wanted, lambda peer: False)
        return (run[0].address, run[1]) if run else None

    two.meet(replace(SHARE, peers=(one.address,)))
    assert eventually(lambda: found() == (one.address, 128))
    assert reader.alive
    one.logs.log(NS).drop(wanted[50:60])
    assert eventually(lambda: found() == (one.address, 50))
    one.close()
    assert eventually(lambda: found() is None)
    reader.close()
    two.close()
    writer.close()


class Child:
    """``feed_node.py``, asked line by line."""

    def __init__(self, share: ShareConfig, node_id: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SUPPORT / "feed_node.py"), json.dumps(asdict(share)), node_id],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()["address"]

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, **fields: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()
        return self._line()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


@pytest.mark.parametrize("way", ["redis", "static"])
def test_two_processes(tmp_path: Path, way: str) -> None:
    node = WireNode(SHARE, "a")
    try:
        follow_from_another_process(node, tmp_path, way)
    finally:
        node.close()


def follow_from_another_process(node: WireNode, tmp_path: Path, way: str) -> None:
    node.logs.log(NS).add(np.arange(1000, 201_000, dtype=np.uint64))
    with RedisServer(tmp_path) as server:
        share = replace(SHARE, redis_url=server.url) if way == "redis" else SHARE
        node.meet(share)
        alone = replace(SHARE, peers=(node.address,))
        with Child(share if way == "redis" else alone, "b") as child:
            waits = visible_after_ms(node, child)
            logger.info(
                "%s: visible after %.1f ms (median), %.1f (longest)", way, waits[30], waits[-1]
            )
        assert way == "static" or eventually(lambda: node.holds("b") is None)


def visible_after_ms(node: WireNode, child: Child) -> list[float]:
    """Return the sorted seconds until each of 60 pages was in the other process's copy."""
    assert eventually(lambda: child.ask(peer="a")["held"] == 200_000)
    added: dict[int, float] = {}
    for number in range(60):
        added[number] = time.monotonic()
        node.logs.log(NS).add(fingerprints(number))
        time.sleep(0.003 * (number % 7))  # at all phases of all periods
    assert eventually(lambda: child.ask(peer="a")["held"] == 200_060)
    seen = child.ask(peer="a", seen=True)["seen"]
    return sorted((seen[str(number)] - added[number]) * 1000 for number in added)
