"""The conformance suite over other machines: a real page server, a real client, a real replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.reader.client import PeerClient
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import NodeId, Snapshot, fingerprints_of
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.remote_pages import RemoteTier
from flexkv_sglang.testing.pages import Bytes
from flexkv_sglang.testing.tier_suite import TierSuite
from flexkv_sglang.tier import Tier
from flexkv_sglang.types import PageKey
from nodes.page_servers import EPOCH, FULL, NAME, serving
from nodes.page_sources import MemorySource


class TestOtherMachines(TierSuite):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        share, self.source = ShareConfig(listen="127.0.0.1:0"), MemorySource([], self.page_bytes)
        with ExitStack() as stack:
            self.writer = PeerSetsWriter(tmp_path)
            stack.callback(self.writer.close)
            _, address = stack.enter_context(serving(self.source, share))
            self.writer.set_peer(NodeId("a"), EPOCH, address, up=True)
            metrics = Metrics()
            client = PeerClient(share, metrics.count)
            stack.callback(client.close)
            reader = PeerSetsReader(tmp_path, NAME, 30.0)
            tier = RemoteTier(NAME, self.page_bytes, reader, client, FULL, share, metrics)
            stack.callback(tier.close)
            yield tier

    def fill(self, tier: Tier, names: Sequence[PageKey], pages: Bytes) -> None:
        self.source.pages |= dict(zip(names, map(bytes, pages), strict=True))
        held = np.sort(fingerprints_of(list(self.source.pages)))
        self.writer.reset(NAME, NodeId("a"), Snapshot(EPOCH, len(held), held))

    def damage(self, tier: Tier, key: PageKey) -> None:
        self.source.damage.add(key)

    def broken_medium(self, tier: Tier) -> AbstractContextManager[object]:
        return mock.patch.object(self.source, "read", side_effect=OSError(5, "planted"))
