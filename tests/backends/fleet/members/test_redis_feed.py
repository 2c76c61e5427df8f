"""Memberships with a real redis-server: after each of its failures sets become right again, and no node goes down."""

from __future__ import annotations

import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import redis

from flexkv_sglang.backends.fleet.members import redis_feed
from flexkv_sglang.backends.fleet.members.change_log import ChangeLogs
from flexkv_sglang.backends.fleet.members.redis_entries import member_keys, stream_key
from flexkv_sglang.backends.fleet.members.redis_feed import streams_of
from flexkv_sglang.config.share import ShareConfig
from nodes.fleet_bed import NS, OTHER_NS, HandNode, Node, Wires, eventually, fingerprints
from nodes.redis_server import RedisServer

pytestmark = pytest.mark.usefixtures("short_waits")


def both_know(one: Node, two: Node, seconds: float = 10.0) -> bool:
    return eventually(lambda: one.knows(two) and two.knows(one), seconds)


@pytest.mark.parametrize("protocol", [2, 3])
def test_each_node_knows_what_the_other_has(
    server: RedisServer, share: ShareConfig, protocol: int
) -> None:
    share = replace(share, redis_url=f"{server.url}?protocol={protocol}")
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        one.logs.log(NS).add(np.arange(10_000, dtype=np.uint64))
        assert both_know(one, two)
        one.logs.log(NS).drop(fingerprints(1, 2, 3))
        two.logs.log(NS).add(fingerprints(7))
        assert both_know(one, two)
        one.logs.log(NS).clear()
        assert both_know(one, two)
        assert two.counts["share_snapshots"] == 1
        assert (NS, "a") not in one.peer_sets.sets


def test_redis_absent_at_the_start(server: RedisServer, share: ShareConfig) -> None:
    server.kill()
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        one.logs.log(NS).add(fingerprints(1))
        assert eventually(lambda: one.counts["share_redis_errors"] > 2)
        assert one.membership.status()["peers"] == []
        server.start()
        assert both_know(one, two)


def test_redis_killed_and_back_empty(
    server: RedisServer, share: ShareConfig, caplog: pytest.LogCaptureFixture
) -> None:
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        assert both_know(one, two)
        caplog.clear()
        server.kill()
        one.logs.log(NS).add(fingerprints(1, 2))
        assert eventually(lambda: one.counts["share_redis_errors"] > 3)
        one.logs.log(NS).drop(fingerprints(1))
        assert two.sees(one)
        server.start()
        assert both_know(one, two)
        assert two.counts["share_snapshots"] == 1  # waiting changes were published, none was lost
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) <= 4  # two connections of two nodes, one line each
    assert "b" not in one.peer_sets.was_down


def test_redis_hangs(server: RedisServer, share: ShareConfig) -> None:
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        assert both_know(one, two)
        server.signal(signal.SIGSTOP)
        one.logs.log(NS).add(fingerprints(1, 2))
        before = one.counts["share_redis_errors"]
        assert eventually(lambda: one.counts["share_redis_errors"] > before)
        assert two.sees(one)
        server.signal(signal.SIGCONT)
        assert both_know(one, two)
        assert two.counts["share_snapshots"] == 1
    assert not one.peer_sets.was_down


def test_close_is_bounded_while_redis_hangs(
    server: RedisServer, share: ShareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # with the real waits
    wires = Wires()
    one = Node(share, wires, "a").start()
    assert eventually(lambda: one.counts["share_beats"] > 1)
    server.signal(signal.SIGSTOP)
    begin = time.monotonic()
    one.membership.close()
    one.membership.close()
    assert time.monotonic() - begin < 2.0  # the bound that the agent relies on
    server.signal(signal.SIGCONT)


def test_redis_is_slow(tmp_path: Path, share: ShareConfig) -> None:
    with RedisServer(tmp_path, "enable-debug-command local") as server:
        share = replace(share, redis_url=server.url)
        wires = Wires()
        over = threading.Event()

        def dawdle() -> None:
            while not over.is_set():
                server.client().execute_command("DEBUG", "SLEEP", "0.35")

        with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
            slow = threading.Thread(target=dawdle)
            slow.start()
            one.logs.log(NS).add(fingerprints(1))
            assert both_know(one, two)
            one.logs.log(NS).drop(fingerprints(1))
            assert both_know(one, two)
            over.set()
            slow.join()
            assert one.counts["share_redis_errors"] == two.counts["share_redis_errors"] == 0


def test_flushall(server: RedisServer, share: ShareConfig) -> None:
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        one.logs.log(NS).add(fingerprints(1))
        assert both_know(one, two)
        for number in range(10, 20):
            server.client().flushall()
            one.logs.log(NS).add(fingerprints(number))
            assert both_know(one, two)
        assert eventually(lambda: one.counts["share_redis_emptied"] > 0)
    assert not one.peer_sets.was_down - {"b"}
    assert not two.peer_sets.was_down


def test_a_node_that_closes_leaves_at_once(server: RedisServer, share: ShareConfig) -> None:
    share = replace(share, node_ttl_s=60.0)
    wires = Wires()
    with Node(share, wires, "a") as one:
        with Node(share, wires, "b") as two:
            assert both_know(one, two)
        assert eventually(lambda: not one.sees(two))
        assert (NS, "b") in one.peer_sets.sets  # kept for a minute: it may come back


def test_a_node_that_dies_is_down_after_the_expiry(server: RedisServer, share: ShareConfig) -> None:
    wires = Wires()
    hand = HandNode(server.client(), wires, "h")
    with Node(share, wires, "a") as one:
        hand.heartbeat()
        assert eventually(lambda: one.peer_sets.peers.get(hand.node_id, (0, "", False))[2])
        assert eventually(lambda: not one.peer_sets.peers[hand.node_id][2])
        hand.heartbeat()
        assert eventually(lambda: one.peer_sets.peers[hand.node_id][2])


def test_a_quiet_stream_gets_heartbeats(
    server: RedisServer, share: ShareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_feed, "STREAM_HEARTBEAT_S", 0.2)
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        assert both_know(one, two)
        key = stream_key("default", NS, one.membership.followers.own_info().node_id)
        assert eventually(lambda: len(server.client().xrange(key)) > 2)
        _entry_id, fields = server.client().xrange(key)[-1]  # type: ignore[index]
        assert fields[b"o"] == b"K"


def test_an_outbox_that_overflows_is_a_new_epoch(server: RedisServer, share: ShareConfig) -> None:
    wires = Wires()
    small = ChangeLogs(outbox_keys=100)
    with Node(share, wires, "a", small) as one, Node(share, wires, "b") as two:
        assert both_know(one, two)
        epoch = small.epoch
        server.signal(signal.SIGSTOP)
        for start in range(0, 300, 10):
            small.log(NS).add(np.arange(start, start + 10, dtype=np.uint64))
        server.signal(signal.SIGCONT)
        assert small.epoch != epoch
        assert small.overflows
        assert both_know(one, two)


def test_two_clusters_on_one_redis_do_not_meet(server: RedisServer, share: ShareConfig) -> None:
    wires = Wires()
    elsewhere = replace(share, cluster_id="other")
    podded = replace(share, share_group="rack 2")
    with (
        Node(share, wires, "a") as one,
        Node(share, wires, "b") as two,
        Node(elsewhere, wires, "c") as three,
        Node(podded, wires, "d") as four,
    ):
        assert both_know(one, two)
        assert eventually(
            lambda: three.counts["share_beats"] > 2 and four.counts["share_beats"] > 2
        )
        assert not three.peer_sets.peers
        assert not four.peer_sets.peers
        assert set(one.peer_sets.peers) == {"b"}


def test_a_servers_clock_that_went_back_leaves_no_zombies(
    server: RedisServer, share: ShareConfig
) -> None:
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        assert both_know(one, two)
        zombie = HandNode(server.client(), wires, "z")
        zombie.heartbeat(ahead_s=3600)  # as all are when the clock goes back an hour
        for node in (one, two):
            server.client().zadd(
                member_keys("default")[0], {node.membership.followers.own_info().node_id: 1e15}
            )
        assert eventually(lambda: server.client().zcard(member_keys("default")[0]) == 2)
        heartbeats = one.counts["share_beats"]
        assert eventually(lambda: one.counts["share_beats"] > heartbeats + 3)
        assert not one.peer_sets.was_down - {"z"}
        assert two.sees(one)


def test_only_namespaces_present_here_are_followed(server: RedisServer, share: ShareConfig) -> None:
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        one.logs.log(OTHER_NS).add(fingerprints(5))
        assert both_know(one, two)
        assert set(two.peer_sets.sets) == {(NS, "a")}
        two.membership.followers.wanted_namespaces({OTHER_NS})
        assert eventually(lambda: two.knows(one, OTHER_NS))
        assert set(two.peer_sets.sets) == {(OTHER_NS, "a")}


def xread_calls(client: redis.Redis) -> int:
    """Number of XREADs that have ended. Redis counts a blocking one at its end, and lists no command before that."""
    return int(client.info("commandstats").get("cmdstat_xread", {"calls": 0})["calls"])


def test_many_streams_are_not_asked_for_at_every_change(
    server: RedisServer, share: ShareConfig
) -> None:
    wires, client = Wires(), server.client()
    others = [HandNode(client, wires, f"n{number}") for number in range(40)]

    def all_there() -> bool:
        for other in others:
            other.heartbeat()
        return len(one.peer_sets.peers) == len(others)

    with Node(share, wires, "a") as one:
        assert eventually(all_there)
        before = xread_calls(client)
        for number in range(200):
            others[number % 40].write(others[number % 40].added(number + 1))
            time.sleep(0.002)
        assert xread_calls(client) - before < 100


def test_the_same_name_twice(
    server: RedisServer, share: ShareConfig, caplog: pytest.LogCaptureFixture
) -> None:
    wires = Wires()
    with Node(share, wires, "twin") as one:
        other = Node(share, wires, "twin")
        other.address = "twin2:1"
        wires.nodes.update({"twin:1": one, "twin2:1": other})
        with other:
            assert eventually(
                lambda: (
                    one.membership.followers.own_info().node_id
                    != other.membership.followers.own_info().node_id
                )
            )
            assert both_know(one, other)
            assert {"twin"} < {
                one.membership.followers.own_info().node_id,
                other.membership.followers.own_info().node_id,
            }
        assert any(
            record.levelname == "ERROR" and "same nid" in record.message
            for record in caplog.records
        )


def test_clocks_of_this_machine_may_jump(
    server: RedisServer, share: ShareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wires = Wires()
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        assert both_know(one, two)
        for number, jump in enumerate((-1e6, 1e6, 0.0)):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1.7e9 + jump)
            heartbeats = one.counts["share_beats"]
            assert eventually(
                lambda heartbeats=heartbeats: one.counts["share_beats"] > heartbeats + 3
            )  # type: ignore[misc]
            one.logs.log(NS).add(fingerprints(number))
            assert both_know(one, two)
    assert not one.peer_sets.was_down


def test_shapes_of_an_answer() -> None:
    one = (b"1-1", {b"a": b"b"})
    two = (b"1-2", None)
    assert list(streams_of(None)) == []
    assert list(streams_of({})) == []
    assert list(streams_of([[b"s", [one, two]]])) == [(b"s", [one, two])]
    assert list(streams_of({b"s": [[one, two]]})) == [(b"s", [one, two])]
    assert list(streams_of({b"s": [one, two]})) == [(b"s", [one, two])]
