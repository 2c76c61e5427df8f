"""Two stock SGLang servers on one directory. Every test has a prompt of its own and leaves the pair as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flexkv_bed.server import (
    DYNAMIC_FLEXKV,
    Replica,
    ServerFailedError,
    Settings,
    flexkv_extra,
)
from flexkv_bed.storage import wait_written
from sglang_bed.prompts import PAGE, REUSABLE, assert_from_storage, assert_recomputed, cold, prompt
from stores.command import flexkv
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.e2e]

ENGINE_SCRIPT = Path(__file__).with_name("offline_engine.py")


def test_replicas_share_in_both_directions(pair: tuple[Replica, Replica]) -> None:
    a, b = pair
    first, second = cold(a, 1), cold(b, 2)
    assert_from_storage(b, 1, first)
    assert_from_storage(a, 2, second)


def test_detach_and_attach_at_run_time(pair: tuple[Replica, Replica]) -> None:
    _, b = pair
    first = cold(b, 3)
    b.detach()
    b.flush_cache()
    assert_recomputed(b, 3, first)
    b.attach("flexkv", b.settings.extra_config())
    b.flush_cache()
    assert_from_storage(b, 3, first)


def reaches(replica: Replica, series: str, value: float) -> None:
    """More is right, too: a prefetch that SGLang gave up and asked for again reads its pages twice."""
    seen = f"{series} is {replica.metric(series)} and not {value}"
    assert wait_until(lambda: replica.metric(series) >= value), (seen, replica.metric(series))


def test_our_series_are_in_sglangs_scrape_and_go_on_after_detach_and_attach(
    pair: tuple[Replica, Replica],
) -> None:
    a, b = pair
    pages = REUSABLE // PAGE
    counted = "sglang:flexkv_neighbour_read_pages_total"
    before = b.metric(counted)
    assert_from_storage(b, 10, cold(a, 10))
    reaches(b, counted, before + pages)
    assert wait_until(lambda: b.metric("sglang:flexkv_slots_total") > 0)
    b.detach()
    assert wait_until(lambda: b.metric("sglang:flexkv_slots_total") == 0)
    b.attach("flexkv", b.settings.extra_config())
    assert_from_storage(b, 11, cold(a, 11))
    reaches(b, counted, before + 2 * pages)
    assert wait_until(lambda: b.metric("sglang:flexkv_slots_total") > 0)
    assert b.metric("sglang:flexkv_get_seconds_count") > 0
    assert b.metric("sglang:flexkv_exceptions_total") == 0


def test_the_doctor_looks_at_real_servers(pair: tuple[Replica, Replica]) -> None:
    a, b = pair
    assert_from_storage(b, 12, cold(a, 12))
    words = ("doctor", "--url", f"http://127.0.0.1:{b.port}", "--json")
    setup = {"not_attached", "other_path", "server_unreachable", "nothing_written", "failures"}

    def settled() -> bool:
        """Series and files are up to two seconds old; other tests detach and attach."""
        now = flexkv(*words).json
        return now["found_pages"] > 0 and not setup & {each["what"] for each in now["findings"]}

    assert wait_until(settled), flexkv(*words).text
    told = flexkv(*words).json
    assert str(b.settings.storage) in told["directories"]  # from the server's flags
    assert told["alive"]
    assert told["server"]["flags"]["hicache_storage_backend"] == "flexkv"
    b.detach()
    try:
        output = flexkv(*words)
        assert output.code == 1
        assert output.json["findings"][0]["what"] == "not_attached"
    finally:
        b.attach("flexkv", b.settings.extra_config())


def test_wrong_settings_over_http_are_refused_and_the_server_goes_on(
    pair: tuple[Replica, Replica],
) -> None:
    a, _ = pair
    a.detach()
    try:
        with pytest.raises(ServerFailedError, match=r"(?s)HTTP 400.*sise.*Did you mean 'size'"):
            a.attach("flexkv", {"path": str(a.settings.storage), "sise": 1})
        assert a.generate(prompt(4)).storage == 0
    finally:
        a.attach("flexkv", a.settings.extra_config())
    cold(a, 5)


def test_clear_over_http_forgets_own_pages_and_leaves_the_neighbours(
    pair: tuple[Replica, Replica],
) -> None:
    a, b = pair
    mine, theirs = cold(a, 6), cold(b, 7)
    a.clear_storage()
    a.flush_cache()
    assert_recomputed(a, 6, mine)
    assert_from_storage(a, 7, theirs)


def test_the_dynamic_backend_is_the_same_store(
    pair: tuple[Replica, Replica], tmp_path: Path
) -> None:
    a, _ = pair
    first = cold(a, 8)
    settings = Settings(
        model=a.settings.model,
        storage=a.settings.storage,
        log=tmp_path / "dynamic.log",
        backend="dynamic",
        extra={**flexkv_extra(a.settings.storage), **DYNAMIC_FLEXKV},
    )
    with Replica(settings) as replica:
        replica.wait_ready()
        assert_from_storage(replica, 8, first)


def test_the_offline_engine_reads_what_a_server_wrote(
    pair: tuple[Replica, Replica], tmp_path: Path
) -> None:
    a, _ = pair
    first = cold(a, 9)
    job = {
        "model": str(a.settings.model),
        "extra": a.settings.extra_config(),
        "page_size": PAGE,
        "prompt": prompt(9),
    }
    environment = {
        **os.environ,
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    run = subprocess.run(
        [sys.executable, "-P", str(ENGINE_SCRIPT), json.dumps(job)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer["cached"]["storage"] == REUSABLE
    assert tuple(answer["output_ids"]) == first.output_ids


def test_a_memory_tier_and_the_thread_fallback_can_be_attached(
    pair: tuple[Replica, Replica], tmp_path: Path, shm_path: Path
) -> None:
    """The same two servers, other settings: what one wrote through memory and disk the other reads."""
    a, b = pair
    disk, memory = tmp_path / "disk", shm_path / "memory"
    tiers = [{"path": str(memory), "size": "32MiB"}, {"path": str(disk), "size": "64MiB"}]
    extra = {"prefetch_threshold": PAGE, "tiers": tiers, "io_engine": "threads"}
    for replica in pair:
        replica.detach()
        replica.attach("flexkv", extra)
    try:
        a.flush_cache()
        first = a.generate(prompt(13))
        wait_written(disk, {})
        wait_written(memory, {})
        b.flush_cache()
        assert_from_storage(b, 13, first)
    finally:
        for replica in pair:
            replica.detach()
            replica.attach("flexkv", replica.settings.extra_config())
    assert [len(list(place.rglob("*.slots"))) for place in (disk, memory)] == [2, 2]
