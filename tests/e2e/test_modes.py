"""Stock SGLang servers in its other modes: write and prefetch policies, staging-only host memory, injected failures.

Policies are changed on a running server (``PUT`` of the attached backend's name does no more than that).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from asking import PAGE, REUSABLE, assert_from_storage, cold, prompt
from engines import wait_until
from flexkv_bed.server import Replica, Settings
from flexkv_bed.storage import state, wait_written

pytestmark = [pytest.mark.sglang, pytest.mark.e2e]

PAGES = REUSABLE // PAGE
DEVICE_PROMPTS = 7  # 600 tokens each; the device pool holds 4096


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Replica]:
    work = tmp_path_factory.mktemp("modes")
    arguments = ("--admin-api-key", "bed", "--enable-metrics")
    made = Replica(
        Settings(model=model, storage=work / "pages", log=work / "log", arguments=arguments)
    )
    with made:
        made.wait_ready()
        yield made


def test_write_through_selective_writes_what_is_asked_for_again(replica: Replica) -> None:
    replica.set_policies(write="write_through_selective")
    try:
        before = state(replica.settings.storage)
        first = replica.generate(prompt(1))
        assert replica.generate(prompt(1)).output_ids == first.output_ids
        wait_written(replica.settings.storage, before)
        replica.generate(prompt(2))
        replica.flush_cache()
        assert_from_storage(replica, 1, first)
        assert replica.generate(prompt(2)).storage == 0
    finally:
        replica.flush_cache()
        replica.set_policies(write="write_through")


def test_write_back_writes_what_is_evicted(replica: Replica) -> None:
    replica.flush_cache()
    replica.set_policies(write="write_back")
    try:
        before = state(replica.settings.storage)
        first = replica.generate(prompt(10))
        for seed in range(11, 11 + DEVICE_PROMPTS):
            replica.generate(prompt(seed))
        wait_written(replica.settings.storage, before)
        replica.flush_cache()
        assert_from_storage(replica, 10, first)
        assert replica.generate(prompt(10 + DEVICE_PROMPTS)).storage == 0  # was never evicted
    finally:
        replica.flush_cache()
        replica.set_policies(write="write_through")


@pytest.mark.parametrize("policy", ["timeout", "best_effort", "wait_complete"])
def test_prefetch_policies(replica: Replica, policy: str) -> None:
    """``best_effort`` waits for nothing: what has arrived is used, and the answer is the same."""
    seed = 30 + len(policy)
    first = cold(replica, seed)
    replica.set_policies(prefetch=policy)
    try:
        replica.flush_cache()
        answer = replica.generate(prompt(seed))
        assert answer.output_ids == first.output_ids
        assert answer.storage % PAGE == 0
        assert answer.storage == REUSABLE or policy == "best_effort"
    finally:
        replica.set_policies(prefetch="wait_complete")


def test_sglangs_histograms_count_what_we_moved(replica: Replica) -> None:
    """``get_stats`` is drained while requests are served, so the next request publishes the last one's transfers."""
    names = ["sglang:prefetch_pgs_sum", "sglang:backup_pgs_sum"]
    before = [replica.metric(name) for name in names]
    first = cold(replica, 50)
    replica.flush_cache()
    assert_from_storage(replica, 50, first)
    assert wait_until(
        lambda: (
            [replica.metric(name) - old for name, old in zip(names, before, strict=True)]
            == [PAGES, PAGES]
        )
    )
    for name in ("sglang:prefetch_bandwidth", "sglang:backup_bandwidth"):
        assert replica.metric(name + "_sum") > 0
