"""Other nodes' pages in one rank process: real replica, real page server, real tiers."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.fleet.reader.client import PeerClient
from flexkv_sglang.backends.fleet.reader.read import Pending, RemoteRead
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import NodeId, Snapshot, fingerprints_of
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.remote_pages import RemoteTier
from flexkv_sglang.types import PageKey
from nodes.page_servers import EPOCH, FULL, NAME, serving
from nodes.page_sources import MemorySource, PageMemory, keys_of
from stores.engines import open_engine, soon

PAGE = 8192
NODES = ("a", "b")


class Client(PeerClient):
    """The real client. ``deadlines``: of its reads; ``fails_at``: number of the read that cannot begin."""

    def __init__(self, share: ShareConfig, metrics: Metrics) -> None:
        super().__init__(share, metrics.count)
        self.deadlines: list[float] = []
        self.fails_at = -1

    def begin(self, read: RemoteRead) -> Pending:
        self.deadlines.append(read.deadline)
        if len(self.deadlines) - 1 == self.fails_at:
            raise RuntimeError("can't start new thread")
        return super().begin(read)


@dataclass
class Bed:
    """Sources of two other nodes, the replica that lists them, and this process's tiers."""

    writer: PeerSetsWriter
    pages: RemoteTier
    client: Client
    metrics: Metrics
    sources: dict[str, MemorySource]
    store: Tiers
    memory: list[PageMemory] = field(default_factory=list)

    def holds(self, node: str, keys: Sequence[PageKey]) -> None:
        """Give a node these pages, and list them in the replica."""
        source = MemorySource(keys, PAGE, self.sources[node].before)
        self.sources[node].pages = source.pages
        fingerprints = np.sort(fingerprints_of(keys))
        self.writer.reset(NAME, NodeId(node), Snapshot(EPOCH, len(keys), fingerprints))

    def counted(self, name: str) -> int:
        return self.metrics.snapshot().get(name, 0)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    share, metrics = ShareConfig(listen="127.0.0.1:0", remote_deadline_s=5.0), Metrics()
    with ExitStack() as stack:
        writer = PeerSetsWriter(tmp_path / "run")
        stack.callback(writer.close)
        sources = {}
        for node in NODES:
            sources[node] = MemorySource([], PAGE)
            _server, address = stack.enter_context(serving(sources[node], share))
            writer.set_peer(NodeId(node), EPOCH, address, up=True)
        client = Client(share, metrics)
        stack.callback(client.close)
        reader = PeerSetsReader(tmp_path / "run", NAME, 30.0)
        pages = RemoteTier(NAME, PAGE, reader, client, FULL, share, metrics)
        store = Tiers([open_engine(tmp_path / "disk", PAGE, 64 * PAGE), pages], metrics)
        stack.callback(store.close)
        yield Bed(writer, pages, client, metrics, sources, store)


def put(store: Tiers, keys: Sequence[PageKey]) -> None:
    source = MemorySource(keys, PAGE)
    memory = PageMemory(len(keys), [PAGE])
    for row, key in enumerate(keys):
        memory.bytes[row] = np.frombuffer(source.pages[key], np.uint8)
    assert all(store.put(keys, memory.buffers, None, soon()))


def right(memory: PageMemory, keys: Sequence[PageKey]) -> list[bool]:
    pages = MemorySource(keys, PAGE).pages
    return [memory.page(row) == pages[key] for row, key in enumerate(keys)]


def test_runs_of_two_nodes_and_of_this_one(bed: Bed) -> None:
    keys = keys_of(14)
    bed.holds("a", keys[:5])
    bed.holds("b", keys[8:12])
    put(bed.store, keys[5:8])
    memory = PageMemory(14, [PAGE])
    assert bed.store.prefix(keys) == 12
    assert bed.store.get(keys, memory.buffers, soon()) == [True] * 12 + [False] * 2
    assert right(memory, keys)[:12] == [True] * 12
    assert memory.untouched(12)
    assert memory.untouched(13)


def test_turns_share_one_time_limit(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(12)
    bed.holds("a", keys[:4] + keys[8:])
    put(bed.store, keys[4:8])
    limits: list[float] = []
    latest = bed.pages.get_deadline

    def noted(page_count: int, deadline: float) -> float:
        limits.append(latest(page_count, deadline))
        return limits[-1]

    monkeypatch.setattr(bed.pages, "get_deadline", noted)
    never = threading.Event()
    bed.sources["a"].before = lambda _keys: bool(never.wait(0.01))  # type: ignore[assignment,return-value]
    memory = PageMemory(12, [PAGE])
    assert all(bed.store.get(keys, memory.buffers, soon()))
    assert len(bed.client.deadlines) == 2
    assert max(bed.client.deadlines) <= limits[0]


def test_a_read_that_cannot_begin_leaves_none_behind(bed: Bed) -> None:
    """The second run fails while the first is being read: no target is touched after the error is raised."""
    keys, gate = keys_of(8), threading.Event()
    bed.holds("a", keys[:4])
    bed.holds("b", keys[4:])
    bed.sources["a"].before = lambda _keys: bool(gate.wait(10))  # type: ignore[assignment,return-value]
    bed.client.fails_at = 1
    memory = PageMemory(8, [PAGE])
    with pytest.raises(RuntimeError, match="thread"):
        bed.store.get(keys, memory.buffers, soon())
    gate.set()
    probe = PageMemory(4, [PAGE])  # over the same connection, so behind the cancelled read
    bed.client.fails_at = -1
    assert all(bed.store.get(keys[:4], probe.buffers, soon()))
    assert all(memory.untouched(row) for row in range(8))


def test_a_page_that_a_node_missed_is_not_asked_for_there_again(bed: Bed) -> None:
    keys = keys_of(6)
    bed.holds("a", keys)
    del bed.sources["a"].pages[keys[3]]
    memory = PageMemory(6, [PAGE])
    assert bed.store.get(keys, memory.buffers, soon()) == [True] * 3 + [False] * 3
    assert bed.counted("remote_miss_pages") == 1
    assert bed.store.prefix(keys) == 3
    bed.holds("b", keys)  # it may be elsewhere
    assert bed.store.prefix(keys) == 6


def test_a_node_that_misses_time_after_time_is_doubted(bed: Bed) -> None:
    keys = keys_of(50)
    bed.holds("a", keys)
    for key in keys[1:]:
        del bed.sources["a"].pages[key]
    memory = PageMemory(1, [PAGE])

    def read(numbers: range) -> None:
        for number in numbers:
            bed.store.get(keys[number : number + 1], memory.buffers, soon())

    read(range(1, 16))
    assert bed.pages.doubts() == {}
    read(range(1))  # it has that one, so the count starts again
    read(range(16, 31))
    assert bed.pages.doubts() == {}
    read(range(31, 32))
    assert bed.pages.doubts() == {"a": 1}
    read(range(32, 48))
    assert bed.pages.doubts() == {"a": 2}


def test_a_hole_in_the_first_run_ends_it(bed: Bed) -> None:
    """Pages of the second run arrive and do not count, because a page before them is missing."""
    keys = keys_of(8)
    bed.holds("a", keys[:4])
    bed.holds("b", keys[4:])
    del bed.sources["a"].pages[keys[2]]
    memory = PageMemory(8, [PAGE])
    assert bed.store.get(keys, memory.buffers, soon()) == [True] * 2 + [False] * 6
    assert right(memory, keys)[:2] == [True] * 2


def test_a_wrong_page_does_not_count(bed: Bed) -> None:
    keys = keys_of(6)
    bed.holds("a", keys)
    bed.sources["a"].damage.add(keys[2])
    memory = PageMemory(6, [PAGE])
    assert bed.store.get(keys, memory.buffers, soon()) == [True] * 2 + [False] * 4
    assert bed.counted("remote_corrupt_pages") == 1
    assert bed.store.prefix(keys) == 2


def test_pages_of_another_size_are_misses(bed: Bed, tmp_path: Path) -> None:
    """A node serves pages of another size, which its namespace forbids: nothing is copied."""
    keys = keys_of(4)
    bed.holds("a", keys)
    for key in keys:
        bed.sources["a"].pages[key] += b"x" * 8
    bed.sources["a"].payload_bytes += 8
    memory = PageMemory(4, [PAGE])
    assert bed.store.get(keys, memory.buffers, soon()) == [False] * 4
    assert all(memory.untouched(row) for row in range(4))


def test_pages_that_are_computed_sooner_are_not_fetched(bed: Bed, tmp_path: Path) -> None:
    keys = keys_of(4)
    bed.holds("a", keys)
    memory = PageMemory(4, [PAGE])
    assert all(bed.pages.begin_get(keys, memory.buffers, soon()).wait() == 4 for _ in range(1))  # type: ignore[union-attr]
    quick = ShareConfig(remote_deadline_s=5.0, recompute_tokens_per_s=1e9)
    reader = PeerSetsReader(tmp_path / "run", NAME, 30.0)
    pages = RemoteTier(NAME, PAGE, reader, bed.client, FULL, quick, bed.metrics, page_tokens=16)
    until = soon()
    while not bed.client.seconds_for(NodeId("a"), PAGE):  # with the end, behind the last page
        assert soon() - until < 10
    assert pages.prefix(keys) == 0
    assert bed.counted("remote_left_pages") == 4
    assert bed.pages.prefix(keys) == 4
    pages.close()


def test_weaker_checksums_do_not_count(bed: Bed) -> None:
    keys = keys_of(2)
    bed.holds("a", keys)
    bed.sources["a"].kind = ChecksumKind.NONE
    memory = PageMemory(2, [PAGE])
    assert bed.store.get(keys, memory.buffers, soon()) == [False] * 2
    assert all(memory.untouched(row) for row in range(2))


def test_an_agent_with_other_settings_is_not_asked(bed: Bed, tmp_path: Path) -> None:
    keys: list[Any] = keys_of(2)
    bed.holds("a", keys)
    usable = [False]
    reader = PeerSetsReader(tmp_path / "run", NAME, 30.0)
    pages = RemoteTier(
        *(NAME, PAGE, reader, bed.client, FULL, ShareConfig(), bed.metrics),
        usable=lambda: usable[0],
    )
    assert pages.prefix(keys) == 0
    assert pages.holds(keys) == [False] * 2
    usable[0] = True
    assert pages.prefix(keys) == 2
    pages.close()
    assert pages.prefix(keys) == 0
    assert pages.holds(keys) == [False] * 2
    assert list(pages.peers()) == []
