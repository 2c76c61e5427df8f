"""Publish the metrics of one engine: gauges, ``<owner>.stats.json`` in each directory, and Prometheus.

It runs on the engine's upkeep thread, so it slows no call of SGLang. A failure is counted and the engine goes on.
``flexkv stats`` and ``flexkv doctor`` read the files; the engine never does.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from flexkv_sglang.backends.safe_files import publish
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.journal import stats_path
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.slot_file import SlotFileTier
from flexkv_sglang.metrics.registry import Metrics

INTERVAL_S = 2.0
"""Between two looks at the metrics. Files are written only when a metric changed."""


class Reporter:
    """``tick`` and ``close`` are called by one thread at a time. ``page_count`` may take ``LocalPages.lock``.

    ``level``: number of the tier, the label of its gauges.
    """

    def __init__(
        self,
        metrics: Metrics,
        tier: SlotFileTier,
        neighbours: NeighbourStore,
        page_count: Callable[[], int],
        level: int,
    ) -> None:
        self._metrics = metrics
        self._owners = [(store.lock.directory, store.lock.owner) for store in tier.stores]
        self._started_at = time.time()
        self._due = time.monotonic() + INTERVAL_S
        self._written = ""
        self._closed = False
        stores, at = tier.stores, str(level)
        self._gauges: dict[tuple[str, str], Callable[[], float]] = {
            ("slots_total", at): lambda: sum(s.slots.slot_class.slot_count for s in stores),
            ("slots_used", at): page_count,
            ("journal_bytes", at): lambda: sum(s.journal.size for s in stores),
            ("neighbours", at): lambda: neighbours.neighbour_count,
            ("neighbour_pages", at): lambda: len(neighbours),
        }
        for store in stores:
            where = str(store.lock.directory.parent)
            self._gauges["breaker_state", where] = functools.partial(_state, store.breaker)
        for (name, key), ask in self._gauges.items():
            metrics.gauge(name, ask, key)

    def tick(self) -> None:
        """Publish if ``INTERVAL_S`` has passed."""
        if time.monotonic() >= self._due and not self._closed:
            self._due = time.monotonic() + INTERVAL_S
            self._publish()

    def close(self) -> None:
        """Publish a last time, while the owners' locks are held: later the files may be another's. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._publish()
        for name, key in self._gauges:  # a gauge would keep a closed engine alive
            self._metrics.gauge(name, 0, key)
        self._export()

    def _publish(self) -> None:
        self._export()
        fields = _fields(self._metrics)
        text = json.dumps(fields, sort_keys=True)
        if text == self._written:
            return
        head = {
            "process": self._metrics.process,
            "pid": os.getpid(),
            "started_at": self._started_at,
            "written_at": time.time(),
        }
        try:
            _write_all(self._owners, {**head, **fields})
            self._written = text
        except OSError:
            self._metrics.count("report_errors")

    def _export(self) -> None:
        export = self._metrics.export
        if export is None:
            return
        try:
            export()
        except (OSError, ValueError):  # a full disk under the client's files; a foreign series
            self._metrics.count("report_errors")


def _state(breaker: Breaker) -> int:
    return 0 if not breaker.is_open else 1 if breaker.is_readable else 2


def _fields(metrics: Metrics) -> dict[str, object]:
    gauges: dict[str, object] = {}
    for (name, key), value in metrics.gauges().items():
        gauges[f"{name}:{key}" if key else name] = value
    histograms = {
        name: {"bounds": item.bounds, "counts": item.counts, "sum": item.total}
        for name, item in metrics.histograms().items()
    }
    return {"counters": metrics.snapshot(), "gauges": gauges, "histograms": histograms}


def _write_all(owners: Sequence[tuple[Path, str]], fields: dict[str, object]) -> None:
    for directory, owner in owners:
        text = json.dumps({"owner": owner, **fields}, sort_keys=True)
        publish(directory, stats_path(directory, owner).name, [text.encode()])
