"""The server's side of OFFER: which pages it leases, to which reader, and for how long."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from flexkv_sglang.backends.fleet.server import offers
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.vocabulary import PageStatus
from flexkv_sglang.backends.fleet.wire import answers, requests
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.types import PageKey
from nodes.copy_transport import CopyTransport
from nodes.page_servers import SPACE, serving, until
from nodes.page_sources import MemorySource, keys_of
from nodes.raw_peer import RawPeer

KEYS = keys_of(20)
SIZE = 8000  # not a multiple of a sector


def reserved(server: PageServer) -> int:
    """Bytes of pages in the server's slabs."""
    return server._pages.reserved_bytes


def offer(request_id: int, keys: Sequence[PageKey] = KEYS, budget_ms: int = 5000) -> list[bytes]:
    """An OFFER of pages."""
    return requests.pack_offer(
        requests.Read(request_id, SPACE, budget_ms, requests.STOP_AT_FIRST, tuple(keys))
    )


def read(request_id: int, keys: Sequence[PageKey] = KEYS) -> list[bytes]:
    """A READ of the same."""
    return requests.pack_read(
        requests.Read(request_id, SPACE, 5000, requests.STOP_AT_FIRST, tuple(keys))
    )


def test_a_lease_lasts_until_done_of_the_same_reader() -> None:
    transport = CopyTransport()
    with (
        serving(MemorySource(KEYS, SIZE), transport=transport) as (server, address),
        RawPeer(address) as peer,
        RawPeer(address) as other,
    ):
        peer.say(offer(1))
        offered = peer.hear()
        assert isinstance(offered, answers.Offered)
        assert (offered.request_id, offered.lease_ms, offered.blob) == (1, 5000, transport.blob())
        assert [page.status for page in offered.pages] == [PageStatus.OK] * 20
        start, byte_count = transport.memory
        assert all(start <= page.address < start + byte_count for page in offered.pages)
        assert reserved(server) == 20 * 8192
        other.say(requests.pack_done(offered.lease))
        other.say(read(2))  # answered behind it
        assert len(other.hear_all()) == 21
        peer.say(requests.pack_done(offered.lease + 1))
        peer.say(read(3))
        assert len(peer.hear_all()) == 21
        until(lambda: not server._pages.is_sending)  # the pages of READ
        assert reserved(server) == 20 * 8192
        peer.say(requests.pack_done(offered.lease))
        until(lambda: not reserved(server))
        peer.say(requests.pack_done(offered.lease))  # a second DONE does no harm
        peer.say(read(4))
        assert len(peer.hear_all()) == 21


def test_leased_memory_is_not_reused_before_the_lease_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(offers, "LEASE_MS", 1000)
    share = ShareConfig(
        listen="127.0.0.1:0", serve_inflight=20 * 8192, serve_inflight_peer=20 * 8192
    )
    with serving(MemorySource(KEYS, SIZE), share, transport=CopyTransport()) as (server, address):
        peer = RawPeer(address)
        with peer, RawPeer(address) as other:
            peer.say(offer(1))
            assert isinstance(peer.hear(), answers.Offered)
            other.say(read(2))
            busy = other.hear()
            assert isinstance(busy, answers.PagesHeader)
            assert busy.status is PageStatus.BUSY
        # both are gone, but a transport may still read
        assert reserved(server) == 20 * 8192
        until(lambda: not reserved(server))
        assert server.counts["holds_expired"] == 1
        with RawPeer(address) as third:
            third.say(read(3))
            assert len(third.hear_all()) == 21


def test_a_cancelled_offer_leases_nothing() -> None:
    source, cancelled = MemorySource(KEYS, 1 << 20), []
    with serving(source, transport=CopyTransport()) as (server, address), RawPeer(address) as peer:

        def cancel(asked: Sequence[PageKey]) -> None:
            if KEYS[3] in asked:
                peer.say(requests.pack_cancel(1))
                until(lambda: reserved(server) < 20 << 20)
                cancelled.append(asked)

        source.before = cancel
        peer.say(offer(1))
        until(lambda: bool(cancelled) and not reserved(server))
        source.before = lambda asked: None
        peer.say(offer(2))
        answer = peer.hear()
        assert isinstance(answer, answers.Offered)
        assert answer.request_id == 2


def test_an_offer_leases_only_the_pages_that_are_there() -> None:
    source = MemorySource(KEYS[:3], SIZE)
    with serving(source, transport=CopyTransport()) as (server, address), RawPeer(address) as peer:
        peer.say(offer(1))
        offered = peer.hear()
        assert isinstance(offered, answers.Offered)
        assert [page.status for page in offered.pages] == [PageStatus.OK] * 3 + [PageStatus.MISS]
        until(lambda: reserved(server) == 3 * 8192)
        peer.say(offer(2, KEYS[5:]))
        offered = peer.hear()
        assert isinstance(offered, answers.Offered)
        assert (offered.lease, len(offered.pages)) == (0, 1)
        until(lambda: reserved(server) == 3 * 8192)


def test_a_server_without_a_transport_makes_no_offers() -> None:
    with serving(MemorySource(KEYS, SIZE)) as (server, address), RawPeer(address) as peer:
        peer.say(offer(1))
        peer.say(read(2))
        assert len(peer.hear_all()) == 21
        assert server.counts["invalid_messages"] == 1
        assert server.transports == ("zmq",)
