"""Fixtures of the feed between nodes: a real redis-server, short waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_sglang.backends.fleet.members import redis_feed
from flexkv_sglang.config.share import ShareConfig
from nodes.redis_server import RedisServer


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits; no behaviour depends on their length."""
    monkeypatch.setattr(redis_feed, "BLOCK_S", 0.1)
    monkeypatch.setattr("flexkv_sglang.backends.fleet.members.follower.JITTER_S", 0.05)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server of the test's own."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def share(server: RedisServer) -> ShareConfig:
    """Settings of a node that uses ``server``."""
    return ShareConfig(redis_url=server.url, heartbeat_s=0.1, node_ttl_s=0.6)
