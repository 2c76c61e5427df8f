"""The page server: limits, turns, reuse of memory, requests of followers."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from flexkv_sglang.backends.checksum import page_checksum
from flexkv_sglang.backends.fleet.members.peer_control import PeerControl
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.backends.fleet.server.queue import Reader, Request, ServeQueue
from flexkv_sglang.backends.fleet.server.server import PageServer
from flexkv_sglang.backends.fleet.slabs import StagingSlab
from flexkv_sglang.backends.fleet.vocabulary import PageSource, PageStatus, Snapshot, namespace_name
from flexkv_sglang.backends.fleet.wire import answers, protocol, requests
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError, PeerError
from flexkv_sglang.types import PageKey
from nodes.page_servers import EPOCH, NAME, NID, SPACE, FixedNode, begin, reading, serving, until
from nodes.page_sources import ListedChanges, MemorySource, PageMemory, keys_of
from nodes.raw_peer import RawPeer
from nodes.wire_fuzz import CHANGES

OK, BUSY, LATE = PageStatus.OK, PageStatus.BUSY, PageStatus.LATE


def small(total: int, per_reader: int) -> ShareConfig:
    """Settings with these limits in bytes."""
    return ShareConfig(listen="127.0.0.1:0", serve_inflight=total, serve_inflight_peer=per_reader)


def read(
    request_id: int, keys: list[PageKey], budget_ms: int = 10_000, flags: int = 1
) -> list[bytes]:
    return requests.pack_read(requests.Read(request_id, SPACE, budget_ms, flags, tuple(keys)))


class Valve:
    """Lets reads of a source through only when it is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def __call__(self, keys: Sequence[PageKey]) -> None:
        self.reached.set()
        assert self.open.wait(30)


def test_pages_beyond_a_readers_limit_are_busy_at_once() -> None:
    keys = keys_of(20)
    valve = Valve()
    source = MemorySource(keys, 4096, valve)
    share = small(64 << 10, 40 << 10)
    with (
        serving(source, share) as (server, address),
        RawPeer(address) as peer,
        RawPeer(address) as other,
    ):
        peer.say(read(1, keys[:8]))
        assert valve.reached.wait(10)
        peer.say(read(2, keys[8:16]))  # two of these fit
        peer.say(read(3, keys[16:]))
        busy = peer.hear()
        assert isinstance(busy, answers.PagesHeader)
        assert (busy.request_id, busy.index, busy.status) == (3, 0, BUSY)
        assert peer.hear() == answers.End(3, 1)
        other.say(read(4, keys[:10]))  # of all memory, six are left
        until(lambda: server._pages.reserved_bytes == 64 << 10)
        valve.open.set()
        heard = peer.hear_all()
        assert [page.status for page in heard[:-1]] == [OK] * 8
        assert [page.status for page in peer.hear_all()[:-1]] == [OK] * 2 + [BUSY]
        assert [page.status for page in other.hear_all()[:-1]] == [OK] * 6 + [BUSY]
        until(lambda: server._pages.reserved_bytes == 0)


def test_a_long_queue_is_busy() -> None:
    keys = keys_of(1)
    valve = Valve()
    with serving(MemorySource(keys, 4096, valve)) as (_, address), RawPeer(address) as peer:
        for request_id in range(1, 40):
            peer.say(read(request_id, keys))
        for request_id in range(33, 40):
            assert [page.status for page in peer.hear_all()[:-1]] == [BUSY], request_id
        valve.open.set()
        for request_id in range(1, 33):
            pages = peer.hear_all()
            assert [page.status for page in pages[:-1]] == [OK], request_id


def test_a_request_whose_budget_is_over_is_late() -> None:
    keys = keys_of(80)
    valve = Valve()
    with serving(MemorySource(keys, 4096, valve)) as (server, address), RawPeer(address) as peer:
        peer.say(read(1, keys[:1], 10_000))
        assert valve.reached.wait(10)
        peer.say(read(2, keys, 1))  # waits behind the first one
        until(lambda: server._pages.reserved_bytes == 81 * 4096)
        over = time.monotonic() + 0.002
        until(lambda: time.monotonic() > over)
        valve.open.set()
        assert [page.status for page in peer.hear_all()[:-1]] == [OK]
        assert [page.status for page in peer.hear_all()[:-1]] == [LATE]


def test_all_pages_are_answered_without_the_flag() -> None:
    keys = keys_of(6)
    source = MemorySource([keys[0], keys[3]], 4096)
    with serving(source) as (_, address), RawPeer(address) as peer:
        peer.say(read(1, keys, flags=0))
        statuses = [page.status for page in peer.hear_all()[:-1]]
        miss = PageStatus.MISS
        assert statuses == [OK, miss, miss, OK, miss, miss]


def test_a_cancelled_request_is_not_answered() -> None:
    keys = keys_of(2)
    valve = Valve()
    with serving(MemorySource(keys, 4096, valve)) as (server, address), RawPeer(address) as peer:
        peer.say(read(1, keys))
        assert valve.reached.wait(10)
        peer.say(requests.pack_cancel(1))
        peer.say(read(2, keys_of(1, seed=9)))
        until(lambda: server._pages.reserved_bytes == 3 * 4096)
        valve.open.set()
        assert [page.request_id for page in peer.hear_all()] == [2, 2]
        until(lambda: server._pages.reserved_bytes == 0)


def test_readers_take_turns() -> None:
    """The second reader's few pages do not wait for all of the first one's."""
    keys = keys_of(128)
    order: list[PageKey] = []
    valve = Valve()

    def before(asked: Sequence[PageKey]) -> None:
        valve(asked)
        order.extend(asked)

    with (
        serving(MemorySource(keys, 4096, before)) as (server, address),
        RawPeer(address) as greedy,
        RawPeer(address) as modest,
    ):
        greedy.say(read(1, keys[:127]))
        assert valve.reached.wait(10)
        modest.say(read(1, keys[127:]))
        until(lambda: server._pages.reserved_bytes == 128 * 4096)
        valve.open.set()
        assert len(modest.hear_all()) == 2
        assert len(greedy.hear_all()) == 128
    assert (
        order.index(keys[127]) <= 96
    )  # two turns were on their way, and it is in the middle of one


def test_slow_readers_never_get_another_pages_bytes() -> None:
    """Slabs for four pages, and readers that take their time: each byte is still the right one."""
    keys = keys_of(48)
    size = 512 << 10
    source = MemorySource(keys, size)
    with serving(source, small(4 * size, 4 * size)) as (_, address):
        peers = [RawPeer(address) for _ in range(3)]
        rng = random.Random(4)
        good = request_id = 0
        end = time.monotonic() + 30
        while good < 40 and time.monotonic() < end:  # BUSY is an answer, too
            request_id += 1
            for peer in peers:
                first = rng.randrange(40)
                peer.say(read(request_id, keys[first : first + 3], flags=0))
            for peer in rng.sample(peers, 3):
                good += _take_slowly(peer, keys, source)
        for peer in peers:
            peer.__exit__(None, None, None)
        assert good >= 40


def test_memory_is_not_reused_before_its_bytes_have_left() -> None:
    """A reader takes nothing from its socket; another asks for as much as there is meanwhile."""
    keys = keys_of(48)
    size = 1 << 20
    source = MemorySource(keys, size)
    with (
        serving(source, small(32 * size, 24 * size)) as (server, address),
        RawPeer(address, queue=1) as slow,
        RawPeer(address) as quick,
    ):
        slow.say(read(1, keys[:24]))
        until(lambda: server.counts["pages_sent"] == 24)
        for request_id in range(1, 4):
            quick.say(read(request_id, keys[24:]))
            _take_slowly(quick, keys, source)
        for key in keys[:24]:
            assert slow.sock.poll(10_000)
            assert slow.sock.recv_multipart()[1] == source.pages[key]


def _take_slowly(peer: RawPeer, keys: list[PageKey], source: MemorySource) -> int:
    """Read a whole answer; pages that came, each compared by its checksum under some key."""
    good = 0
    pages = set(source.pages.values())
    while peer.sock.poll(10_000):
        frames = peer.sock.recv_multipart()
        if len(frames) == 1 and frames[0][3] == protocol.Kind.END:
            return good
        if len(frames) == 2:
            header = answers.decode_answer(frames)
            assert isinstance(header, answers.PagesHeader)
            for place in range(len(header.checksums)):
                start = place * protocol.stride_of(header.length)
                assert frames[1][start : start + header.length] in pages
            good += len(header.checksums)
    raise AssertionError("no end")


def test_a_reader_that_goes_away_gives_its_memory_back() -> None:
    keys = keys_of(16)
    size = 1 << 20
    source = MemorySource(keys, size)
    with serving(source, small(16 * size, 16 * size)) as (server, address):
        for _ in range(3):
            peer = RawPeer(address)
            peer.say(read(1, keys))
            until(lambda: server._pages.reserved_bytes > 0)
            peer.__exit__(None, None, None)
            until(lambda: server._pages.reserved_bytes == 0)
        with reading() as client:
            memory = PageMemory(16, [size])
            assert begin(client, address, keys, memory).wait() == [PageOutcome.OK] * 16


def test_requests_before_a_greeting_are_refused() -> None:
    keys = keys_of(1)
    with serving(MemorySource(keys, 4096)) as (_, address), RawPeer(address, greet=False) as peer:
        for frames in (
            read(1, keys),
            requests.pack_snapshot_request(1, SPACE),
            requests.pack_proof(bytes(32)),
        ):
            peer.say(frames)
        assert peer.hear() == answers.Refused(answers.Refusal.NO_HELLO)
        assert peer.hear() == answers.Refused(answers.Refusal.NO_HELLO)
        peer.say(requests.pack_hello(requests.Hello(bytes(16), "default", 9)))
        assert peer.hear() == answers.Refused(answers.Refusal.PROTOCOL)
        peer.say(read(1, keys))
        assert peer.hear() == answers.Refused(answers.Refusal.NO_HELLO)


def test_a_failing_source_is_a_miss_and_the_server_lives() -> None:
    keys = keys_of(2)

    def fail(asked: Sequence[PageKey]) -> None:
        if keys[1] in asked:
            raise OSError(5, "a bug, or a disk")

    with serving(MemorySource(keys, 4096, fail)) as (_, address), RawPeer(address) as peer:
        peer.say(read(1, keys[1:]))
        assert [page.status for page in peer.hear_all()[:-1]] == [PageStatus.MISS]
        peer.say(read(2, keys[:1]))
        assert [page.status for page in peer.hear_all()[:-1]] == [OK]


class FaultyNode(FixedNode):
    """Its first call fails."""

    failed = False

    def pages_of(self, namespace: str) -> PageSource | None:
        if not self.failed:
            self.failed = True
            raise RuntimeError("a bug")
        return super().pages_of(namespace)


def test_a_failing_node_costs_one_message() -> None:
    """The server's loop calls the agent; a bug there must not end it."""
    keys = keys_of(1)
    source = MemorySource(keys, 4096)
    with serving(source) as (server, address), RawPeer(address) as peer:
        server._pages._node = FaultyNode({NAME: source})
        peer.say(read(1, keys))
        peer.say(read(2, keys))
        assert [answer.request_id for answer in peer.hear_all()] == [2, 2]
        assert server.counts["errors"] == 1


def test_checksums_are_those_of_the_source() -> None:
    """A new checksum would hide damage on the medium."""
    keys = keys_of(1)
    source = MemorySource(keys, 4096)
    source.damage.add(keys[0])
    with serving(source) as (_, address), RawPeer(address) as peer:
        peer.say(read(1, keys))
        assert peer.sock.poll(10_000)
        head, data = peer.sock.recv_multipart()
        checksum = int.from_bytes(head[-8:], "little")
        pages = answers.PagesHeader(1, 0, OK, source.kind, 4096, (checksum,))
        assert answers.pack_pages(pages) == head
        right = np.frombuffer(source.pages[keys[0]], np.uint8).copy()
        assert data != right.tobytes()
        expected = page_checksum(source.kind, keys[0], [(right.ctypes.data, 4096)])
        assert checksum == expected


def test_followers_get_snapshots_and_changes() -> None:
    fingerprints = np.unique(np.random.default_rng(3).integers(0, 1 << 63, 400_000, np.uint64))
    log = ListedChanges(CHANGES, Snapshot(EPOCH, 8, fingerprints))
    share = ShareConfig(listen="127.0.0.1:0")
    with serving(None, share, {NAME: log}) as (_, address):
        control = PeerControl(share, None)
        try:
            info = control.hello(address, 5)
            assert (info.node_id, info.epoch, info.namespaces) == (NID, EPOCH, (NAME,))
            snapshot = control.snapshot(address, NAME, 10)
            assert (snapshot.epoch, snapshot.last) == (EPOCH, 8)
            assert (snapshot.fingerprints == fingerprints).all()
            changes = control.poll(address, NAME, EPOCH, 5, 5)
            assert changes is not None
            assert [change.first for change in changes] == [6, 7]
            assert control.poll(address, NAME, EPOCH + 1, 5, 5) is None
            with pytest.raises(PeerError, match="UNKNOWN_NAMESPACE"):
                control.snapshot(address, namespace_name(bytes(16)), 5)
            assert control.poll(address, NAME, EPOCH, 8, 5) == []
        finally:
            control.close()


def test_requests_of_followers_end_in_time() -> None:
    control = PeerControl(ShareConfig(), None)
    with pytest.raises(PeerError):
        control.hello("127.0.0.1:1", 5)
    with pytest.raises(PeerError):
        control.snapshot("not an address", NAME, 0.2)
    control.close()
    with pytest.raises(PeerError):
        control.hello("127.0.0.1:1", 5)


def test_a_taken_port_is_taken_when_it_is_free() -> None:
    keys = keys_of(1)
    with serving(None) as (server, address):
        other = PageServer(
            ShareConfig(listen=address), None, FixedNode({NAME: MemorySource(keys, 4096)})
        )
        assert other.start() == ""
        assert other.listens_at == other.bind() == ""
        server.unbind()
        until(lambda: other.bind() == address)
        with RawPeer(address) as peer:
            peer.say(read(1, keys))
            assert [page.status for page in peer.hear_all()[:-1]] == [OK]
        assert other.close()


def test_an_address_that_is_not_ours_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"share\.listen"):
        PageServer(ShareConfig(listen="192.0.2.7:0", insecure=True), None, FixedNode()).start()


def test_a_server_moves_to_another_address() -> None:
    keys = keys_of(1)
    with serving(MemorySource(keys, 4096)) as (server, address):
        moved = server.bind("127.0.0.2")
        assert moved.startswith("127.0.0.2:")
        with RawPeer(moved) as late:
            late.say(read(1, keys))
            assert [page.status for page in late.hear_all()[:-1]] == [OK]
        assert moved != address


def test_a_round_that_raises_does_not_end_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = keys_of(1)

    def broken(*_: object) -> None:
        raise MemoryError

    with serving(MemorySource(keys, 4096)) as (server, address), RawPeer(address) as peer:
        with monkeypatch.context() as patched:
            patched.setattr(type(server._feeds), "advance", broken)
            until(lambda: server.counts["errors"] > 1)
        peer.say(read(1, keys))
        assert [page.status for page in peer.hear_all()[:-1]] == [OK]


def test_slabs_are_joined_again() -> None:
    slabs = StagingSlab(1 << 20)
    rng = random.Random(1)
    held: list[tuple[int, int]] = []
    for _ in range(3000):
        size = 4096 * rng.randrange(1, 30)
        offset = slabs.take(size)
        if offset is not None:
            assert all(offset + size <= o or o + s <= offset for o, s in held)
            held.append((offset, size))
        while held and (offset is None or rng.random() < 0.4):
            slabs.give(*held.pop(rng.randrange(len(held))))
            offset = 0
    for run in held:
        slabs.give(*run)
    assert slabs.take(1 << 20) == 0


def test_a_page_larger_than_a_readers_share_is_still_served() -> None:
    source = MemorySource([], 1 << 20)
    queue = ServeQueue(4 << 20, 64 << 10)
    keys = tuple(keys_of(3))
    request = Request(Reader(b"r"), requests.Read(1, SPACE, 1, 0, keys), source, 0.0)
    queue.accept(request)
    assert (request.accepted, queue.reserved) == (1, 1 << 20)


def test_another_port_is_taken_if_the_default_is_in_use(caplog: pytest.LogCaptureFixture) -> None:
    share = ShareConfig(peers=("127.0.0.1:1",))
    servers = [PageServer(share, None, FixedNode()) for _ in range(2)]
    try:
        addresses = {server.start() for server in servers}
    finally:
        for server in servers:
            server.close()
    assert len(addresses) == 2
    assert "is in use" in caplog.text
