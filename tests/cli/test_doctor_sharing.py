"""``flexkv doctor`` about sharing between machines: each cause from facts, and some of them from real agents."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.cli.directory.scan import Namespace
from flexkv_sglang.cli.doctor.command import diagnose
from flexkv_sglang.cli.doctor.facts import DirectoryFacts, Facts, Group, Plugin, gather
from flexkv_sglang.cli.doctor.fleet_facts import Fleet, look_at_fleets
from flexkv_sglang.cli.doctor.machine import Machine
from flexkv_sglang.config.settings import FlexKVConfig
from nodes.fleet_nodes import Node
from nodes.redis_server import RedisServer
from stores.engines import wait_until

OURS, THEIRS = "o" * 26, "t" * 26
REDIS = {"kind": "redis", "address": "redis://10.0.0.1:6379/0", "connected": True, "since_s": 9.0}
PEER = {"nid": "b", "address": "10.0.0.3:5000", "state": "up", "serves": [OURS]}
STATUS = {
    "nid": "a",
    "address": "10.0.0.2:4000",
    "cluster_id": "default",
    "pod": "",
    "guarded": True,
    "namespaces": [OURS],
    "feeds": [REDIS],
    "peers": [PEER],
}
HEALTHY = Fleet(
    "/run", {"pid": 7}, STATUS, 0.5, {"11-aa": {"usable": True, "breakers": {}}, "12-bb": {}}
)


def found(*fleets: Fleet, **more: Any) -> dict[str, Any]:
    """Findings of sharing by name."""
    machine = Machine(0, 0, "never", None, "this shell")
    facts = replace(Facts(time.time(), (), Plugin(), machine, None, fleets), **more)
    ours = {"no_agent", "loopback_only", "redis_down", "peer_unreachable", "no_other_node"}
    ours |= {"agent_silent", "agent_differs", "no_common_namespace", "peer_breaker"}
    return {finding.what: finding for finding in diagnose(facts) if finding.what in ours}


def status(**changes: Any) -> Fleet:
    return replace(HEALTHY, status={**STATUS, **changes})


def test_nothing_to_say() -> None:
    assert found() == {}
    assert found(HEALTHY) == {}


def test_no_agent() -> None:
    found_it = found(replace(HEALTHY, agent=None, said="ERROR flexkv: share.listen: in use"))
    assert list(found_it) == ["no_agent"]
    assert "share.listen: in use" in found_it["no_agent"].evidence
    assert found_it["no_agent"].severity == "cause"
    assert found(replace(HEALTHY, agent=None, ranks={})) == {}  # no process needs one


def test_an_agent_that_hangs() -> None:
    assert list(found(replace(HEALTHY, age_s=60.0))) == ["agent_silent"]
    assert found(replace(HEALTHY, status={})) == {}  # it has just started


def test_an_agent_with_other_settings() -> None:
    ranks = {"11-aa": {"usable": False}, "12-bb": {"usable": True}}
    assert "1 of 2 server ranks" in found(replace(HEALTHY, ranks=ranks))["agent_differs"].evidence
    assert list(found(replace(HEALTHY, differs=True))) == ["agent_differs"]


@pytest.mark.parametrize("address", ["127.0.0.1:4000", "[::1]:4000"])
def test_listening_on_loopback_only(address: str) -> None:
    finding = found(status(address=address, guarded=False))["loopback_only"]
    assert "secret_file" in finding.remedy
    assert found(status(address=address)) == {}  # on purpose
    near = {**REDIS, "address": "redis://127.0.0.1:6379/0"}
    assert found(status(address=address, guarded=False, feeds=[near])) == {}  # all on one machine
    near = {**REDIS, "address": "unix:///run/redis"}
    assert found(status(address=address, guarded=False, feeds=[near])) == {}


def test_redis_is_not_connected() -> None:
    feed = {**REDIS, "connected": False, "last_error": "TimeoutError: Timeout reading"}
    finding = found(status(feeds=[feed], peers=[]))
    assert list(finding) == ["redis_down"]
    assert "Timeout reading" in finding["redis_down"].evidence


def test_a_named_peer_does_not_answer() -> None:
    feeds = [
        {"kind": "peer", "address": "10.0.0.4:7400", "connected": False, "last_error": "refused"},
        {"kind": "peer", "address": "10.0.0.5:7400", "connected": True},
    ]
    finding = found(status(feeds=feeds, peers=[]))
    assert list(finding) == ["peer_unreachable"]
    assert "1 of 2: 10.0.0.4:7400: refused" in finding["peer_unreachable"].evidence


def test_no_other_node() -> None:
    assert "none was ever seen" in found(status(peers=[]))["no_other_node"].evidence
    down = found(status(peers=[{**PEER, "state": "down"}]))
    assert "b: down" in down["no_other_node"].evidence


def test_nodes_without_this_namespace(tmp_path: Path) -> None:
    fleet = status(peers=[{**PEER, "serves": [THEIRS]}])
    finding = found(fleet)["no_common_namespace"]
    assert OURS in finding.evidence
    assert THEIRS in finding.evidence
    assert "cannot be told" in finding.evidence
    groups = tuple(
        Group(Namespace(tmp_path / name, {"page_size": size, "dtype": "x"}, (), ()), ())
        for name, size in ((OURS, 16), (THEIRS, 64))
    )
    place = DirectoryFacts(tmp_path, there=True, groups=groups)
    finding = found(fleet, places=(place,))["no_common_namespace"]
    assert "page_size (16 and 64: --page-size)" in finding.evidence
    both = status(peers=[{**PEER, "serves": [THEIRS]}, {**PEER, "nid": "c", "serves": [OURS]}])
    assert found(both) == {}
    assert found(status(peers=[{**PEER, "serves": []}])) == {}  # it has only just started


def test_a_node_that_is_left_alone() -> None:
    ranks = {"11-aa": {"breakers": {"b": "timeout"}}, "12-bb": {}}
    finding = found(replace(HEALTHY, ranks=ranks))["peer_breaker"]
    assert "b by 1 of 2: timeout" in finding.evidence


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """One node at a Redis that needs a password which it does not have."""
    with RedisServer(tmp_path / "redis", "requirepass right-one") as server:
        url = server.url.replace("redis://", "redis://:wrong-one@")
        with Node(tmp_path, "a", redis_url=url) as made:
            yield made


def test_of_a_real_agent(node: Node) -> None:
    rank = node.rank()
    assert rank.put(1, 4) == 4
    config = FlexKVConfig.parse(node.config)

    def look() -> tuple[Fleet, ...]:
        return look_at_fleets([node.pages_dir], config, time.time())

    def evidence() -> str:
        return json.dumps([finding.evidence for finding in found(*look()).values()])

    # Before Redis has refused the password, the evidence of redis_down is "no answer yet".
    assert wait_until(lambda: "AuthenticationError" in evidence())
    assert "redis_down" in found(*look())

    def said() -> list[dict[str, object]]:
        return [
            {name: rank.get(name) for name in ("usable", "breakers", "doubts")}
            for rank in look()[0].ranks.values()
        ]

    assert wait_until(lambda: said() == [{"usable": True, "breakers": {}, "doubts": {}}])
    (fleet,) = look()
    assert fleet.reports
    assert "wrong-one" not in evidence() + str(fleet)
    other = FlexKVConfig.parse({**node.config, "share": {**node.config["share"], "pod": "x"}})
    assert look_at_fleets([node.pages_dir], other, time.time())[0].differs
    node.signal_agent(signal.SIGKILL)
    assert wait_until(lambda: "no_agent" in found(*look()))
    rank.kill()
    shutil.rmtree(node.run_dir.path)
    assert look()[0].run_dir == "none yet"


def test_directories_lead_to_the_agent(node: Node) -> None:
    """Without --url: by the default place of run directories."""
    del node.config["share"]["run_dir"]
    node.config["share"]["cluster_id"] = f"doctor-{node.directory.parent.name}"
    node.write_config()
    rank = node.rank()
    rank.put(1, 4)
    assert wait_until(lambda: look_at_fleets([node.pages_dir], None, time.time()) != ())
    (fleet,) = look_at_fleets([node.pages_dir], None, time.time())
    node.run_dir = type(node.run_dir)(Path(fleet.run_dir))
    try:
        (namespace,) = (path for path in node.pages_dir.iterdir() if path.is_dir())
        (same,) = look_at_fleets([namespace], None, time.time())
        assert same.run_dir == fleet.run_dir
        assert look_at_fleets([node.directory], None, time.time()) == ()
        facts = gather([node.pages_dir], None, Plugin(), time.time())
        assert [item.run_dir for item in facts.fleets] == [fleet.run_dir]
    finally:
        node.close()
        shutil.rmtree(fleet.run_dir)
