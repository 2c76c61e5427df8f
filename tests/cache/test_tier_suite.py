"""The conformance suite over slot files on a disk and in memory, by each I/O engine, and over the example tier."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import dedent
from unittest import mock

import pytest

from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.cache.assembly import OPENERS, Quota, TierRequest, open_tiers, prepare_tiers
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.config.settings import TIER_TYPES, FlexKVConfig, TierConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.testing.example_tier import MemoryTier
from flexkv_sglang.testing.tier_suite import TierSuite
from flexkv_sglang.tier import Tier
from flexkv_sglang.types import PageKey
from stores.engines import open_engine

ROOT = Path(__file__).resolve().parents[2]


class TestMemoryTier(TierSuite):
    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = MemoryTier(room=64)
        yield tier
        tier.close()

    def damage(self, tier: MemoryTier, key: PageKey) -> None:  # type: ignore[override]
        slot, page, checksum = tier._pages[key]
        tier._pages[key] = slot, bytes([page[0] ^ 1]) + page[1:], checksum


@pytest.mark.parametrize("io_engine", ["io_uring", "threads", "buffered"])
class TestSlotFiles(TierSuite):
    @pytest.fixture(params=["disk", "memory"])
    def tier(self, request, tmp_path: Path, shm_path: Path, io_engine: str) -> Iterator[Tier]:
        self.directory = tmp_path if request.param == "disk" else shm_path
        tier = open_engine(self.directory, 8192, 64 * 8192, io_engine=io_engine)
        yield tier
        tier.close()

    def damage(self, tier: Tier, key: PageKey) -> None:
        with next(self.directory.rglob("*.slots")).open("r+b") as file:
            file.seek(tier._pages.index.find(key) * 8192 + 77)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 1]))

    def broken_medium(self, tier: Tier) -> AbstractContextManager[object]:
        return mock.patch.object(PageMover, "move", side_effect=OSError(5, "planted"))


def test_every_type_of_tier_has_an_opener() -> None:
    assert tuple(OPENERS) == TIER_TYPES
    for name in OPENERS:
        (tier,) = FlexKVConfig.parse({"tiers": [{"type": name, "path": "/a"}]}).tiers
        assert tier.type == name
    with pytest.raises(
        ConfigError, match=rf"tiers\[0\]\.type: 'tape'. Valid: {', '.join(OPENERS)}"
    ):
        FlexKVConfig.parse({"tiers": [{"type": "tape", "path": "/a"}]})


def test_the_type_of_a_tier_chooses_its_opener(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TierRequest] = []

    def opened(request: TierRequest) -> Tier:
        made.append(request)
        return MemoryTier(room=8)

    monkeypatch.setitem(OPENERS, "memory", opened)
    config = FlexKVConfig(
        tiers=(TierConfig((str(tmp_path),), type="memory"), TierConfig((str(tmp_path / "b"),)))
    )
    tiers = open_tiers(
        config, prepare_tiers(config), "ns", {}, 8192, [Quota(0), Quota(1 << 20)], Metrics()
    )
    assert [type(tier) for tier in tiers.tiers] == [MemoryTier, CacheEngine]
    assert [(request.number, list(request.modes)) for request in made] == [(0, [str(tmp_path)])]
    tiers.close()


def test_the_guide_quotes_the_code_as_it_is() -> None:
    guide = (ROOT / "docs" / "EXTENDING.md").read_text()
    sources = map(inspect.getsource, (MemoryTier.get, TestMemoryTier))
    assert re.findall(r"```python\n(.*?)```", guide, re.DOTALL) == list(map(dedent, sources))
