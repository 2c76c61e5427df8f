"""Live statistics: the engine writes them whole and private; they go with their owner and do not hinder adoption."""

from __future__ import annotations

import errno
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.cache import stats_file as reporter
from stores.engines import keys, open_engine, open_hierarchy_on, page_memory, soon, wait_until

PAGE = 8192


def stats_files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*.stats.json"))


def content(directory: Path) -> Any:
    (path,) = stats_files(directory)
    return json.loads(path.read_text())


def test_counters_and_gauges_are_on_disk_while_the_engine_runs_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reporter, "INTERVAL_S", 0.0)
    engine = open_engine(tmp_path, PAGE, 16 * PAGE)
    _, buffers = page_memory(10, PAGE, seed=0)
    assert all(engine.put(keys(10), buffers, None, soon()))
    assert wait_until(lambda: stats_files(tmp_path) and content(tmp_path)["counters"])
    (path,) = stats_files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert wait_until(lambda: content(tmp_path)["gauges"].get("slots_used:0") == 10)
    assert content(tmp_path)["gauges"]["slots_total:0"] == 16
    assert content(tmp_path)["owner"] == owners(tmp_path / "ns")[0]
    _, target = page_memory(10, PAGE)
    assert all(engine.get(keys(10), target, soon()))
    engine.close()
    last = content(tmp_path)
    assert last["counters"]["read_pages"] == 10
    assert last["histograms"]["get_pages"]["sum"] == 10
    assert last["gauges"]["journal_bytes:0"] > 4096  # still open when it was written
    engine.close()
    assert content(tmp_path) == last  # the files may be another's by now
    assert engine._metrics.gauges()["slots_used", "0"] == 0


def test_the_state_of_a_breaker_is_a_gauge(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 16 * PAGE)
    (store,) = engine._tier.stores
    seen = [engine._metrics.gauges()["breaker_state", str(tmp_path)]]
    for readable in (True, False):
        store.breaker.trip("test", readable=readable)
        seen.append(engine._metrics.gauges()["breaker_state", str(tmp_path)])
    store.breaker.end_probe(healthy=True)
    assert seen == [0, 1, 2]
    engine.close()


def test_tiers_have_gauges_of_their_own_and_counters_in_common(tmp_path: Path) -> None:
    both = open_hierarchy_on([(tmp_path / "fast", 4 * PAGE), (tmp_path / "slow", 16 * PAGE)], PAGE)
    gauges = both._metrics.gauges()
    assert (gauges["slots_total", "0"], gauges["slots_total", "1"]) == (4, 16)
    both.close()
    processes = {json.loads(path.read_text())["process"] for path in stats_files(tmp_path)}
    assert len(stats_files(tmp_path)) == 2
    assert len(processes) == 1


def test_a_stats_file_is_adopted_and_removed_with_its_owner(tmp_path: Path) -> None:
    open_engine(tmp_path, PAGE, 16 * PAGE).close()
    before = content(tmp_path)
    second = open_engine(tmp_path, PAGE, 16 * PAGE)
    second.close()
    after = content(tmp_path)
    assert after["owner"] == before["owner"]
    assert after["process"] != before["process"]
    lock = OwnerLock.try_take(tmp_path / "ns", after["owner"])
    assert lock is not None
    with lock:
        lock.remove_files()
    assert [path.name for path in (tmp_path / "ns").iterdir()] == ["NAMESPACE.json"]


def test_a_report_that_cannot_be_written_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(tmp_path, PAGE, 16 * PAGE)

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(reporter, "publish", full)
    monkeypatch.setattr(reporter, "INTERVAL_S", 0.0)
    _, buffers = page_memory(4, PAGE, seed=0)
    assert all(engine.put(keys(4), buffers, None, soon()))
    assert wait_until(lambda: engine._metrics.snapshot().get("report_errors", 0) > 1)
    assert engine._upkeep._thread.is_alive()
    engine.close()
