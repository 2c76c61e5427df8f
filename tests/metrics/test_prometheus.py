"""A real scrape in multiprocess mode, as in SGLang: writers in one process, the reader in another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "prometheus_client", reason="in tests/bed/requirements.txt: run scripts/setup-env"
)

WRITER = """
import sys
from types import SimpleNamespace
assert "prometheus_client" not in sys.modules
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.metrics.prometheus import export
off = Metrics()
export(off, SimpleNamespace(enable_storage_metrics=False))
assert off.export is None
assert "prometheus_client" not in sys.modules, "imported although metrics are off"
config = SimpleNamespace(
    enable_storage_metrics=True, model_name="tiny", tp_rank=int(sys.argv[1]), pp_rank=0, dp_rank=None
)
for attached in range(2):  # the second time is detach and attach
    metrics = Metrics()
    export(metrics, config)
    metrics.count("corrupt_pages", 2)
    metrics.gauge("breaker_state", 2, "/nvme0")
    metrics.gauge("slots_used", 7 + attached, "0")
    metrics.observe_all("get_seconds", [0.002, 0.002, 99.0])
    metrics.export()
    metrics.count("corrupt_pages", 1)
    metrics.observe("get_seconds", 0.002)
    metrics.export()
    metrics.export()
"""

READER = """
import json
from prometheus_client import CollectorRegistry, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
rows = [
    (sample.name, sample.labels, sample.value)
    for family in registry.collect()
    for sample in family.samples
]
print(json.dumps(rows))
"""


def python(code: str, directory: Path, *arguments: str) -> str:
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(directory)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_scrape_sees_all_ranks_and_goes_on_after_detach_and_attach(tmp_path: Path) -> None:
    for rank in "01":
        python(WRITER, tmp_path, rank)
    rows = json.loads(python(READER, tmp_path))

    def values(name: str, **labels: str) -> list[float]:
        return [v for n, have, v in rows if n == name and labels.items() <= have.items()]

    ours = {"model_name": "tiny", "pp_rank": "0", "dp_rank": "0"}
    for rank in "01":
        base = {**ours, "tp_rank": rank}
        unread = "sglang:flexkv_unread_pages_total"
        assert values(unread, **base, reason="corrupt") == [6.0]
        assert values(unread, **base, reason="late") == [0.0]  # there from the start
        assert values("sglang:flexkv_slots_used", **base, tier="0") == [8.0]
        assert values("sglang:flexkv_breaker_state", **base, directory="/nvme0") == [2.0]
        seconds = "sglang:flexkv_get_seconds"
        assert values(f"{seconds}_bucket", **base, le="0.001") == [0.0]
        assert values(f"{seconds}_bucket", **base, le="0.003") == [6.0]
        assert values(f"{seconds}_bucket", **base, le="+Inf") == [8.0]
        assert values(f"{seconds}_count", **base) == [8.0]
        assert values(f"{seconds}_sum", **base) == [pytest.approx(2 * (99.0 + 3 * 0.002))]
