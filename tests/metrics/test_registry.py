"""Metrics: one catalog of names, exact buckets, ages of victims, exact counts with many threads."""

from __future__ import annotations

import ast
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from flexkv_sglang.metrics import prometheus
from flexkv_sglang.metrics.catalog import CATALOG, SECONDS
from flexkv_sglang.metrics.registry import Metrics, SlotAges

ROOT = Path(__file__).resolve().parents[2]
METHODS = {"count": "counter", "observe": "histogram", "observe_all": "histogram", "gauge": "gauge"}


def named_in_source() -> list[tuple[str, str, str]]:
    """(file, kind, name) of every metric named by a literal in the package, rare paths included."""
    found = []
    for path in [*ROOT.glob("flexkv_sglang/**/*.py"), *ROOT.glob("backends/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            kind = METHODS.get(node.func.attr)
            first = node.args[0] if node.args else None
            if not isinstance(first, ast.Constant):
                continue
            if node.func.attr == "_trouble":
                name = str(first.value).replace(" ", "_")
                found.append((path.name, "counter", f"{name}_errors"))
            elif kind and "metrics" in ast.unparse(node.func.value):
                found.append((path.name, kind, str(first.value)))
    return found


def test_every_metric_named_in_the_source_is_in_the_catalogue() -> None:
    names = named_in_source()
    assert len(names) > 15
    wrong = [item for item in names if item[2] not in CATALOG or CATALOG[item[2]].kind != item[1]]
    assert not wrong


def test_every_metric_is_in_the_table_of_the_manual() -> None:
    manual = (ROOT / "docs" / "OPERATING.md").read_text()
    missing = {
        metric.prometheus_name
        for metric in CATALOG.values()
        if f"`{metric.prometheus_name.removeprefix('sglang:flexkv_')}`" not in manual
    }
    assert not missing


def test_metrics_of_one_series_have_the_same_labels_and_differ_in_their_values() -> None:
    seen: dict[str, set[tuple[str, ...]]] = {}
    for metric in CATALOG.values():
        names, values = tuple(metric.labels), tuple(metric.labels.values())
        known = seen.setdefault(f"{metric.prometheus_name}{names}{metric.kind}{metric.help}", set())
        assert values not in known, metric
        known.add(values)
    assert len({key.partition("(")[0] for key in seen}) == len(seen)


def test_an_unknown_name_and_a_wrong_kind_are_programming_errors() -> None:
    metrics = Metrics()
    for call in (
        lambda: metrics.count("no_such_thing"),
        lambda: metrics.count("get_seconds"),
        lambda: metrics.observe("clears", 1.0),
        lambda: metrics.gauge("clears", 1),
        lambda: metrics.gauge("breaker_state", 1),
        lambda: metrics.gauge("slots_total", 1),
    ):
        with pytest.raises(AssertionError):
            call()


def test_a_histogram_counts_each_value_once_and_a_bound_belongs_to_its_bucket() -> None:
    metrics = Metrics()
    bounds = CATALOG["get_pages"].buckets
    metrics.observe_all("get_pages", [0, 1, 1.5, 2, 512, 513])
    histogram = metrics.histograms()["get_pages"]
    assert histogram.bounds == bounds
    assert histogram.counts == (2, 2, 0, 0, 0, 0, 0, 0, 0, 1, 1)
    assert histogram.total == 1029.5


def test_a_call_of_exists_is_counted_as_asked_and_found() -> None:
    metrics = Metrics()
    metrics.asked(128, 5, 0.002)
    metrics.asked(1, 0, 0.002)
    assert metrics.snapshot() == {"asked_pages": 129, "found_pages": 5}
    assert metrics.histograms()["exists_seconds"].counts[SECONDS.index(0.003)] == 2


def test_gauge_functions_are_called_when_gauges_are_read() -> None:
    metrics = Metrics()
    level = [3]
    metrics.gauge("slots_used", lambda: level[0], "0")
    metrics.gauge("breaker_state", 2, "/nvme0")
    assert metrics.gauges() == {("slots_used", "0"): 3, ("breaker_state", "/nvme0"): 2}
    level[0] = 4
    assert metrics.gauges()["slots_used", "0"] == 4


def test_running_calls_are_visible_inside_and_gone_after_also_when_they_fail() -> None:
    metrics = Metrics()

    def fail_inside() -> None:
        with metrics.timed("get"), metrics.timed("get"):
            assert metrics.gauges()["running_gets", ""] == 2
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail_inside()
    assert metrics.gauges()["running_gets", ""] == 0
    assert sum(metrics.histograms()["get_seconds"].counts) == 2


def test_victims_are_counted_by_the_time_since_they_were_used() -> None:
    metrics = Metrics()
    ages = SlotAges(8, metrics)
    ages._start -= 100.0  # opened 100 s ago
    ages.touch([2, 3])
    ages.evicted([1, 2])
    ages.evicted([])
    bounds = CATALOG["evicted_age_seconds"].buckets
    counts = metrics.histograms()["evicted_age_seconds"].counts
    assert [(i, n) for i, n in enumerate(counts) if n] == [(0, 1), (bounds.index(300.0), 1)]
    assert metrics.snapshot()["evicted_pages"] == 2


def test_nothing_is_lost_when_threads_count_at_once() -> None:
    metrics = Metrics()
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        for _ in range(500):
            metrics.count("clears")
            metrics.observe("get_seconds", 0.5)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.snapshot()["clears"] == 4000
    assert sum(metrics.histograms()["get_seconds"].counts) == 4000


def test_without_the_client_there_is_a_warning_and_no_exporter(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(prometheus, "_registered", {})
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    metrics = Metrics()
    prometheus.export(metrics, SimpleNamespace(enable_storage_metrics=True))
    assert metrics.export is None
    assert "no Prometheus series" in caplog.text
