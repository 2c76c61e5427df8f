"""RDMA transports: offers, leases, quarantine, and the fallback to ZeroMQ after any failure.

``CopyTransport`` copies memory inside this process and fails on command; test_nixl.py uses a real transport.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import pytest

from flexkv_sglang.backends.fleet import transport as transport_module
from flexkv_sglang.backends.fleet.rdma import nixl
from flexkv_sglang.backends.fleet.reader import rdma_channel, rdma_memory
from flexkv_sglang.backends.fleet.reader.client import PeerClient
from flexkv_sglang.backends.fleet.reader.rdma_memory import RdmaMemory
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.backends.fleet.server import offers
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.types import PageKey
from nodes.copy_transport import FAILED, RUNNING, CopyTransport
from nodes.page_servers import NID, begin, reading, serving, until
from nodes.page_sources import MemorySource, PageMemory, keys_of

OK, MISS, LATE = PageOutcome.OK, PageOutcome.MISS, PageOutcome.LATE
CORRUPT, OUT_FAILED, SKIPPED = PageOutcome.CORRUPT, PageOutcome.FAILED, PageOutcome.SKIPPED
KEYS = keys_of(20)
SIZE = 8000  # not a multiple of a sector


def reserved(server: PageServer) -> int:
    """Bytes of pages in the server's slabs."""
    return server._pages.reserved_bytes


def slab(client: PeerClient) -> RdmaMemory:
    """The reader's side of the transport."""
    assert client._rdma is not None
    return client._rdma


def whole(source: MemorySource, memory: PageMemory, count: int = 20) -> bool:
    """True if the first ``count`` pages hold their bytes."""
    return all(memory.page(i) == source.pages[key] for i, key in enumerate(KEYS[:count]))


@pytest.mark.parametrize("lengths", [[SIZE], [100] * 80])
def test_pages_come_through_the_transport(lengths: list[int]) -> None:
    source, memory = MemorySource(KEYS, SIZE), PageMemory(20, lengths)
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=CopyTransport()) as client,
    ):
        assert begin(client, address, KEYS, memory).wait() == [OK] * 20
        assert whole(source, memory)
        until(lambda: not reserved(server))  # DONE has come, long before the end of the lease
        assert (server.counts["pages_offered"], server.counts["pages_sent"]) == (20, 0)
        assert server.counts["holds_expired"] == 0
        until(lambda: slab(client).free_bytes == rdma_memory.SLAB_BYTES)


def test_a_large_batch_takes_several_offers() -> None:
    source, memory = MemorySource(KEYS, 1 << 20), PageMemory(20, [1 << 20])
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=CopyTransport()) as client,
    ):
        assert begin(client, address, KEYS, memory).wait() == [OK] * 20
        assert whole(source, memory)
        assert server.counts["pages_sent"] == 0


def test_pages_larger_than_the_slab_come_over_zmq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RdmaMemory.__init__, "__defaults__", (1 << 20,))
    source, memory = MemorySource(KEYS[:1], 2 << 20), PageMemory(1, [2 << 20])
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=CopyTransport()) as client,
    ):
        assert begin(client, address, KEYS[:1], memory).wait() == [OK]
        until(lambda: server.counts["pages_sent"] == 1)


def test_the_first_missing_page_ends_the_read() -> None:
    source, memory = MemorySource(KEYS[:7] + KEYS[8:], SIZE), PageMemory(20, [SIZE])
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=CopyTransport()) as client,
    ):
        assert begin(client, address, KEYS, memory).wait() == [OK] * 7 + [MISS] + [SKIPPED] * 12
        assert whole(source, memory, 7)
        assert all(memory.untouched(i) for i in range(7, 20))
        until(lambda: not reserved(server))
        assert begin(client, address, keys_of(1, seed=9), PageMemory(1, [SIZE])).wait() == [MISS]


def test_a_corrupt_page_is_never_delivered_and_reported() -> None:
    source, memory = MemorySource(KEYS, SIZE), PageMemory(20, [SIZE])
    source.damage.add(KEYS[4])
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=CopyTransport()) as client,
    ):
        assert begin(client, address, KEYS, memory).wait() == [OK] * 4 + [CORRUPT] + [SKIPPED] * 15
        assert all(memory.untouched(i) for i in range(4, 20))
        assert source.bad_reported.wait(10)
        until(lambda: not reserved(server))


def test_pages_of_another_size_are_not_taken() -> None:
    memory = PageMemory(2, [4096])
    with (
        serving(MemorySource(KEYS, 8192), transport=CopyTransport()) as (_, address),
        reading(transport=CopyTransport()) as client,
    ):
        assert begin(client, address, KEYS[:2], memory).wait() == [OUT_FAILED, SKIPPED]
        assert memory.untouched(0)


@pytest.mark.parametrize("there", [True, False])
def test_zmq_is_used_if_one_side_has_no_transport(there: bool) -> None:
    source, memory, counts = MemorySource(KEYS, SIZE), PageMemory(20, [SIZE]), Counter[str]()
    ours, theirs = (None, CopyTransport()) if there else (CopyTransport(), None)
    with (
        serving(source, transport=theirs) as (server, address),
        reading(transport=ours, count=counts.__setitem__) as client,
    ):
        assert begin(client, address, KEYS, memory).wait() == [OK] * 20
        until(lambda: server.counts["pages_sent"] == 20)
        assert "remote_engine_failures" not in counts


@pytest.mark.parametrize("behaviour", ["refuse", "fail"])
def test_after_an_error_of_the_transport_pages_come_over_zmq(
    behaviour: str, caplog: pytest.LogCaptureFixture
) -> None:
    source, counts, transport = MemorySource(KEYS, SIZE), Counter[str](), CopyTransport(behaviour)
    transport.settle_s = 0.01
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport, count=counts.__setitem__) as client,
    ):
        for number in (1, 2):
            memory = PageMemory(20, [SIZE])
            assert begin(client, address, KEYS, memory).wait() == [OK] * 20
            assert whole(source, memory)
            until(lambda n=number: server.counts["pages_sent"] == 20 * n)
            assert server.counts["pages_offered"] == 20  # not tried again
        assert counts["remote_engine_failures"] == 1
        assert "read over zmq" in caplog.text
        until(lambda: not reserved(server))
        until(lambda: slab(client).free_bytes == rdma_memory.SLAB_BYTES)


def test_the_transport_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rdma_channel, "FALLBACK_S", 0.2)
    source, transport = MemorySource(KEYS, SIZE), CopyTransport("refuse")
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport) as client,
    ):
        assert begin(client, address, KEYS, PageMemory(20, [SIZE])).wait() == [OK] * 20
        transport.behaviour = "copy"

        def fetched() -> bool:
            assert begin(client, address, KEYS, PageMemory(20, [SIZE])).wait() == [OK] * 20
            return bool(transport.transfers)

        until(fetched)
        until(lambda: server.counts["pages_offered"] == 40)


def test_memory_of_a_failed_transfer_is_not_reused_before_settle_s() -> None:
    source, transport = MemorySource(KEYS, SIZE), CopyTransport("fail")
    with (
        serving(source, transport=CopyTransport()) as (_, address),
        reading(transport=transport) as client,
    ):
        assert begin(client, address, KEYS, PageMemory(20, [SIZE])).wait() == [OK] * 20
        assert slab(client).free_bytes < rdma_memory.SLAB_BYTES
        slab(client).tick(time.monotonic() + transport.settle_s - 1)
        assert slab(client).free_bytes < rdma_memory.SLAB_BYTES
        slab(client).tick(time.monotonic() + transport.settle_s + 1)
        assert slab(client).free_bytes == rdma_memory.SLAB_BYTES


def test_pages_come_over_zmq_when_quarantine_fills_the_slab(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RdmaMemory.__init__, "__defaults__", (3 * 20 * 8192,))
    monkeypatch.setattr(rdma_channel, "FALLBACK_S", 0.0)
    source, transport = MemorySource(KEYS, SIZE), CopyTransport("fail")
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport) as client,
    ):
        for _ in range(5):
            memory = PageMemory(20, [SIZE])
            assert begin(client, address, KEYS, memory).wait() == [OK] * 20
            assert whole(source, memory)
        until(lambda: server.counts["pages_sent"] == 5 * 20)
        assert (len(transport.transfers), server.counts["pages_offered"]) == (3, 3 * 20)
        assert slab(client).free_bytes == 0


def test_a_hanging_transfer_ends_at_the_deadline_and_its_memory_is_not_reused() -> None:
    source, memory, transport = (
        MemorySource(KEYS, SIZE),
        PageMemory(20, [SIZE]),
        CopyTransport("hang"),
    )
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport) as client,
    ):
        assert begin(client, address, KEYS, memory, seconds=0.3).wait() == [LATE] * 20
        until(lambda: not reserved(server))
        taken = rdma_memory.SLAB_BYTES - slab(client).free_bytes
        assert taken == 20 * 8192
        # the peer was not silent: it is read over zmq, and the late bytes reach no page
        again = PageMemory(20, [SIZE])
        assert begin(client, address, KEYS, again).wait() == [OK] * 20
        assert slab(client).free_bytes == rdma_memory.SLAB_BYTES - taken
        transport.transfers[0].finish()
        until(lambda: slab(client).free_bytes == rdma_memory.SLAB_BYTES)
        assert all(memory.untouched(i) for i in range(20))
        assert whole(source, again)


def test_a_transfer_must_end_within_half_of_the_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "LEASE_MS", 400)
    source, memory, transport = (
        MemorySource(KEYS, SIZE),
        PageMemory(20, [SIZE]),
        CopyTransport("hang"),
    )
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport) as client,
    ):
        began = time.monotonic()
        assert begin(client, address, KEYS, memory, seconds=60).wait() == [OK] * 20
        assert time.monotonic() - began >= 0.2
        until(lambda: server.counts["pages_sent"] == 20)
        assert server.counts["pages_offered"] == 20
        assert whole(source, memory)
        transport.transfers[0].finish(FAILED)


def test_an_offer_after_half_of_its_lease_is_not_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offers, "LEASE_MS", 100)
    source, memory, transport = MemorySource(KEYS, SIZE), PageMemory(20, [SIZE]), CopyTransport()

    def slow(asked: Sequence[PageKey]) -> None:
        source.before = lambda keys: None
        end = time.monotonic() + 0.06
        while time.monotonic() < end:
            pass

    source.before = slow
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport) as client,
    ):
        assert begin(client, address, KEYS, memory).wait() == [OK] * 20
        assert not transport.transfers
        until(lambda: server.counts["pages_sent"] == 20)


def test_a_server_that_goes_away_during_a_transfer() -> None:
    source, memory, transport = (
        MemorySource(KEYS, SIZE),
        PageMemory(20, [SIZE]),
        CopyTransport("hang"),
    )
    with reading(transport=transport) as client:
        with serving(source, transport=CopyTransport()) as (_, address):
            pending = begin(client, address, KEYS, memory, seconds=60)
            until(lambda: bool(transport.transfers))
        assert pending.wait() == [OUT_FAILED] + [SKIPPED] * 19
        assert client.is_open(NID)
        assert slab(client).free_bytes < rdma_memory.SLAB_BYTES
        assert transport.transfers[0].state is RUNNING
    assert (
        transport,
        slab(client)._slab,
    ) in transport_module._kept  # never freed: the transport may still write
    transport_module._kept.clear()
    assert all(memory.untouched(i) for i in range(20))


def test_a_server_that_goes_away_before_a_refused_transfer() -> None:
    source, memory, transport = (
        MemorySource(KEYS, SIZE),
        PageMemory(20, [SIZE]),
        CopyTransport("refuse"),
    )
    with (
        serving(source, transport=CopyTransport()) as (server, address),
        reading(transport=transport) as client,
    ):
        transport.before = server.close
        began = time.monotonic()
        outcomes = begin(client, address, KEYS, memory, seconds=60).wait()
        assert outcomes == [OUT_FAILED] + [SKIPPED] * 19
        assert time.monotonic() - began < 30
        assert slab(client).free_bytes == rdma_memory.SLAB_BYTES


# ---- start ----


def test_a_missing_transport_is_an_error_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "MODULES", ("flexkv_no_such_module",))
    share = ShareConfig(engine="nixl")
    with pytest.raises(ConfigError) as raised:
        PeerClient(share, lambda name, amount: None)
    assert all(
        word in str(raised.value) for word in ("share.engine: 'nixl'", "pip install", "'zmq'")
    )
    with pytest.raises(ConfigError, match=r"share.engine: 'nixl'"), serving(None, share):
        pass


def test_memory_that_cannot_be_registered_is_an_error_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"share.engine.*no memory"):
        PeerClient(ShareConfig(), lambda name, amount: None, CopyTransport("no memory"))
    with (
        pytest.raises(ConfigError, match=r"share.engine.*no memory"),
        serving(None, transport=CopyTransport("no memory")),
    ):
        pass


def test_transports_are_closed_with_their_owners() -> None:
    ours, theirs = CopyTransport(), CopyTransport()
    with serving(None, transport=theirs), reading(transport=ours):
        pass
    assert ours.closed
    assert theirs.closed
