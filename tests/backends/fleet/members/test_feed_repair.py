"""A node follows one that the test plays by hand: entries are lost, repeated, out of order, or not valid."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from flexkv_sglang.backends.fleet.members import redis_feed
from flexkv_sglang.backends.fleet.members.redis_entries import (
    encode_change,
    encode_info,
    member_keys,
    stream_key,
)
from flexkv_sglang.backends.fleet.vocabulary import Change, Op
from flexkv_sglang.config.share import ShareConfig
from nodes.fleet_bed import NS, HandNode, Node, Wires, eventually, fingerprints
from nodes.redis_server import RedisServer

pytestmark = pytest.mark.usefixtures("short_waits")


@pytest.fixture
def scene(server: RedisServer, share: ShareConfig) -> Iterator[tuple[Node, HandNode]]:
    """Yield a node and the hand-played node that it follows, which has pages 1, 2, 3."""
    share = replace(share, node_ttl_s=1000.0)
    wires = Wires()
    hand = HandNode(server.client(), wires, "h")
    hand.write(hand.added(1, 2, 3))
    hand.heartbeat()
    with Node(share, wires, "a") as node:
        assert eventually(lambda: node.knows(hand))  # type: ignore[arg-type]
        yield node, hand


def knows(node: Node, hand: HandNode) -> bool:
    return eventually(lambda: node.knows(hand))  # type: ignore[arg-type]


def test_entries_are_applied_once_and_in_part(scene: tuple[Node, HandNode]) -> None:
    node, hand = scene
    first, second = hand.added(4, 5), hand.added(6)
    overlap = Change(first.epoch, 5, Op.ADD, fingerprints(5, 6, 7))
    hand.log.add(fingerprints(7))
    hand.write(first, first, second, first, overlap)
    assert knows(node, hand)
    assert node.membership.status()["peers"][0]["pages"] == 7  # type: ignore[index]
    assert node.counts["share_snapshots"] == 1


def test_a_lost_entry_is_a_gap(
    scene: tuple[Node, HandNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.fleet.members.follower.ASK_AGAIN_S", 0.1)
    node, hand = scene
    hand.added(4)  # never arrives
    hand.write(hand.added(5))
    assert knows(node, hand)
    assert node.counts["share_snapshots"] >= 2


def test_a_heartbeat_reveals_lost_last_entries(
    scene: tuple[Node, HandNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.fleet.members.follower.ASK_AGAIN_S", 0.1)
    node, hand = scene
    hand.added(4)  # never arrives, as the last entry
    keep = hand.log.heartbeat()
    assert keep is not None
    hand.write(keep)
    assert knows(node, hand)


def test_a_stream_whose_ids_went_back_is_read_again(
    scene: tuple[Node, HandNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_feed, "SILENCE_S", 0.6)
    node, hand = scene
    assert eventually(lambda: node.counts["share_changes_in"] > 0)
    hand.client.delete(stream_key("default", NS, hand.node_id))
    hand.write(hand.added(9), entry_id="1-1")  # far below the ids read so far
    assert knows(node, hand)


def test_another_epoch_is_ignored_until_the_node_announces_it(
    scene: tuple[Node, HandNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.fleet.members.follower.NEW_EPOCH_S", 0.1)
    node, hand = scene
    hand.write(Change(hand.logs.epoch ^ 1, 4, Op.DROP, fingerprints(1)))
    hand.write(hand.added(4))
    assert knows(node, hand)
    with hand.logs.lock:
        hand.logs.renew_locked()
    hand.log.drop(fingerprints(2))
    hand.heartbeat()
    assert knows(node, hand)


def test_rubbish_in_redis_is_counted_and_skipped(scene: tuple[Node, HandNode]) -> None:
    node, hand = scene
    key = stream_key("default", NS, hand.node_id)
    good = encode_change(Change(hand.logs.epoch, 4, Op.ADD, fingerprints(4)))
    rubbish = [
        {b"x": b"y"},
        {**good, b"e": b"zz"},
        {**good, b"k": b"1234567"},
        {**good, b"k": bytes(8 * 513)},
        {**good, b"q": b"-1"},
        {**good, b"o": b"Z"},
        {**good, b"o": b"C"},
    ]
    for fields in rubbish:
        hand.client.xadd(key, fields)  # type: ignore[arg-type]
    hand.write(hand.added(4))
    assert knows(node, hand)
    assert eventually(lambda: node.counts["share_bad_entries"] == len(rubbish))
    live, nodes, version = member_keys("default")
    sound = encode_info(hand.own_info())
    for number, entry in enumerate(
        [b"", b"[]", b"null", b"{" * 100_000, b" " * 200_000,
         sound.replace(b'"proto":2', b'"proto":3'),
         sound.replace(b"h:1", b"h 1"),
         sound.replace(NS.encode(), b"../../etc/passwd"), sound[:-1]]
    ):  # fmt: skip
        hand.client.hset(nodes, f"bad{number}", entry)  # type: ignore[arg-type]
        hand.client.zadd(live, {f"bad{number}": time.time() * 1000})
    hand.client.zadd(live, {"no entry": time.time() * 1000, "../x": time.time() * 1000})
    hand.client.hset(nodes, "../x", sound)  # type: ignore[arg-type]
    hand.client.set(version, b"changed")
    heartbeats = node.counts["share_beats"]
    assert eventually(lambda: node.counts["share_beats"] > heartbeats + 2)
    assert set(node.peer_sets.peers) == {hand.node_id}
    hand.client.delete(live)
    hand.client.set(live, b"no set at all")
    assert eventually(lambda: node.counts["share_redis_errors"] > 0)
    assert node.peer_sets.peers[hand.node_id][2]


def test_suspect_sets_are_fetched_again(
    scene: tuple[Node, HandNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.fleet.members.follower.ASK_AGAIN_S", 0.1)
    node, hand = scene
    node.membership.followers.set_suspect("no such namespace", hand.node_id)
    assert node.counts["share_distrusted"] == 0
    node.membership.followers.set_suspect(NS, hand.node_id)
    assert node.counts["share_distrusted"] == 1
    assert eventually(lambda: node.counts["share_snapshots"] >= 2)
    assert knows(node, hand)


def test_a_replica_that_cannot_be_written_is_written_later(
    scene: tuple[Node, HandNode], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.backends.fleet.members.follower.ASK_AGAIN_S", 0.1)
    node, hand = scene
    node.peer_sets.error = OSError(28, "No space left on device")
    hand.write(hand.added(4))
    assert eventually(lambda: node.counts["share_replica_errors"] > 0)
    hand.write(hand.added(5))
    node.peer_sets.error = None
    assert knows(node, hand)
    assert node.counts["share_thread_errors"] == 0


def test_after_close_nothing_is_written(scene: tuple[Node, HandNode]) -> None:
    node, hand = scene
    node.membership.close()
    calls = node.peer_sets.calls.copy()
    hand.write(hand.added(4))
    node.membership.followers.changed(
        NS, hand.node_id, [Change(hand.logs.epoch, 4, Op.ADD, fingerprints(4))]
    )
    node.membership.followers.update_members("redis", [])
    node.membership.followers.wanted_namespaces(())
    assert node.peer_sets.calls == calls
    assert not [thread.name for thread in threading.enumerate() if "flexkv-r" in thread.name]
