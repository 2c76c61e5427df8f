"""An agent serves every tier, also one in memory; tools understand a node's files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.cli.nodes import run_nodes
from nodes.fleet_nodes import PAGE_BYTES, Node, eventually
from nodes.redis_server import RedisServer

MakeNode = Callable[..., Node]
PAGES = 24


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in /dev/shm."""
    path = Path("/dev/shm") / f"flexkv-test-{os.getpid()}-{tmp_path.name}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_pages_that_are_in_memory_only(
    redis_server: RedisServer, make_node: MakeNode, memory: Path
) -> None:
    """The lower tier has room for a third of them."""
    a, b = (make_node(name, redis_url=redis_server.url, promote=False) for name in "ab")
    disk = {"path": a.config.pop("path"), "size": 8 * PAGE_BYTES + 8192}
    a.config.pop("size")
    a.config["tiers"] = [{"path": str(memory), "size": 64 << 20}, disk]
    a.write_config()
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES), (b.status(), a.agent_log())
    assert reader.get(1, PAGES)["pages"] == PAGES
    assert eventually(lambda: len(a.status()["directories"]) == 2)


def flexkv(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "flexkv_sglang.cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


def test_tools_know_the_nodes_mark(redis_server: RedisServer, make_node: MakeNode) -> None:
    a = make_node("a", redis_url=redis_server.url)
    rank = a.rank()
    rank.put(1, 4)
    rank.stop()
    mark = (a.pages_dir / "node-id").read_text()
    code, found = flexkv("check", str(a.pages_dir))
    assert code == 0, found
    assert "node-id" not in json.dumps(found)
    assert flexkv("stats", str(a.pages_dir))[0] == 0
    assert flexkv("gc", str(a.pages_dir), "--older-than", "0s", "--yes")[0] == 0
    assert (a.pages_dir / "node-id").read_text() == mark


def test_nodes_shows_all_that_an_agent_counts(
    redis_server: RedisServer, make_node: MakeNode, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every name is in the manual's table."""
    a, b = (make_node(name, redis_url=redis_server.url, promote=False) for name in "ab")
    writer, reader = a.rank(), b.rank()
    writer.put(1, PAGES)
    assert eventually(lambda: reader.prefix(1, PAGES) == PAGES)
    assert reader.get(1, PAGES)["pages"] == PAGES
    writer.put(2, PAGES)
    assert eventually(lambda: reader.prefix(2, PAGES) == PAGES)
    assert eventually(lambda: a.status()["served"].get("pages_sent") == PAGES)
    served = a.status()["served"]
    assert served["bytes_sent"] == PAGES * PAGE_BYTES
    assert served["snapshots_asked"] >= 1
    assert eventually(lambda: b.status()["sharing"].get("share_changes_in", 0) >= 1)
    assert a.status()["sharing"]["share_changes_out"] >= 1
    assert run_nodes(a.run_dir.path, as_json=True) == 0
    (agent,) = json.loads(capsys.readouterr().out.splitlines()[-1])["agents"]
    assert agent["status"]["served"]["pages_sent"] == PAGES
    assert "b" in [peer["nid"] for peer in agent["status"]["peers"]]
    manual = (Path(__file__).resolve().parents[2] / "docs" / "OPERATING.md").read_text()
    for node in (a, b):
        status = node.status()
        names = {*status["sharing"], *status["served"], *status["counters"]}
        assert not [name for name in names if f"`{name}`" not in manual]
    text = run_nodes(b.run_dir.path, as_json=False)
    assert text == 0
    assert "serves" in capsys.readouterr().out
