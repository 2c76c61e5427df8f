"""Backfill: pages are copied before the caller's memory changes, in a bounded buffer, and no call waits for it."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence

import numpy as np
import pytest

from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing import backfill
from flexkv_sglang.sharing.backfill import Backfill
from flexkv_sglang.types import PageBuffers, PageKey

LENGTHS = np.array([5000, 3000], np.uint64)


class Store:
    """Take pages as ``Tiers`` does, once the gate ``open`` is open."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.taken: list[tuple[PageKey, bytes, PageKey | None]] = []
        self.done = threading.Semaphore(0)

    def put(
        self, keys: Sequence[PageKey], pages: PageBuffers, parent: PageKey | None, deadline: float
    ) -> list[bool]:
        self.open.wait(10)
        for key, addresses in zip(keys, pages.addresses.tolist(), strict=True):
            parts = zip(addresses, pages.lengths.tolist(), strict=True)
            self.taken.append((key, b"".join(ctypes.string_at(*part) for part in parts), parent))
        self.done.release()
        return [True] * len(keys)


def pages(count: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], PageBuffers]:
    memory = np.frombuffer(bytearray(os.urandom(8000 * count)), np.uint8)
    base = memory.ctypes.data + np.arange(count, dtype=np.uint64)[:, None] * np.uint64(8000)
    return memory, PageBuffers(base + np.array([0, 5000], np.uint64), LENGTHS)


def key(number: int) -> PageKey:
    return PageKey(number.to_bytes(32, "little"))


def test_the_bytes_of_the_call_are_stored() -> None:
    store, metrics = Store(), Metrics()
    keeper = Backfill(8000, store.put, metrics)
    memory, buffers = pages(3)
    expected = [memory[i * 8000 : (i + 1) * 8000].tobytes() for i in range(3)]
    keeper.add([key(1), key(2), key(3)], key(0), buffers)
    memory[:] = 0  # SGLang has its pages back
    store.open.set()
    assert store.done.acquire(timeout=10)
    keeper.close()
    assert store.taken == [(key(i + 1), expected[i], key(0)) for i in range(3)]
    assert metrics.snapshot()["remote_kept_pages"] == 3


def test_pages_without_room_are_dropped_and_room_comes_back() -> None:
    store, metrics = Store(), Metrics()
    keeper = Backfill(8000, store.put, metrics)
    keeper._free = keeper._free[:4]  # a buffer of four pages
    memory, buffers = pages(6)
    keeper.add([key(i) for i in range(6)], None, buffers)
    assert metrics.snapshot()["remote_unkept_pages"] == 2
    keeper.add([key(9)], None, buffers.take([0]))
    assert metrics.snapshot()["remote_unkept_pages"] == 3
    store.open.set()
    assert store.done.acquire(timeout=10)
    for attempt in range(1000):  # rows are given back right after the put
        keeper.add([key(10 + attempt)], None, buffers.take([5]))
        if store.done.acquire(timeout=0.01):
            break
    keeper.close()
    assert store.taken[-1][1] == memory[5 * 8000 :].tobytes()


def test_closing_waits_for_the_put_that_runs_and_drops_the_rest() -> None:
    store = Store()
    keeper = Backfill(8000, store.put, Metrics())
    _, buffers = pages(1)
    for number in range(3):
        keeper.add([key(number)], None, buffers)
    closer = threading.Thread(target=keeper.close)
    closer.start()
    store.open.set()
    closer.join(10)
    assert not closer.is_alive()
    assert len(store.taken) <= 2
    keeper.close()


def test_a_store_that_fails_does_not_end_the_thread() -> None:
    calls = threading.Semaphore(0)

    def put(*_: object) -> list[bool]:
        calls.release()
        raise OSError("a broken world")

    metrics = Metrics()
    keeper = Backfill(8000, put, metrics)
    _, buffers = pages(1)
    for number in range(2):
        keeper.add([key(number)], None, buffers)
        assert calls.acquire(timeout=10)
    keeper.close()
    assert metrics.snapshot()["upkeep_exceptions"] == 2


def test_a_call_needs_no_memory_and_no_thread_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first ``add`` is within a get: it must not wait for them, nor fail for lack of them."""
    store = Store()
    keeper = Backfill(8000, store.put, Metrics())

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(backfill, "AlignedMemory", refuse)
    keeper.add([key(1)], None, pages(1)[1])
    store.open.set()
    assert store.done.acquire(timeout=10)
    keeper.close()
