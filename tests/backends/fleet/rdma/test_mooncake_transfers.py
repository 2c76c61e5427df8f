"""``MooncakeTransport`` with a stand-in for Mooncake (``tests/support/nodes/played_mooncake.py``)."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from flexkv_sglang.backends.fleet.rdma import mooncake as mooncake_transport
from flexkv_sglang.backends.fleet.rdma.mooncake import MooncakeTransport
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.backends.fleet.transport import Move, RdmaError, TransferState
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from nodes.page_servers import begin, reading, serving, until
from nodes.page_sources import MemorySource, PageMemory, keys_of
from nodes.played_mooncake import COMPLETED, FAILED, TIMEOUT, TransferEngine

RUNNING, DONE, LOST = TransferState.RUNNING, TransferState.DONE, TransferState.FAILED
SOURCE, TARGET = ctypes.create_string_buffer(b"x" * 100, 100), ctypes.create_string_buffer(100)
THERE, STRANGER = b"10.0.0.5:15000", b"10.0.0.6:15000"


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[TransferEngine]]:
    """Mooncake, which starts well and whose batches wait for the test."""
    monkeypatch.setattr(mooncake_transport, "MODULE", "nodes.played_mooncake")
    yield TransferEngine
    for played_engine in TransferEngine.made:
        played_engine.hold.set()
    TransferEngine.made.clear()
    TransferEngine.at_once, TransferEngine.status = False, 0


@pytest.fixture
def transport(played: type[TransferEngine]) -> Iterator[MooncakeTransport]:
    """Ours."""
    transport = MooncakeTransport("127.0.0.1")
    yield transport
    for mooncake in played.made:
        mooncake.hold.set()
    transport.close()


def mooncake() -> TransferEngine:
    """The only one."""
    (only,) = TransferEngine.made
    return only


def pages(count: int) -> list[Move]:
    """``count`` equal moves of 100 bytes."""
    return [Move(ctypes.addressof(SOURCE), ctypes.addressof(TARGET), 100)] * count


def started(count: int) -> list[int]:
    """The numbers of ``count`` batches, once they exist."""
    until(lambda: len(mooncake().batches) == count)
    return list(mooncake().batches)


def test_a_transfer_is_done_when_all_its_pages_are(transport: MooncakeTransport) -> None:
    ctypes.memset(TARGET, 0, 100)
    transfer = transport.read(THERE, pages(3))
    for number in reversed(started(3)):
        assert transfer.poll() is RUNNING
        mooncake().finish(number)
    assert [transfer.poll(), transfer.poll()] == [DONE, DONE]
    assert TARGET.raw == SOURCE.raw
    assert mooncake().asked == [THERE.decode()] * 3


def test_a_transfer_with_a_failed_page_runs_until_the_others_have_ended(
    transport: MooncakeTransport,
) -> None:
    transfer = transport.read(THERE, pages(3))
    first, second, third = started(3)
    mooncake().finish(first, FAILED)
    mooncake().finish(third)
    assert transfer.poll() is RUNNING  # the second may still be written
    mooncake().finish(second, TIMEOUT)
    assert transfer.poll() is RUNNING  # so says Mooncake's clock, and not that it has stopped
    mooncake().finish(second)
    assert [transfer.poll(), transfer.poll()] == [LOST, LOST]


def test_a_transfer_runs_while_its_pages_are_being_given_to_mooncake(
    transport: MooncakeTransport,
) -> None:
    mooncake().hold.clear()
    transfer = transport.read(THERE, pages(1))
    assert mooncake().entered.wait(10)
    assert transfer.poll() is RUNNING
    mooncake().hold.set()
    mooncake().finish(*started(1))
    until(lambda: transfer.poll() is DONE)


@pytest.mark.parametrize("refusal", [0, (1 << 64) - 1])
def test_a_refused_page_fails_the_transfer_once_the_pages_before_it_have_ended(
    transport: MooncakeTransport, refusal: int
) -> None:
    mooncake().answers = [1, refusal]
    transfer = transport.read(THERE, pages(3))
    until(lambda: len(mooncake().asked) == 2)
    assert transfer.poll() is RUNNING
    mooncake().finish(*started(1))
    until(lambda: transfer.poll() is LOST)
    assert len(mooncake().asked) == 2


def test_an_error_at_any_page_fails_the_transfer(
    transport: MooncakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    give = mooncake().batch_transfer_async_read

    def give_one(*arguments: Any) -> int:
        if mooncake().asked:
            raise RuntimeError("from C++")
        return give(*arguments)

    monkeypatch.setattr(mooncake(), "batch_transfer_async_read", give_one)
    transfer = transport.read(THERE, pages(2))
    mooncake().finish(*started(1))
    until(lambda: transfer.poll() is not RUNNING)
    assert transfer.poll() is LOST


def test_a_hanging_call_delays_no_read_from_another_node(
    transport: MooncakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_transport, "STUCK_S", 0.0)
    mooncake().hold.clear()
    began = time.monotonic()
    stuck = transport.read(THERE, pages(1))
    assert mooncake().entered.wait(10)
    with pytest.raises(RdmaError, match="stuck"):
        transport.read(STRANGER, pages(1))
    assert time.monotonic() - began < 10  # none of our calls has waited
    mooncake().hold.set()
    mooncake().finish(*started(1))
    until(lambda: stuck.poll() is DONE)
    transport.read(STRANGER, pages(1))
    mooncake().finish(*started(1), COMPLETED)


def test_a_transfer_that_waited_too_long_is_not_started(
    transport: MooncakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_transport, "_WAITED_MAX_S", -1.0)
    transfer = transport.read(THERE, pages(2))
    until(lambda: transfer.poll() is LOST)
    assert not mooncake().asked


def test_the_transport_closes_when_nothing_runs(transport: MooncakeTransport) -> None:
    transport.register(4096, 100)
    transfer = transport.read(THERE, pages(1))
    batches = started(1)
    assert not transport.close()
    assert mooncake().memory == {4096: 100}
    mooncake().finish(*batches)
    assert transport.close()
    assert transfer.poll() is DONE
    assert not mooncake().memory
    assert transport.close()


def test_close_does_not_wait_for_a_hanging_call(
    transport: MooncakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mooncake_transport, "_CLOSE_TIMEOUT_S", 0.05)
    mooncake().hold.clear()
    transport.read(THERE, pages(1))
    assert mooncake().entered.wait(10)
    assert not transport.close()
    mooncake().hold.set()
    mooncake().finish(*started(1))
    until(transport.close)
    assert "flexkv-mooncake" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("blob", [b"", b"10.0.0.5", b"a b:1", b"\xff:1", b"h:123456", b"::1:15000"])
def test_a_peer_cannot_make_mooncake_parse_anything(
    transport: MooncakeTransport, blob: bytes
) -> None:
    with pytest.raises(RdmaError, match="cannot read from"):
        transport.read(blob, pages(1))
    assert not mooncake().asked


def test_memory_is_registered_or_an_error(transport: MooncakeTransport) -> None:
    assert transport.blob() == b"127.0.0.1:15000"
    mooncake().memory[4096] = 100
    with pytest.raises(RdmaError, match=r"register 100 bytes: -7"):
        transport.register(4096, 100)


def test_mooncake_that_does_not_start_is_a_config_error(played: type[TransferEngine]) -> None:
    played.status = -1
    with pytest.raises(ConfigError, match=r"share.engine: 'mooncake'.*-1.*'zmq'"):
        MooncakeTransport("127.0.0.1")
    with pytest.raises(ConfigError, match=r"share.engine: 'mooncake'.*'::1'.*IPv4.*'zmq'"):
        MooncakeTransport("::1")


def test_missing_mooncake_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake_transport, "MODULE", "flexkv_no_such_module")
    with pytest.raises(ConfigError) as raised, serving(None, ShareConfig(engine="mooncake")):
        pass
    for words in ("share.engine: 'mooncake'", "pip install", "libibverbs1", "'zmq'"):
        assert words in str(raised.value)


def test_pages_come_through_the_transport_that_the_configuration_names(
    played: type[TransferEngine],
) -> None:
    played.at_once = True
    keys, share = keys_of(20), ShareConfig(listen="127.0.0.1:0", engine="mooncake")
    source, memory = MemorySource(keys, 8000), PageMemory(20, [8000])
    with ExitStack() as both:
        server, address = both.enter_context(serving(source, share))
        client = both.enter_context(reading(share))
        assert begin(client, address, keys, memory).wait() == [PageOutcome.OK] * 20
        assert all(memory.page(i) == source.pages[key] for i, key in enumerate(keys))
        assert (server.counts["pages_offered"], server.counts["pages_sent"]) == (20, 0)
        assert [mooncake.host for mooncake in played.made] == ["127.0.0.1"] * 2
    assert not any(mooncake.memory for mooncake in played.made)
