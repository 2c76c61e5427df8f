"""Publish the metrics of one engine: gauges, ``<owner>.stats.json`` in each directory, and Prometheus.

Each directory's files are written by its own thread, and Prometheus' by another, so a disk that hangs holds up neither
a call of SGLang nor the other files. A failure is counted and the engine goes on.
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
from flexkv_sglang.cache.disks.directories import Directory
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import DiskThread, wait_for

INTERVAL_S = 2.0
"""Between two looks at the metrics. Files are written only when a metric changed."""


class Reporter:
    """``write`` belongs to the thread of its directory, ``export_soon`` and ``close`` may be called by any.

    ``page_count`` may take ``LocalPages.lock``. ``level``: number of the tier, the label of its gauges.
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
        self._started_at = time.time()
        self._written: dict[Path, str] = {}
        self._closed = False
        self._exporter = DiskThread("flexkv-metrics")
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

    def write(self, directory: Directory) -> None:
        """Write the stats files of a directory if a metric has changed. Not after ``close``."""
        if not self._closed:
            self._write(directory)
            self.export_soon()

    def export_soon(self) -> None:
        """Give the metrics to Prometheus, on a thread of its own: its files may lie on a disk that hangs, too."""
        if self._exporter.idle:
            self._exporter.post(self._export, 0.0)

    def close(self, directories: Sequence[Directory], deadline: float) -> None:
        """Write a last time, while the owners' locks are held: later the files may be another's. Idempotent.

        Waits until ``deadline`` (``time.monotonic()``).
        """
        if self._closed:
            return
        self._closed = True
        last = [d.upkeep.post(functools.partial(self._write, d), 0.0) for d in directories]
        wait_for(last, deadline)
        for name, key in self._gauges:  # a gauge would keep a closed engine alive
            self._metrics.gauge(name, 0, key)
        wait_for([self._exporter.post(self._export, 0.0)], deadline)
        self._exporter.stop(0.0)

    def _write(self, directory: Directory) -> None:
        fields = _fields(self._metrics)
        text = json.dumps(fields, sort_keys=True)
        if text == self._written.get(directory.path):
            return
        head = {
            "process": self._metrics.process,
            "pid": os.getpid(),
            "started_at": self._started_at,
            "written_at": time.time(),
        }
        try:
            for store in directory.stores.values():
                owner = store.lock.owner
                content = json.dumps({"owner": owner, **head, **fields}, sort_keys=True)
                publish(directory.path, stats_path(directory.path, owner).name, [content.encode()])
            self._written[directory.path] = text
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
