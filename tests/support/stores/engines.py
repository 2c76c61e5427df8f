"""Engines, page memory and keys for tests below the adapter: real files, real I/O, no SGLang."""

from __future__ import annotations

import hashlib
import mmap
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.io.direction import MakeEngine
from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.probe import IoMode, make_engine
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.opening import open_places, open_tier, prepare_directory
from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig, TierConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.types import PageBuffers, PageKey

Bytes = npt.NDArray[np.uint8]


def open_engine(
    directory: Path,
    payload_bytes: int,
    size: int,
    *,
    io_engine: str = "auto",
    verify: str = "full",
    namespace: str = "ns",
    mode: IoMode | None = None,
    make: MakeEngine = make_engine,
    durable: bool = False,
) -> CacheEngine:
    """An engine as the adapter would assemble it, on one directory; with ``mode`` it is not probed."""
    mode = mode or prepare_directory(str(directory), io_engine)
    places = open_places({str(directory): mode}, namespace, {}, durable=durable)
    tier, recovered = open_tier(
        places, namespace, payload_bytes, size, accepted=ACCEPTED_KINDS[verify]
    )
    neighbours = NeighbourStore(
        [(place.directory, place.mode) for place in places],
        namespace,
        payload_bytes,
        [store.lock.owner for store in tier.stores],
        ACCEPTED_KINDS[verify],
    )
    metrics = Metrics()
    mover = PageMover(payload_bytes, metrics, make)
    return CacheEngine(tier, recovered, neighbours, mover, metrics, verify)


def open_hierarchy_on(tiers: Sequence[tuple[Path, int]], payload_bytes: int) -> Tiers:
    """Tiers as the adapter would assemble them: (directory, bytes), the fastest first."""
    config = FlexKVConfig(
        tiers=tuple(TierConfig((str(directory),), size) for directory, size in tiers)
    )
    prepared = prepare_tiers(config)
    return open_tiers(
        config,
        prepared,
        "ns",
        {},
        payload_bytes,
        [Quota(tier.size) for tier in config.tiers],
        Metrics(),
    )


def page_memory(
    count: int, payload_bytes: int, buffers: int = 1, *, shift: int = 0, seed: int | None = None
) -> tuple[Bytes, PageBuffers]:
    """``count`` pages in page-aligned memory (moved by ``shift`` bytes), each in ``buffers`` equal parts.

    Random bytes if ``seed`` is given, else 0xA5 poison. Returns uint8 ``[count, payload_bytes]`` and its
    addresses; the array keeps the memory alive.
    """
    memory = mmap.mmap(-1, count * payload_bytes + shift + 1)
    flat = np.frombuffer(memory, np.uint8)[shift : shift + count * payload_bytes]
    pages = flat.reshape(count, payload_bytes)
    if seed is None:
        pages[:] = 0xA5
    else:
        pages[:] = np.random.default_rng(seed).integers(0, 256, pages.shape, dtype=np.uint8)
    assert payload_bytes % buffers == 0
    part = payload_bytes // buffers
    starts = np.arange(count, dtype=np.uint64)[:, None] * np.uint64(payload_bytes)
    steps = np.arange(buffers, dtype=np.uint64)[None, :] * np.uint64(part)
    addresses = np.uint64(flat.ctypes.data) + starts + steps
    return pages, PageBuffers(addresses, np.full(buffers, part, np.uint64))


def keys(count: int, seed: int = 0) -> list[PageKey]:
    """``count`` page keys."""
    return [PageKey(hashlib.sha256(f"{seed}:{i}".encode()).digest()) for i in range(count)]


def soon(seconds: float = 20.0) -> float:
    """A deadline no healthy call meets."""
    return time.monotonic() + seconds


def wait_until(condition: object, seconds: float = 10.0) -> bool:
    """Poll ``condition()`` until it is true or time is up."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return bool(condition())
