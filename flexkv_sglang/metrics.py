"""Counters. One object per storage instance; any thread may count, one reads."""

from __future__ import annotations

import threading
from collections import Counter

_TRANSFERS_MAX = 4096


class Metrics:
    """Named counters, and the transfers since the last drain. Names are documented in docs/OPERATING.md."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for an addition, nothing else
        self._counters: Counter[str] = Counter()
        self._reads: list[tuple[int, float]] = []
        self._writes: list[tuple[int, float]] = []

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a counter."""
        if amount:
            with self._lock:
                self._counters[name] += amount

    def transferred(self, direction: str, pages: int, byte_count: int, seconds: float) -> None:
        """Record one call that moved pages; ``direction`` is "read" or "write"."""
        with self._lock:
            self._counters[f"{direction}_pages"] += pages
            self._counters[f"{direction}_bytes"] += byte_count
            series = self._reads if direction == "read" else self._writes
            if len(series) < _TRANSFERS_MAX:  # nobody drains: stop collecting, keep counting
                series.append((pages, byte_count / max(seconds, 1e-9) / 1e9))

    def drain_transfers(self) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
        """(reads, writes) since the last drain, each as (pages, GB/s)."""
        with self._lock:
            reads, writes = self._reads, self._writes
            self._reads, self._writes = [], []
        return reads, writes

    def snapshot(self) -> dict[str, int]:
        """All counters by name."""
        with self._lock:
            return dict(self._counters)
