"""Two nodes, one cache: each reads the other's pages, right or not at all, also after a process has stopped."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nodes.fleet_nodes import Node, eventually
from nodes.redis_server import RedisServer, free_port

MakeNode = Callable[..., Node]
PAGES = 24
NO_TROUBLE = ("read_errors", "upkeep_exceptions", "remote_corrupt_pages")


def test_pages_of_another_node(redis_server: RedisServer, make_node: MakeNode) -> None:
    a, b = (make_node(name, redis_url=redis_server.url) for name in "ab")
    writer, reader = a.rank(), b.rank()
    assert writer.put(1, PAGES) == PAGES
    assert eventually(lambda: b.sees("a", PAGES)), (b.status(), a.agent_log(), b.agent_log())
    assert eventually(lambda: reader.prefix(1, PAGES + 8) == PAGES)
    assert reader.get(1, PAGES)["pages"] == PAGES
    counters = reader.counters()
    assert counters["remote_read_pages"] == PAGES
    assert not any(counters.get(name) for name in NO_TROUBLE)


def test_a_wrong_set_is_requested_again(redis_server: RedisServer, make_node: MakeNode) -> None:
    """A rank process reports it in its lock file; its agent takes the other node's snapshot again, once."""
    a, b = (make_node(name, redis_url=redis_server.url) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    namespace = next(iter(b.status()["served_pages"]))
    lock = b.run_dir.take_rank_lock()
    before = b.status()["sharing"].get("share_snapshots", 0)
    lock.write(json.dumps({"doubts": {namespace: {"a": 1, "nobody": 3}}}))
    assert eventually(lambda: b.status()["sharing"].get("share_distrusted") == 1)
    assert eventually(lambda: b.status()["sharing"]["share_snapshots"] > before, 20)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    scanned = b.status()["written_at"]
    assert eventually(lambda: b.status()["written_at"] > scanned + 2)  # the report stays as it is
    assert b.status()["sharing"]["share_distrusted"] == 1
    lock.close()


def test_pages_read_from_another_node_are_stored_here_too(
    redis_server: RedisServer, make_node: MakeNode
) -> None:
    a, b = (make_node(name, redis_url=redis_server.url) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    reader.get(1, PAGES)
    assert eventually(lambda: reader.counters().get("remote_kept_pages") == PAGES)
    a.close()
    assert reader.get(1, PAGES)["pages"] == PAGES
    assert reader.counters()["remote_read_pages"] == PAGES  # not read again


def test_a_prefix_in_pieces(redis_server: RedisServer, make_node: MakeNode) -> None:
    """First pages here, the next on one node, the last on another."""
    nodes = [make_node(name, redis_url=redis_server.url, promote=False) for name in "abc"]
    first, second, third = (node.rank() for node in nodes)
    first.put(1, 5)
    second.put(1, 11, start=5)
    third.put(1, 20, start=11)
    assert eventually(lambda: first.prefix(1, 25) == 20), nodes[0].status()
    assert first.get(1, 25)["pages"] == 20
    assert first.counters()["remote_read_pages"] == 15
    assert eventually(lambda: third.prefix(1, 25) == 20)
    assert third.get(1, 25)["pages"] == 20


def test_a_stopped_server_is_still_read_from(
    redis_server: RedisServer, make_node: MakeNode
) -> None:
    a, b = (make_node(name, redis_url=redis_server.url, promote=False) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    writer.stop()
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    assert reader.get(1, PAGES)["pages"] == PAGES
    again = a.rank()  # adopts the files; the agent follows
    again.put(2, 4)
    assert eventually(lambda: reader.prefix(2, 4) == 4)
    assert reader.get(1, PAGES)["pages"] == PAGES


def test_a_killed_server_is_still_read_from(redis_server: RedisServer, make_node: MakeNode) -> None:
    a, b = (make_node(name, redis_url=redis_server.url) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    writer.kill()
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    assert reader.get(1, PAGES)["pages"] == PAGES


def test_peers_without_redis(make_node: MakeNode) -> None:
    ports = {name: free_port() for name in "ab"}
    a, b = (
        make_node(
            name,
            listen=f"127.0.0.1:{ports[name]}",
            peers=[f"127.0.0.1:{port}" for other, port in ports.items() if other != name],
        )
        for name in "ab"
    )
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES), (b.status(), b.agent_log())
    assert reader.get(1, PAGES)["pages"] == PAGES
    writer.put(1, 2 * PAGES, start=PAGES)  # by POLL, not by a snapshot
    assert eventually(lambda: reader.prefix(1, 2 * PAGES) == 2 * PAGES)


@pytest.mark.parametrize("auth", ["curve", "hmac"])
def test_with_a_secret(
    redis_server: RedisServer, make_node: MakeNode, tmp_path: Path, auth: str
) -> None:
    secrets = {}
    for which in ("right", "wrong"):
        secrets[which] = tmp_path / which
        secrets[which].write_bytes(f"{which} 0123456789".encode() * 4)
        secrets[which].chmod(0o600)
    common = {"redis_url": redis_server.url, "auth": auth, "listen": "127.0.0.1:0"}
    a, b = (make_node(name, secret_file=str(secrets["right"]), **common) for name in "ab")
    stranger = make_node("stranger", secret_file=str(secrets["wrong"]), **common)
    writer, reader, spy = a.rank(), b.rank(), stranger.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES), (b.status(), b.agent_log())
    assert reader.get(1, PAGES)["pages"] == PAGES
    assert spy.get(1, PAGES)["pages"] == 0


def test_one_agent_for_many_ranks(redis_server: RedisServer, make_node: MakeNode) -> None:
    a = make_node("a", redis_url=redis_server.url, listen="127.0.0.1:0", size=8 << 20)
    ranks = [a.rank() for _ in range(8)]
    assert eventually(lambda: a.status().get("ranks") == 8), a.agent_log()
    pid = a.agent_pid
    assert a.agent_log().count("serving namespace") == 1
    for rank in ranks:
        rank.kill()
    assert eventually(lambda: a.status().get("ranks") == 0)
    assert a.agent_pid == pid


def test_an_unused_agent_ends(redis_server: RedisServer, make_node: MakeNode) -> None:
    a = make_node("a", redis_url=redis_server.url, times={"agent_linger_s": 0})
    rank = a.rank()
    assert eventually(lambda: a.agent_pid is not None)
    assert eventually(lambda: a.status().get("ranks") == 1)
    pid, seen = a.agent_pid, a.status()["written_at"]
    assert pid is not None
    assert eventually(lambda: a.status()["written_at"] > seen + 1)  # it has looked again
    assert a.agent_pid == pid
    rank.stop()
    assert eventually(lambda: a.agent_pid is None, 15), a.agent_log()


def test_an_agent_with_other_settings_is_not_used(
    redis_server: RedisServer, make_node: MakeNode
) -> None:
    a = make_node("a", redis_url=redis_server.url)
    first = a.rank()
    assert eventually(lambda: a.agent_pid is not None)
    a.config["share"] |= {"cluster_id": "other"}
    a.write_config()
    second = a.rank()
    assert eventually(lambda: "other settings of share" in second.log_text())
    assert second.put(1, 4) == 4
    assert eventually(lambda: first.get(1, 4)["pages"] == 4)  # neighbours need no agent


def test_two_clusters_on_one_redis(redis_server: RedisServer, make_node: MakeNode) -> None:
    a, b = (make_node(n, redis_url=redis_server.url, cluster_id="red") for n in "ab")
    c = make_node("c", redis_url=redis_server.url, cluster_id="blue")
    writer, reader, other = a.rank(), b.rank(), c.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    assert eventually(lambda: "feeds" in c.status())
    assert other.prefix(1, PAGES) == 0
    assert c.peers() == {}


def test_a_page_is_visible_soon(redis_server: RedisServer, make_node: MakeNode) -> None:
    """Publishing waits for no scan and no heartbeat. Benchmarks measure the time."""
    slow = {"heartbeat_s": 30, "node_ttl_s": 90}
    a, b = (make_node(name, redis_url=redis_server.url, times=slow) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, 1)
    assert eventually(lambda: reader.prefix(1, 1) == 1, 45), b.status()
    begin = time.monotonic()
    writer.put(2, 1)
    assert eventually(lambda: reader.prefix(2, 1) == 1)
    assert time.monotonic() - begin < 10
    a.signal_agent(signal.SIGTERM)
