"""The failure table: after any failure ranks go on in time, with right pages or none, and everything recovers.

A rank process dies of any exception, so each answer it gives is also a proof that nothing was raised.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nodes.fleet_nodes import Node, Rank, eventually
from nodes.redis_server import ACL, RedisServer

MakeNode = Callable[..., Node]
PAGES = 24
DEADLINE_S = 0.25 + PAGES * (64 << 10) / 100e6
"""Deadline of a remote read of ``PAGES`` pages."""

GRACE_S = 0.6
"""Slack for a busy machine with two cores. The tests look for hangs; benchmarks measure."""


@pytest.fixture
def pair(redis_server: RedisServer, make_node: MakeNode) -> tuple[Node, Rank, Node, Rank]:
    """Node a has pages that node b knows; b stores nothing."""
    a, b = (make_node(name, redis_url=redis_server.url, promote=False) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES), (b.status(), b.agent_log())
    return a, writer, b, reader


def reads_all(reader: Rank, seed: int = 1) -> bool:
    return reader.prefix(seed, PAGES) == PAGES and reader.get(seed, PAGES)["pages"] == PAGES


def test_redis_absent_at_start(redis_server: RedisServer, make_node: MakeNode) -> None:
    redis_server.kill()
    a, b = (make_node(name, redis_url=redis_server.url) for name in "ab")
    writer, reader = a.rank(), b.rank()
    assert writer.put(1, PAGES) == PAGES
    assert writer.get(1, PAGES)["pages"] == PAGES
    assert reader.prefix(1, PAGES) == 0
    redis_server.start()
    assert eventually(lambda: reads_all(reader), 15), (b.status(), b.agent_log())


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_redis_goes_away(
    pair: tuple[Node, Rank, Node, Rank], redis_server: RedisServer, how: str
) -> None:
    _, writer, b, reader = pair
    if how == "killed":
        redis_server.kill()
    else:
        redis_server.signal(signal.SIGSTOP)
    for _ in range(3):  # known pages stay known
        assert reads_all(reader)
    assert writer.put(2, PAGES) == PAGES
    if how == "killed":
        redis_server.start()
    else:
        redis_server.signal(signal.SIGCONT)
    assert eventually(lambda: reads_all(reader, 2), 15), (b.status(), b.agent_log())
    assert reads_all(reader)


def test_redis_is_flushed(pair: tuple[Node, Rank, Node, Rank], redis_server: RedisServer) -> None:
    _, writer, b, reader = pair
    redis_server.client().flushall()
    writer.put(2, PAGES)
    assert eventually(lambda: reads_all(reader, 2)), (b.status(), b.agent_log())
    assert reads_all(reader)


def test_wrong_password(tmp_path: Path, make_node: MakeNode) -> None:
    acl = ACL.format(password="right-one")
    with RedisServer(tmp_path / "guarded", "user default off", acl) as server:
        right, wrong = (
            server.url.replace("redis://", f"redis://fk:{password}@")
            for password in ("right-one", "wrong-one")
        )
        a, b, c = (
            make_node("a", redis_url=right),
            make_node("b", redis_url=right),
            make_node("c", redis_url=wrong),
        )
        writer, reader, other = a.rank(), b.rank(), c.rank()
        assert writer.put(1, PAGES) == PAGES
        assert eventually(lambda: reads_all(reader)), (b.status(), b.agent_log())
        assert other.put(2, 4) == 4
        assert other.get(2, 4)["pages"] == 4
        assert other.prefix(1, PAGES) == 0
        assert eventually(lambda: not c.status().get("feeds", [{}])[0].get("connected", True))
        for node in (a, b, c):
            said = node.agent_log() + str(node.status())
            assert "right-one" not in said
            assert "wrong-one" not in said


def test_the_owners_agent_is_killed(pair: tuple[Node, Rank, Node, Rank]) -> None:
    a, _, b, reader = pair
    a.signal_agent(signal.SIGKILL)
    answer = reader.get(1, PAGES)
    assert answer["pages"] < PAGES
    assert answer["seconds"] < DEADLINE_S + GRACE_S
    assert eventually(lambda: reads_all(reader), 40), (
        b.status(),
        a.agent_log(),
    )  # its rank starts it again


def test_the_owners_agent_hangs(pair: tuple[Node, Rank, Node, Rank]) -> None:
    a, _, b, reader = pair
    a.signal_agent(signal.SIGSTOP)
    answer = reader.get(1, PAGES)
    assert answer["pages"] < PAGES
    assert answer["seconds"] < DEADLINE_S + GRACE_S
    again = reader.ask("get", seed=1, pages=PAGES)
    assert again["seconds"] < GRACE_S  # the breaker is open
    a.signal_agent(signal.SIGCONT)
    assert eventually(lambda: reads_all(reader), 40), (b.status(), reader.counters())
    assert reader.ask("unchanged")["unchanged"]


def test_late_answers_write_nowhere(pair: tuple[Node, Rank, Node, Rank]) -> None:
    a, _, _, reader = pair
    a.signal_agent(signal.SIGSTOP)
    assert reader.get(1, PAGES)["pages"] < PAGES
    a.signal_agent(signal.SIGCONT)
    until = time.monotonic() + 1.5
    while time.monotonic() < until:
        assert reader.ask("unchanged")["unchanged"]


def test_the_owner_comes_back_empty(pair: tuple[Node, Rank, Node, Rank]) -> None:
    a, writer, b, reader = pair
    writer.ask("clear")
    a.signal_agent(signal.SIGKILL)
    assert eventually(lambda: reader.prefix(1, PAGES) == 0, 40), b.status()
    assert reader.get(1, PAGES)["pages"] == 0
    writer.put(3, PAGES)
    assert eventually(lambda: reads_all(reader, 3), 40), (b.status(), a.agent_log())


def test_the_owner_forgets(pair: tuple[Node, Rank, Node, Rank]) -> None:
    _, writer, b, reader = pair
    writer.ask("clear")
    assert eventually(lambda: reader.prefix(1, PAGES) == 0), b.status()


def test_the_owner_evicts_under_the_reader(redis_server: RedisServer, make_node: MakeNode) -> None:
    """A store of 16 pages is overwritten all the time: most reads fail, none is wrong."""
    a = make_node("a", redis_url=redis_server.url, size=1 << 20)
    b = make_node("b", redis_url=redis_server.url, promote=False)
    writer, reader = a.rank(), b.rank()
    writer.put(0, 8)
    assert eventually(lambda: reader.prefix(0, 8) > 0), b.agent_log()
    for seed in range(1, 60):
        writer.put(seed, 8)
        for back in range(3):
            reader.get(max(0, seed - back), 8)
    assert eventually(lambda: reader.prefix(59, 8) == writer.prefix(59, 8))
    assert reader.counters().get("remote_read_pages", 0) > 0


def test_a_page_rots_on_the_owners_disk(pair: tuple[Node, Rank, Node, Rank]) -> None:
    a, _, b, reader = pair
    (slots,) = a.pages_dir.glob("*/*.slots")
    with open(slots, "r+b") as file:
        for number in range(PAGES):
            file.seek(number * (64 << 10) + 1000)
            file.write(b"rot")
        os.fsync(file.fileno())
    assert reader.get(1, PAGES)["pages"] == 0
    assert reader.counters()["remote_corrupt_pages"] >= 1
    assert eventually(lambda: "is bad on disk" in a.agent_log()), a.agent_log()
    assert eventually(lambda: b.peers().get("a", {}).get("pages", PAGES) < PAGES), b.status()


def test_this_nodes_agent_is_killed(pair: tuple[Node, Rank, Node, Rank]) -> None:
    _, writer, b, reader = pair
    pid = b.signal_agent(signal.SIGKILL)
    assert reads_all(reader)  # the replica outlives it for a while
    assert writer.put(2, PAGES) == PAGES
    assert eventually(lambda: b.agent_pid not in (None, pid), 40)
    assert eventually(lambda: reads_all(reader, 2), 15), (b.status(), b.agent_log())


def test_this_nodes_agent_hangs(redis_server: RedisServer, make_node: MakeNode) -> None:
    a = make_node("a", redis_url=redis_server.url)
    b = make_node("b", redis_url=redis_server.url, promote=False, times={"replica_ttl_s": 2})
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reads_all(reader))
    b.signal_agent(signal.SIGSTOP)
    assert reads_all(reader)
    assert eventually(lambda: reader.prefix(1, PAGES) == 0, 10)  # nothing updates it any more
    assert reader.put(2, 4) == 4
    b.signal_agent(signal.SIGCONT)
    assert eventually(lambda: reads_all(reader))


def test_two_nodes_of_one_name(redis_server: RedisServer, make_node: MakeNode) -> None:
    """A copied machine image."""
    a, b = (make_node(name, redis_url=redis_server.url) for name in ("a", "b"))
    b.config["share"] |= {"nid": "a"}
    b.write_config()
    writer = a.rank()
    assert eventually(lambda: a.status().get("nid") == "a")
    reader = b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reads_all(reader), 30), (a.status(), b.status(), b.agent_log())
    assert eventually(lambda: a.status().get("nid") != b.status().get("nid"))
    assert eventually(lambda: reads_all(reader)), (a.status(), b.status())


def test_the_run_directory_is_removed(pair: tuple[Node, Rank, Node, Rank]) -> None:
    """As systemd does at a logout. The agent and the ranks create it again, and find each other."""
    _, writer, b, reader = pair
    shutil.rmtree(b.run_dir.path)
    assert reads_all(reader)
    assert reader.put(3, 4) == 4
    assert eventually(lambda: b.agent_pid is not None and b.status().get("ranks") == 1, 20)
    writer.put(2, PAGES)
    assert eventually(lambda: reads_all(reader, 2), 20), (b.status(), reader.log_text())


def test_the_namespace_is_removed_under_the_agent(pair: tuple[Node, Rank, Node, Rank]) -> None:
    """After ``flexkv gc`` or ``rm`` its pages are not offered any more; those of the next server are."""
    a, writer, b, reader = pair
    writer.stop()
    (namespace,) = (path for path in a.pages_dir.iterdir() if path.is_dir())
    shutil.rmtree(namespace)
    assert eventually(lambda: reader.prefix(1, PAGES) == 0), b.status()
    assert reader.get(1, PAGES)["pages"] == 0
    a.rank().put(2, PAGES)
    assert eventually(lambda: reads_all(reader, 2), 20), (a.agent_log(), b.status())
    assert "Traceback" not in a.agent_log()


def test_a_server_ends_while_everything_hangs(
    pair: tuple[Node, Rank, Node, Rank], redis_server: RedisServer
) -> None:
    """Both agents and Redis are stopped; the rank's end waits for none of them."""
    a, _, b, reader = pair
    assert reader.get(1, PAGES)["pages"] == PAGES
    for node in (a, b):
        node.signal_agent(signal.SIGSTOP)
    redis_server.signal(signal.SIGSTOP)
    reader.ask("get", seed=1, pages=PAGES)
    reader.stop()  # within 30 s, else it is killed and this fails
    b.signal_agent(signal.SIGCONT)
    assert eventually(lambda: b.status().get("ranks") == 0)
