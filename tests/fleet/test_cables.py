"""The failure table's rows about the network: hosts in network namespaces, cables that are cut and healed.

A cut cable is silence: no process gets an error. Needs root and iproute2, else skipped with the reason.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from flexkv_bed.cluster_demo import redis_server
from flexkv_bed.netns import Cluster, UnavailableError
from nodes.fleet_nodes import Node, Rank, eventually

PAGES = 24
DEADLINE_S = 0.25 + PAGES * (64 << 10) / 100e6
GRACE_S = 0.6


@dataclass
class Hosts:
    """Two nodes with a rank process each, and the cables."""

    cluster: Cluster
    a: Node
    b: Node
    writer: Rank
    reader: Rank

    def reads_all(self, seed: int = 1) -> bool:
        return (
            self.reader.prefix(seed, PAGES) == PAGES
            and self.reader.get(seed, PAGES)["pages"] == PAGES
        )


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    with ExitStack() as stack:
        try:
            cluster = stack.enter_context(Cluster(("redis", "a", "b")))
        except UnavailableError as exc:
            pytest.skip(str(exc))
        stack.enter_context(redis_server(cluster, tmp_path / "redis"))
        secret = tmp_path / "secret"
        secret.write_bytes(bytes(range(32)))
        secret.chmod(0o600)
        url = f"redis://{cluster.address('redis')}:6379/0"
        nodes = {}
        for name in "ab":
            node = nodes[name] = Node(
                tmp_path,
                name,
                prefix=cluster.command(name),
                redis_url=url,
                secret_file=str(secret),
                promote=False,
            )
            stack.callback(node.close)
        found = Hosts(cluster, nodes["a"], nodes["b"], nodes["a"].rank(), nodes["b"].rank())
        found.writer.put(1, PAGES)
        assert eventually(found.reads_all, 20), (found.b.status(), found.b.agent_log())
        yield found


def advertised_address(node: Node) -> str:
    return str(node.status().get("address"))


def test_an_agent_listens_where_others_can_reach_it(hosts: Hosts) -> None:
    assert advertised_address(hosts.a).startswith(hosts.cluster.address("a") + ":")


def test_the_owners_cable_is_cut_and_healed(hosts: Hosts) -> None:
    hosts.cluster.cut("a")
    answer = hosts.reader.get(1, PAGES)
    assert answer["pages"] < PAGES
    assert answer["seconds"] < DEADLINE_S + GRACE_S
    for _ in range(5):  # its breaker is open
        assert hosts.reader.get(1, PAGES)["seconds"] < GRACE_S
    assert hosts.writer.put(2, PAGES) == PAGES
    assert hosts.reader.put(3, PAGES) == PAGES
    assert eventually(lambda: hosts.reader.prefix(1, PAGES) == 0)
    hosts.cluster.heal("a")
    assert eventually(lambda: hosts.reads_all(2), 30), (hosts.b.status(), hosts.a.status())
    assert hosts.reads_all(1)
    assert hosts.reader.ask("unchanged")["unchanged"]


def test_late_packets_write_nowhere(hosts: Hosts) -> None:
    """Bytes on their way at the deadline may still arrive, but not in SGLang's pages."""
    for _ in range(4):
        hosts.cluster.cut("a")
        hosts.reader.get(1, PAGES)
        hosts.cluster.heal("a")
        until = time.monotonic() + 0.7
        while time.monotonic() < until:
            assert hosts.reader.ask("unchanged")["unchanged"]


def test_redis_is_cut_off(hosts: Hosts) -> None:
    """Packets to it vanish: known pages stay in use, and changes of that time are sent afterwards."""
    hosts.cluster.cut("redis")
    time.sleep(2 * 1.5)  # longer than a node may be silent
    for _ in range(3):
        assert hosts.reads_all()
    assert hosts.writer.put(2, PAGES) == PAGES
    hosts.cluster.heal("redis")
    assert eventually(lambda: hosts.reads_all(2), 30), (hosts.b.status(), hosts.b.agent_log())


def test_one_way(hosts: Hosts) -> None:
    """b's packets to a vanish, a's to b do not; both reach Redis. Only b loses the other's pages."""
    hosts.reader.put(5, PAGES)
    assert eventually(lambda: hosts.writer.prefix(5, PAGES) == PAGES)
    blackhole(hosts.cluster, "b", "a", on=True)
    assert hosts.reader.get(1, PAGES)["pages"] < PAGES
    assert hosts.reader.get(1, PAGES)["seconds"] < GRACE_S
    blackhole(hosts.cluster, "b", "a", on=False)
    assert eventually(hosts.reads_all, 40), hosts.b.status()


def blackhole(cluster: Cluster, source: str, target: str, *, on: bool) -> None:
    route = ["blackhole", cluster.address(target)]
    command = [*cluster.command(source), "ip", "route", "add" if on else "del", *route]
    subprocess.run(command, check=True, capture_output=True)
