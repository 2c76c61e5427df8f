"""Reads of pages at another node: what is delivered, what is refused, and that every failure ends in time."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zmq

from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.backends.fleet.reader.channel import PeerChannel
from flexkv_sglang.backends.fleet.reader.health import PeerHealth
from flexkv_sglang.backends.fleet.reader.read import PageOutcome, Pending, RemoteRead
from flexkv_sglang.backends.fleet.vocabulary import NodeId, PageStatus
from flexkv_sglang.backends.fleet.wire import answers
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.types import PageKey
from nodes.delay_proxy import DelayProxy
from nodes.page_servers import (
    EPOCH,
    FULL,
    NID,
    SPACE,
    ServerProcess,
    begin,
    reading,
    serving,
    until,
)
from nodes.page_sources import MemorySource, PageMemory, keys_of

OK, MISS, BUSY, LATE = PageOutcome.OK, PageOutcome.MISS, PageOutcome.BUSY, PageOutcome.LATE
CORRUPT, FAILED, SKIPPED = PageOutcome.CORRUPT, PageOutcome.FAILED, PageOutcome.SKIPPED


@pytest.mark.parametrize("lengths", [[8192], [4096, 4096], [100] * 7, [200_000, 300_000]])
def test_pages_land_in_their_buffers(lengths: list[int]) -> None:
    keys = keys_of(128)
    source = MemorySource(keys, sum(lengths))
    memory = PageMemory(128, lengths)
    with serving(source) as (_, address), reading() as client:
        assert begin(client, address, keys, memory).wait() == [OK] * 128
        assert all(memory.page(i) == source.pages[key] for i, key in enumerate(keys))
        until(lambda: client.seconds_for(NID, 1 << 20) > 0)  # with the end, behind the last page


def test_a_large_batch_goes_in_several_requests() -> None:
    keys = keys_of(40)
    source = MemorySource(keys, 1 << 20)
    memory = PageMemory(40, [1 << 20])
    with serving(source) as (_, address), reading() as client:
        assert begin(client, address, keys, memory).wait() == [OK] * 40
        assert all(memory.page(i) == source.pages[key] for i, key in enumerate(keys))


def test_no_keys_are_no_read() -> None:
    with reading() as client:
        assert begin(client, "127.0.0.1:1", [], PageMemory(0, [4096])).wait() == []


def test_the_first_missing_page_ends_the_read() -> None:
    keys = keys_of(20)
    source = MemorySource(keys[:7] + keys[8:], 4096)
    memory = PageMemory(20, [4096])
    with serving(source) as (_, address), reading() as client:
        outcomes = begin(client, address, keys, memory).wait()
        assert outcomes == [OK] * 7 + [MISS] + [SKIPPED] * 12
        assert all(memory.untouched(i) for i in range(7, 20))
        assert client.usable(NID, EPOCH, address)  # a miss is no fault


def test_a_page_evicted_during_the_read_cuts_the_prefix() -> None:
    keys = keys_of(128)
    source = MemorySource(keys, 256 << 10)

    def evict(asked: Sequence[PageKey]) -> None:
        if keys[50] in asked:
            source.pages.pop(keys[50], None)

    source.before = evict
    memory = PageMemory(128, [256 << 10])
    with serving(source) as (_, address), reading() as client:
        outcomes = begin(client, address, keys, memory).wait()
        assert outcomes[:51] == [OK] * 50 + [MISS]
        assert all(memory.page(i) == source.pages[keys[i]] for i in range(50))


def test_pages_that_are_not_a_multiple_of_4096_arrive() -> None:
    keys = keys_of(100)
    source = MemorySource(keys, 5000)
    memory = PageMemory(100, [3000, 2000])
    with serving(source) as (_, address), reading() as client:
        assert begin(client, address, keys, memory).wait() == [OK] * 100
    assert all(memory.page(i) == source.pages[key] for i, key in enumerate(keys))


def test_a_corrupt_page_is_never_delivered_and_reported() -> None:
    keys = keys_of(10)
    source = MemorySource(keys, 8192)
    source.damage.add(keys[4])
    memory = PageMemory(10, [4096, 4096])
    with serving(source) as (_, address), reading() as client:
        outcomes = begin(client, address, keys, memory).wait()
        assert outcomes[:5] == [OK] * 4 + [CORRUPT]
        assert all(memory.untouched(i) for i in range(4, 10))
        assert source.bad_reported.wait(10)
        assert source.bad == [keys[4]]
        assert client.usable(NID, EPOCH, address)
        for _ in range(2):
            begin(client, address, keys[4:5], PageMemory(1, [8192])).wait()
        until(lambda: not client.usable(NID, EPOCH, address))  # three within a minute


def test_a_weaker_checksum_than_wanted_is_a_miss() -> None:
    keys = keys_of(2)
    sampled = ChecksumKind.XXH3_64_SAMPLED
    source = MemorySource(keys, 8192, kind=sampled)
    memory = PageMemory(2, [8192])
    with serving(source) as (_, address), reading() as client:
        assert begin(client, address, keys, memory).wait() == [MISS, SKIPPED]
        assert memory.untouched(0)
        both = frozenset({sampled, ChecksumKind.XXH3_64})
        assert begin(client, address, keys, memory, accepted=both).wait() == [OK, OK]


def test_pages_of_another_size_are_not_taken() -> None:
    keys = keys_of(2)
    memory = PageMemory(2, [4096])
    with serving(MemorySource(keys, 8192)) as (_, address), reading() as client:
        assert begin(client, address, keys, memory).wait() == [FAILED, SKIPPED]
        assert memory.untouched(0)
        assert memory.untouched(1)


def test_an_unknown_namespace_is_a_miss() -> None:
    with serving(None) as (_, address), reading() as client:
        assert begin(client, address, keys_of(2), PageMemory(2, [4096])).wait() == [MISS, SKIPPED]


def test_sixteen_readers_at_once() -> None:
    keys = keys_of(64)
    source = MemorySource(keys, 16 << 10)
    wrong: list[object] = []

    def read(address: str) -> None:
        memory = PageMemory(64, [8 << 10, 8 << 10])
        with reading() as client:
            outcomes = begin(client, address, keys, memory, 30).wait()
            good = all(memory.page(i) == source.pages[key] for i, key in enumerate(keys))
            if outcomes != [OK] * 64 or not good:
                wrong.append(outcomes)

    with serving(source) as (_, address):
        threads = [threading.Thread(target=read, args=(address,)) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert wrong == []


def test_two_reads_of_one_client_share_a_peer() -> None:
    keys = keys_of(64)
    source = MemorySource(keys, 128 << 10)
    with serving(source) as (_, address), reading() as client:
        memories = [PageMemory(64, [128 << 10]) for _ in range(3)]
        reads = [begin(client, address, keys, memory) for memory in memories]
        assert [read.wait() for read in reads] == [[OK] * 64] * 3
        for memory in memories:
            assert all(memory.page(i) == source.pages[key] for i, key in enumerate(keys))


def test_an_absent_server_fails_at_once() -> None:
    with reading() as client:
        begun = time.monotonic()
        outcomes = begin(client, "127.0.0.1:1", keys_of(3), PageMemory(3, [4096]), 60).wait()
        assert outcomes == [FAILED, SKIPPED, SKIPPED]
        assert time.monotonic() - begun < 30  # not the deadline
        assert not client.usable(NID, EPOCH, "127.0.0.1:1")
        assert client.usable(NID, EPOCH + 1, "127.0.0.1:1")  # a new start
        assert client.is_open(NID)


def test_a_server_killed_while_it_answers_fails_at_once() -> None:
    keys = keys_of(16)
    with (
        ServerProcess(16, 1 << 20) as server,
        DelayProxy(server.address, rate=8e6) as proxy,
        reading() as client,
    ):
        pending = begin(client, proxy.address, keys, PageMemory(16, [1 << 20]), 60)
        until(lambda: proxy.passed > 2 << 20)
        server.kill()
        outcomes = pending.wait()
        assert FAILED in outcomes
        assert time.monotonic() < pending.read.deadline - 20
        assert not client.usable(NID, EPOCH, proxy.address)


@contextmanager
def no_descriptors() -> Iterator[None]:
    """This process can open nothing more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd")) + 1
    held = [os.dup(0) for _ in range(highest - len(os.listdir("/proc/self/fd")))]  # the gaps
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest, hard))
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)


@pytest.mark.parametrize("started", [False, True])
def test_out_of_descriptors_costs_the_reads_of_that_time_only(started: bool) -> None:
    keys, memory = keys_of(4), PageMemory(4, [4096])
    with ServerProcess(4, 4096) as server, ServerProcess(4, 4096) as other, reading() as client:
        where = NodeId("node-2"), EPOCH, server.address, SPACE  # whose links are not open yet
        read = RemoteRead(*where, keys, memory.buffers, FULL, 0.0)
        if started:
            assert begin(client, other.address, keys, PageMemory(4, [4096])).wait() == [OK] * 4
        with no_descriptors():
            for _ in range(3):
                pending = client.begin(replace(read, deadline=time.monotonic() + 30))
                assert pending.wait()[0] is FAILED
                assert time.monotonic() < pending.read.deadline - 20
        assert client.usable(NID, EPOCH, other.address)
        again = replace(
            read, deadline=time.monotonic() + 30, epoch=EPOCH + 1
        )  # not after a pause of 2 s
        assert client.begin(again).wait() == [OK] * 4


def test_a_round_that_raises_fails_its_reads_and_the_next_ones_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keys = keys_of(4)

    def broken(*_: object) -> None:
        raise MemoryError

    with ServerProcess(4, 4096) as server, reading() as client:
        assert begin(client, server.address, keys, PageMemory(4, [4096])).wait() == [OK] * 4
        with monkeypatch.context() as patched:
            patched.setattr(PeerChannel, "receive", broken)
            pending = begin(client, server.address, keys, PageMemory(4, [4096]), 30)
            assert pending.wait()[0] is FAILED
            assert time.monotonic() < pending.read.deadline - 20
        assert begin(client, server.address, keys, PageMemory(4, [4096])).wait() == [OK] * 4


def test_the_first_read_imports_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from flexkv_sglang.backends.fleet.reader.client import PeerClient\n"
        "from flexkv_sglang.config.share import ShareConfig\n"
        "PeerClient(ShareConfig(), lambda name, amount: None); assert 'zmq' in sys.modules"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


def test_a_stopped_server_costs_one_deadline_and_comes_back() -> None:
    keys = keys_of(4)
    with ServerProcess(4, 4096) as server, reading() as client:
        assert begin(client, server.address, keys, PageMemory(4, [4096])).wait() == [OK] * 4
        server.stop()
        pending = begin(client, server.address, keys, PageMemory(4, [4096]), 0.3)
        assert pending.wait() == [LATE] * 4
        until(lambda: not client.usable(NID, EPOCH, server.address))
        outcomes = begin(client, server.address, keys, PageMemory(4, [4096]), 30).wait()
        assert outcomes[0] is FAILED  # from memory, not after 30 s
        server.go_on()
        until(lambda: client.usable(NID, EPOCH, server.address), 20)  # without a read in between
        assert begin(client, server.address, keys, PageMemory(4, [4096])).wait() == [OK] * 4


def test_nothing_is_written_after_the_read_has_returned() -> None:
    keys = keys_of(64)
    source = MemorySource(keys, 256 << 10)
    memory = PageMemory(64, [256 << 10])
    with (
        serving(source) as (_, address),
        DelayProxy(address, rate=20e6) as proxy,
        reading() as client,
    ):
        pending = begin(client, proxy.address, keys, memory, 1.0)
        until(lambda: proxy.passed > 1 << 20)
        proxy.cut()
        outcomes = pending.wait()
        assert LATE in outcomes
        got = outcomes.count(OK)
        assert outcomes == [OK] * got + [LATE] * (64 - got)
        before = memory.bytes.copy()
        passed = proxy.passed
        proxy.rate = 0.0
        proxy.heal()
        until(lambda: client.usable(NID, EPOCH, proxy.address), 20)
        other = PageMemory(64, [256 << 10])
        assert begin(client, proxy.address, keys, other).wait() == [OK] * 64
        assert proxy.passed - passed >= 64 * (256 << 10)
        assert (memory.bytes == before).all()
        assert all(memory.untouched(i) for i in range(got, 64))


def test_late_answers_of_a_slow_peer_write_nothing() -> None:
    """It answers all the time, so it is slow and not silent: no breaker, and nothing written late."""
    keys = keys_of(64)
    source = MemorySource(keys, 64 << 10)
    memory = PageMemory(64, [64 << 10])
    with (
        serving(source) as (_, address),
        DelayProxy(address, rate=3e6) as proxy,
        reading() as client,
    ):
        outcomes = begin(client, proxy.address, keys, memory, 1.0).wait()
        got = outcomes.count(OK)
        assert 0 < got < 64
        before = memory.bytes.copy()
        assert client.usable(NID, EPOCH, proxy.address)
        until(lambda: client.seconds_for(NID, 64 << 16) > 1.0)
        fewer = begin(client, proxy.address, keys, PageMemory(64, [64 << 10]), 1.0)
        assert fewer.wait()[-1] is SKIPPED  # only what fits was asked for
        assert (memory.bytes == before).all()


def test_a_page_that_comes_after_wait_is_not_written() -> None:
    keys = keys_of(1)
    page = bytes(4096)
    memory = PageMemory(1, [4096])
    full = ChecksumKind.XXH3_64
    held = np.frombuffer(page, np.uint8)
    checksum = page_checksum(full, keys[0], [(held.ctypes.data, 4096)])
    given_up: list[Pending] = []
    read = RemoteRead(NID, 1, "a:1", bytes(16), keys, memory.buffers, frozenset({full}), 0.0)
    pending = Pending(read, given_up.append)
    assert pending.wait() == [LATE]
    assert given_up == [pending]
    answer = answers.PagesHeader(1, 0, PageStatus.OK, full, 4096, (checksum,))
    assert pending.deliver(0, answer, zmq.Frame(page)) == (0, None)
    assert memory.untouched(0)


def test_closing_ends_reads() -> None:
    with ServerProcess(4, 4096) as server:
        server.stop()
        with reading() as client:
            pending = begin(client, server.address, keys_of(4), PageMemory(4, [4096]), 60)
            client.close()
            assert pending.wait() == [FAILED] + [SKIPPED] * 3
            again = begin(client, server.address, keys_of(4), PageMemory(4, [4096]), 60)
            assert again.wait() == [FAILED] + [SKIPPED] * 3


def test_a_node_of_another_cluster_is_not_asked_for_a_minute() -> None:
    with (
        serving(MemorySource(keys_of(1), 4096)) as (_, address),
        reading(ShareConfig(cluster_id="other")) as client,
    ):
        assert begin(client, address, keys_of(1), PageMemory(1, [4096])).wait() == [FAILED]
        assert "CLUSTER" in client.is_open(NID)


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_pauses_of_the_breaker_double_and_end() -> None:
    clock = Clock()
    health = PeerHealth(NID, 1, "a:1", clock)
    pauses = []
    for _ in range(7):
        health.failed("gone")
        begun = clock.now
        while not health.probe_due():
            clock.now += 0.01
            health.usable()
        pauses.append(clock.now - begun)
    for pause, base in zip(pauses, [2, 4, 8, 16, 30, 30, 30], strict=True):
        assert 0.79 * base <= pause <= 1.21 * base
    assert not health.usable()
    health.recovered()
    assert health.usable()
    health.busy()
    assert not health.usable()
    assert not health.is_open
    clock.now += 0.21
    assert health.usable()
    health.failed("gone")
    assert health.set_identity(2, "a:1")
    assert health.usable()


def test_rates_are_forgotten() -> None:
    clock = Clock()
    health = PeerHealth(NID, 1, "a:1", clock)
    assert health.seconds_for(100) == 0.0
    health.measured(1_000_000, 1.0, 0.25)
    assert health.seconds_for(2_000_000) == pytest.approx(2.25)
    assert health.bytes_within(1.25) == pytest.approx(1_000_000)
    clock.now += 31
    assert health.seconds_for(2_000_000) == 0.0
    assert health.bytes_within(0.001) == float("inf")
