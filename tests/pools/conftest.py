"""Fixtures for tests of pools."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from flexkv_sglang import FlexKVStorage


@pytest.fixture(autouse=True)
def patient(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long time limits, except where a test sets its own."""
    if request.node.get_closest_marker("sglang"):
        monkeypatch.setattr("flexkv_sglang.integration.storage.READ_SECONDS_MIN", 8.0)
        monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 20.0)


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FlexKVStorage]:
    """A storage backend with three pools."""
    from models.plain_pools import hybrid

    made = hybrid(tmp_path)
    yield made
    made.close()
