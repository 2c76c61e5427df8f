"""Nodes on loopback that meet at a real redis-server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from nodes.fleet_nodes import Node
from nodes.redis_server import RedisServer

MakeNode = Callable[..., Node]


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """Running; the test may kill it."""
    with RedisServer(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def make_node(tmp_path: Path) -> Iterator[MakeNode]:
    """Nodes that are killed at the end, agents and all."""
    with ExitStack() as stack:

        def make(name: str, **settings: Any) -> Node:
            node = Node(tmp_path, name, **settings)
            stack.callback(node.close)
            return node

        yield make
