"""Counters, histograms and gauges of one storage instance; ``catalog.CATALOG`` has their names.

Any thread may count at any time. The lock is held for an addition only: a histogram finds its bucket before, and a
gauge that is a function is called after.
"""

from __future__ import annotations

import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from flexkv_sglang.metrics.catalog import CATALOG, SECONDS, Kind

_TRANSFERS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Histogram:
    """``counts[i]``: values in ``(bounds[i - 1], bounds[i]]``; the last count is of those above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float


class Metrics:
    """Counts by name, and the transfers since the last drain. Asserts that a name is in the catalog.

    ``process``: random id of these counters. ``export``: publishes them elsewhere; called every few seconds by each
    tier's upkeep thread, set once before the engine starts.
    """

    def __init__(self) -> None:
        self.process = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()  # guarded by _lock, like all below
        self._histograms = {
            metric.name: ([0] * (len(metric.buckets) + 1), [0.0])
            for metric in CATALOG.values()
            if metric.kind == "histogram"
        }
        self._gauges: dict[tuple[str, str], float | Callable[[], float]] = {}
        self._reads: list[tuple[int, float]] = []
        self._writes: list[tuple[int, float]] = []
        self.export: Callable[[], None] | None = None

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        _expect(name, "counter")
        if amount:
            with self._lock:
                self._counters[name] += amount

    def observe(self, name: str, value: float) -> None:
        """Add one value to a histogram."""
        self.observe_all(name, (value,))

    def observe_all(self, name: str, values: Sequence[float]) -> None:
        """Add values to a histogram."""
        bounds = CATALOG[_expect(name, "histogram")].buckets
        places = [bisect_left(bounds, value) for value in values]
        total = sum(values)
        with self._lock:
            counts, sums = self._histograms[name]
            for place in places:
                counts[place] += 1
            sums[0] += total

    def gauge(self, name: str, value: float | Callable[[], float], key: str = "") -> None:
        """Set a gauge to a value, or to a function that returns it (any thread, microseconds, never raises).

        ``key``: value of the metric's own label, such as the directory of a breaker.
        """
        assert bool(key) == bool(CATALOG[_expect(name, "gauge")].key), (name, key)
        with self._lock:
            self._gauges[name, key] = value

    def running(self, name: str, change: int) -> None:
        """Add to a gauge that counts calls."""
        _expect(name, "gauge")
        with self._lock:
            value = self._gauges.get((name, ""), 0)
            assert not callable(value), name
            self._gauges[name, ""] = value + change

    def asked(self, pages: int, found: int, seconds: float) -> None:
        """Record one call of exists, under one hold of the lock: such calls are short and frequent."""
        place = bisect_left(SECONDS, seconds)
        with self._lock:
            self._counters["asked_pages"] += pages
            self._counters["found_pages"] += found
            counts, sums = self._histograms["exists_seconds"]
            counts[place] += 1
            sums[0] += seconds

    @contextmanager
    def timed(self, call: str) -> Iterator[None]:
        """Record duration and number of running calls; ``call`` is "get" or "put"."""
        self.running(f"running_{call}s", 1)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.observe(f"{call}_seconds", time.perf_counter() - started)
            self.running(f"running_{call}s", -1)

    def transferred(self, direction: str, pages: int, byte_count: int, seconds: float) -> None:
        """Record one call that moved pages; ``direction`` is "read" or "write"."""
        with self._lock:
            self._counters[f"{direction}_pages"] += pages
            self._counters[f"{direction}_bytes"] += byte_count
            series = self._reads if direction == "read" else self._writes
            if len(series) < _TRANSFERS_MAX:  # without a drain: stop collecting, keep counting
                series.append((pages, byte_count / max(seconds, 1e-9) / 1e9))
        self.observe("get_pages" if direction == "read" else "put_pages", pages)

    def drain_transfers(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """Return (reads, writes) since the last drain, each as (pages, GB/s)."""
        with self._lock:
            reads, writes = self._reads, self._writes
            self._reads, self._writes = [], []
        return reads, writes

    def snapshot(self) -> dict[str, int]:
        """Return all counters by name."""
        with self._lock:
            return dict(self._counters)

    def histograms(self) -> dict[str, Histogram]:
        """Return all histograms by name."""
        with self._lock:
            return {
                name: Histogram(CATALOG[name].buckets, tuple(counts), sums[0])
                for name, (counts, sums) in self._histograms.items()
            }

    def gauges(self) -> dict[tuple[str, str], float]:
        """Return all gauges by (name, value of the metric's own label or "")."""
        with self._lock:
            gauges = dict(self._gauges)
        return {at: value() if callable(value) else value for at, value in gauges.items()}


class SlotAges:
    """Time of the last read or write of each slot: four bytes per slot, in whole seconds.

    Recovered pages count from the start. Any thread; two that touch one slot write the same second.
    """

    def __init__(self, slot_count: int, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._seconds = np.zeros(slot_count, np.uint32)

    def touch(self, slots: Sequence[int]) -> None:
        """Record a use of these slots."""
        if slots:
            self._seconds[slots] = int(time.monotonic() - self._start)

    def evicted(self, slots: Iterable[int]) -> None:
        """Count victims by the time since their last use. Call it before their slots are touched again."""
        rows = list(slots)
        if rows:
            now = int(time.monotonic() - self._start)
            ages = (now - self._seconds[rows].astype(np.int64)).tolist()
            self._metrics.observe_all("evicted_age_seconds", ages)
            self._metrics.count("evicted_pages", len(rows))


def _expect(name: str, kind: Kind) -> str:
    assert name in CATALOG, f"{name} is not in catalog.CATALOG"
    assert CATALOG[name].kind == kind, f"{name} is a {CATALOG[name].kind}, not a {kind}"
    return name
