"""Our metrics as series of ``prometheus_client``, in the process-wide registry that SGLang uses.

SGLang scrapes in multiprocess mode: another process reads the memory-mapped files of this one, so nothing is
computed at scrape time. ``Exporter.update`` adds the counts since its last call.

Only this module imports prometheus_client, and only when SGLang runs with ``--enable-metrics``: the client decides
at its import whether it is in multiprocess mode, and SGLang sets that up first.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import Any

from flexkv_sglang.metrics.catalog import CATALOG, Metric
from flexkv_sglang.metrics.registry import Histogram, Metrics

logger = logging.getLogger(__name__)

_registered: dict[str, Any] = {}
"""Series by name, for the process like the client's registry, which refuses a second registration of a name: a
backend that is attached again uses the series of the first."""


class Exporter:
    """Writes one ``Metrics`` to Prometheus. Any thread.

    ``labels``: name -> value, the same names for every exporter of the process. Raises ``ImportError``
    without prometheus_client.
    """

    def __init__(self, metrics: Metrics, labels: Mapping[str, str]) -> None:
        self._metrics = metrics
        self._labels = dict(labels)
        self._lock = threading.Lock()  # guards what follows; held while writing to mapped memory
        self._counted: dict[str, int] = {}
        self._observed: dict[str, Histogram] = {}
        for metric in CATALOG.values():
            series = _series(metric, self._labels)
            if not metric.key:  # shows 0 before the first event
                series.labels(**self._labels, **metric.labels)

    def update(self) -> None:
        """Write the changes since the last call."""
        with self._lock:
            for name, value in self._metrics.snapshot().items():
                self._child(name).inc(value - self._counted.get(name, 0))
                self._counted[name] = value
            for (name, key), level in self._metrics.gauges().items():
                self._child(name, key).set(level)
            for name, histogram in self._metrics.histograms().items():
                _add(self._child(name), histogram, self._observed.get(name))
                self._observed[name] = histogram

    def _child(self, name: str, key: str = "") -> Any:
        metric = CATALOG[name]
        own = {metric.key: key} if metric.key else {}
        return _series(metric, self._labels).labels(**self._labels, **metric.labels, **own)


def export(metrics: Metrics, storage_config: Any, pool: str = "kv") -> None:
    """Export the ``metrics`` of a host pool if SGLang exports its own (storage config)."""
    if not getattr(storage_config, "enable_storage_metrics", False):
        return
    labels = {
        "model_name": str(getattr(storage_config, "model_name", None) or ""),
        "tp_rank": str(getattr(storage_config, "tp_rank", 0)),
        "pp_rank": str(getattr(storage_config, "pp_rank", 0)),
        "dp_rank": str(getattr(storage_config, "dp_rank", None) or 0),
        "pool": pool,
    }
    try:
        metrics.export = Exporter(metrics, labels).update
    except ImportError as exc:
        logger.warning("flexkv: no Prometheus series: %s", exc)


def _series(metric: Metric, labels: Mapping[str, str]) -> Any:
    name = metric.prometheus_name
    if name not in _registered:
        from prometheus_client import Counter, Gauge
        from prometheus_client import Histogram as PrometheusHistogram

        names = [*labels, *metric.labels, *([metric.key] if metric.key else [])]
        text = f"{metric.help} ({metric.unit})"
        if metric.kind == "counter":
            _registered[name] = Counter(name, text, names)
        elif metric.kind == "gauge":
            _registered[name] = Gauge(name, text, names, multiprocess_mode="mostrecent")
        else:
            _registered[name] = PrometheusHistogram(name, text, names, buckets=metric.buckets)
    return _registered[name]


def _add(child: Any, now: Histogram, before: Histogram | None) -> None:
    """Add bucket counts to a client's histogram, which has no public call for it; SGLang does the same."""
    earlier = before.counts if before is not None else (0,) * len(now.counts)
    for bucket, count, old in zip(child._buckets, now.counts, earlier, strict=True):
        if count > old:
            bucket.inc(count - old)
    child._sum.inc(now.total - (before.total if before is not None else 0.0))
