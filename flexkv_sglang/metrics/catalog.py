"""Catalog of all metrics of a storage instance: name, kind, unit, meaning. An unknown name is a programming error.

The agent's own counters (``share_...`` and others: docs/OPERATING.md, "Commands") are not in it.

Counting, Prometheus, ``<owner>.stats.json`` and docs/OPERATING.md use this list. Several names may be one Prometheus
series with different labels: misses by reason, failures by call.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of latency buckets."""

AGES = (1.0, 10.0, 60.0, 300.0, 1800.0, 3600.0, 21600.0, 86400.0, 604800.0)
"""Upper bounds of age buckets, in seconds: 1 s to a week."""

PAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
"""Upper bounds of batch-size buckets."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. ``series`` and ``labels``: its name in Prometheus (default: ``name``, no label).

    ``key``: name of a label whose value is set at run time (a directory). ``buckets``: histograms only.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    series: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    key: str = ""
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """Name of the series, without ``_total``, which the client adds to counters."""
        return f"sglang:flexkv_{self.series or self.name}"


CALLS = (
    *("batch_exists", "batch_get_v1", "batch_set_v1", "batch_exists_v2", "batch_get_v2"),
    *("batch_set_v2", "register_mem_host_pool_v2", "exists", "get", "batch_get", "set"),
    *("batch_set", "clear", "get_stats", "close", "host_indices", "upkeep"),
    *("leave_epoch", "enter_epoch", "on_host_pools_registered"),
    *("lookup", "load", "start_layer_wise_loading", "finish_layer_wise_loading"),
    *("cancel_queued_load", "offload", "num_completed_offloads", "pop_completed_offload"),
    *("reset", "follow_layer", "watch"),
)
"""Calls whose failures are counted; ``host_indices``: they are not one whole page per key."""

OPERATIONS = (
    *("read", "write", "tombstone", "commit", "clear", "close"),
    *("journal_rotation", "shrink", "report", "restore"),
)
"""Operations that are counted when they fail as a whole."""

TIERS_MAX = 8
"""Number of tiers with counters of their own."""


def _counter(name: str, unit: str, text: str, series: str = "", **labels: str) -> Metric:
    return Metric(name, "counter", unit, text, series, labels)


_HIT = "pages delivered by get, by tier (0 is the fastest)"
_UNREAD = "pages that were found and could not be delivered, by reason"
_UNSTORED = "pages given to put and not stored, by reason"
_UNFETCHED = (
    "pages that other nodes claim and that did not come, by reason (left: computing them is quicker, or they "
    "would be late)"
)
_RUNNING = "calls that take place now"
_TROUBLE = "operations that failed as a whole, by operation"

_ALL = (
    _counter("asked_pages", "pages", "pages that exists was asked for"),
    _counter(
        "found_pages", "pages", "of these, the leading run that is stored here or at a neighbour"
    ),
    _counter("recovered_pages", "pages", "pages found in adopted files at start"),
    _counter("read_pages", "pages", "pages read whole and right"),
    _counter("read_bytes", "bytes", "bytes of these pages"),
    _counter("write_pages", "pages", "pages written and recorded"),
    _counter("write_bytes", "bytes", "bytes of these pages"),
    *(
        _counter(f"tier{level}_hit_pages", "pages", _HIT, "hit_pages", tier=str(level))
        for level in range(TIERS_MAX)
    ),
    _counter("promoted_pages", "pages", "pages copied to a faster tier on their second hit"),
    _counter("linker_loads", "batches", "batches of loads a linker has started"),
    _counter("linker_failed_loads", "batches", "of these, those whose requests SGLang aborted"),
    _counter("linker_offloads", "offloads", "offloads a linker has accepted"),
    _counter("linker_failed_offloads", "offloads", "of these, those not stored as a whole"),
    _counter(
        "linker_promoted_pages", "pages", "pages of neighbours copied to own files for a linker"
    ),
    _counter("read_miss_pages", "pages", "pages asked of get and not delivered, for any reason"),
    _counter("read_failed_pages", "pages", _UNREAD, "unread_pages", reason="failed"),
    _counter("read_late_pages", "pages", _UNREAD, "unread_pages", reason="late"),
    _counter("corrupt_pages", "pages", _UNREAD, "unread_pages", reason="corrupt"),
    _counter("neighbour_lost_pages", "pages", _UNREAD, "unread_pages", reason="rewritten"),
    _counter("neighbour_read_pages", "pages", "of the pages read, those that neighbours hold"),
    _counter("remote_read_pages", "pages", "pages that came from other nodes whole and right"),
    _counter("remote_read_bytes", "bytes", "bytes of these pages"),
    *(
        _counter(f"remote_{reason}_pages", "pages", _UNFETCHED, "unfetched_pages", reason=reason)
        for reason in ("miss", "busy", "late", "corrupt", "failed", "left")
    ),
    _counter("remote_breaker_trips", "times", "other nodes that are not asked for a while"),
    _counter("remote_engine_failures", "times", "other nodes read over zmq: engine failed"),
    _counter("remote_kept_pages", "pages", "pages of other nodes that are stored here as well now"),
    _counter("remote_unkept_pages", "pages", "pages of other nodes not kept: too many at once"),
    _counter("copied_pages", "pages", "pages moved through the bounce slab: not aligned"),
    _counter("write_present_pages", "pages", "pages given to put that were stored already"),
    _counter("write_refused_pages", "pages", _UNSTORED, "unstored_pages", reason="no_slot"),
    _counter("write_declined_pages", "pages", _UNSTORED, "unstored_pages", reason="declined"),
    _counter("write_failed_pages", "pages", _UNSTORED, "unstored_pages", reason="failed"),
    _counter("evicted_pages", "pages", "pages that gave their slot to another"),
    *(
        _counter(f"{operation}_errors", "errors", _TROUBLE, "errors", operation=operation)
        for operation in OPERATIONS
    ),
    *(
        _counter(f"{call}_exceptions", "calls", "calls answered as a miss", "exceptions", call=call)
        for call in CALLS
    ),
    _counter("clears", "calls", "pages of this process forgotten on request"),
    _counter("breaker_opened", "times", "directories that were bypassed or take no more pages"),
    _counter("breaker_closed", "times", "directories that came back"),
    _counter(
        "restored_files", "files", "files that vanished under this process and are there again"
    ),
    _counter("given_back_slots", "slots", "slots given up because the disk was nearly full"),
    _counter("journal_rotations", "rotations", "new journal generations while running"),
    Metric("exists_seconds", "histogram", "seconds", "duration of an exists call", buckets=SECONDS),
    Metric("get_seconds", "histogram", "seconds", "duration of a get call", buckets=SECONDS),
    Metric("put_seconds", "histogram", "seconds", "duration of a put call", buckets=SECONDS),
    Metric("get_pages", "histogram", "pages", "pages read by one get call", buckets=PAGES),
    Metric("put_pages", "histogram", "pages", "pages written by one put call", buckets=PAGES),
    Metric(
        *("evicted_age_seconds", "histogram", "seconds"),
        "time since a page that was evicted was last read or written by this process",
        buckets=AGES,
    ),
    Metric("running_gets", "gauge", "calls", _RUNNING, "running_calls", {"call": "get"}),
    Metric("running_puts", "gauge", "calls", _RUNNING, "running_calls", {"call": "put"}),
    Metric("slots_total", "gauge", "slots", "slots of this process", key="tier"),
    Metric("slots_used", "gauge", "slots", "slots that hold a page", key="tier"),
    Metric("journal_bytes", "gauge", "bytes", "size of this process's journals", key="tier"),
    Metric("neighbours", "gauge", "owners", "others whose pages can be read", key="tier"),
    Metric("neighbour_pages", "gauge", "pages", "pages they claim to hold", key="tier"),
    Metric("remote_pages", "gauge", "pages", "pages that other nodes claim to hold, as known here"),
    Metric("remote_peers", "gauge", "nodes", "other nodes that are up, as known here"),
    Metric(
        *("breaker_state", "gauge", "state"),
        "0 in use, 1 read only: it takes no more pages, 2 bypassed",
        key="directory",
    ),
    Metric("agent_up", "gauge", "agents", "1: this machine's agent lives"),
    Metric("agent_unfit", "gauge", "state", "1: this process cannot use the agent", key="reason"),
    Metric("agent_exceptions", "gauge", "errors", "failures within the agent since its start"),
)

CATALOG: Mapping[str, Metric] = {metric.name: metric for metric in _ALL}
"""Metric by name."""

assert len(CATALOG) == len(_ALL), "a metric is listed twice"
