"""Engines, page memory and keys for tests below the adapter: real files, real I/O, no SGLang."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.io.direction import MakeEngine
from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.probe import IoMode, make_engine
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.opening import open_tier
from flexkv_sglang.backends.slots.space.places import open_places, prepare_directory
from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.cache.engine import CacheEngine
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig, TierConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.testing.pages import Bytes as Bytes
from flexkv_sglang.testing.pages import keys as keys
from flexkv_sglang.testing.pages import page_memory as page_memory
from flexkv_sglang.testing.pages import soon as soon


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
    mover = PageMover(payload_bytes, metrics, make, modes=[mode])
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


def wait_until(condition: object, seconds: float = 10.0) -> bool:
    """Poll ``condition()`` until it is true or time is up."""
    assert callable(condition)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.005)
    return bool(condition())
