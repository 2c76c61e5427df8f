"""A disk below one of two directories hangs, file system and all: calls end in time, the other directory goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.cache.disks.call_watch import CallWatch
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig, TierConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import OVERDUE_S
from stores.engines import keys, page_memory, wait_until
from stores.hanging_mount import HangingMount, hanging_mount, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

PAGE = 8192
BOUND_S = 0.3
SLACK_S = 2.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[HangingMount]:
    try:
        manager = hanging_mount(tmp_path / "hanging")
        mount = manager.__enter__()
    except OSError as exc:
        pytest.skip(str(exc))
    yield mount
    manager.__exit__(None, None, None)


def open_on(*paths: Path, durability: str = "none") -> Tiers:
    config = FlexKVConfig(
        tiers=(TierConfig(tuple(map(str, paths)), 128 * PAGE),), durability=durability, min_free=0
    )
    quotas = [Quota(tier.size) for tier in config.tiers]
    return open_tiers(config, prepare_tiers(config), "ns", {}, PAGE, quotas, Metrics())


def put(tiers: Tiers, count: int, seed: int) -> tuple[list[bool], float]:
    _, buffers = page_memory(count, PAGE, seed=seed)
    begun = time.monotonic()
    done = tiers.put(keys(count, seed), buffers, None, begun + BOUND_S)
    return done, time.monotonic() - begun


def got(tiers: Tiers, count: int, seed: int) -> int:
    _, buffers = page_memory(count, PAGE)
    return sum(tiers.get(keys(count, seed), buffers, time.monotonic() + BOUND_S))


def breakers(tiers: Tiers) -> list[Any]:
    return [store.breaker for store in tiers.tiers[0]._tier.stores]


@pytest.mark.parametrize("durability", ["none", "journal"])
def test_of_two_directories_the_one_that_hangs_is_bypassed_and_the_other_goes_on(
    tmp_path: Path, disk: HangingMount, durability: str
) -> None:
    tiers = open_on(disk.path / "a", tmp_path / "b", durability=durability)
    assert all(put(tiers, 16, seed=1)[0])
    hanging, healthy = breakers(tiers)
    disk.freeze()
    done, took = put(tiers, 16, seed=2)
    assert took < BOUND_S + OVERDUE_S + SLACK_S
    assert not all(done)
    assert wait_until(lambda: hanging.is_open and not hanging.is_readable)
    assert not healthy.is_open
    assert tiers.prefix(keys(16, 1)) < 16, "it is not announced any more"
    for seed in range(3, 6):
        done, took = put(tiers, 8, seed)
        assert all(done)
        assert took < BOUND_S + SLACK_S
        assert got(tiers, 8, seed) == 8
    disk.thaw()
    assert wait_until(lambda: not hanging.is_open)
    assert wait_until(lambda: tiers.prefix(keys(16, 1)) == 16)
    assert got(tiers, 16, seed=1) == 16
    tiers.check()
    tiers.close()


def test_clear_returns_at_once_and_holds_when_the_disk_answers_again(
    tmp_path: Path, disk: HangingMount
) -> None:
    tiers = open_on(disk.path / "a")
    assert all(put(tiers, 16, seed=1)[0])
    disk.freeze()
    begun = time.monotonic()
    tiers.clear()
    assert time.monotonic() - begun < SLACK_S / 2
    assert tiers.prefix(keys(16, 1)) == 0
    disk.thaw()
    assert wait_until(lambda: all(put(tiers, 4, seed=2)[0]))
    tiers.close()
    tiers = open_on(disk.path / "a")
    assert (tiers.prefix(keys(16, 1)), tiers.page_count()) == (0, 4)
    tiers.close()


@pytest.mark.parametrize("busy", [False, True])
def test_close_has_one_bound_for_all_and_leaves_the_healthy_directory_in_order(
    tmp_path: Path, disk: HangingMount, busy: bool
) -> None:
    tiers = open_on(disk.path / "a", tmp_path / "b")
    assert all(put(tiers, 16, seed=1)[0])
    disk.freeze()
    if busy:
        threading.Thread(target=put, args=(tiers, 16, 2), daemon=True).start()
        time.sleep(0.05)
    begun = time.monotonic()
    tiers.close()
    assert time.monotonic() - begun < 3.0 + SLACK_S
    hanging, healthy = tiers.tiers[0]._tier.stores
    assert hanging.lock.held
    assert not healthy.lock.held
    assert not tiers.released()
    disk.thaw()
    assert wait_until(lambda: (tiers.close(), tiers.released())[1])


def test_an_idle_store_notices_the_disk_that_hangs(tmp_path: Path, disk: HangingMount) -> None:
    """No call is under way: the stats file is the first that hangs."""
    tiers = open_on(disk.path / "a", tmp_path / "b")
    assert all(put(tiers, 16, seed=1)[0])
    hanging, healthy = breakers(tiers)
    engine = tiers.tiers[0]
    disk.freeze()
    engine._metrics.count("clears")  # a metric that changed is written
    assert wait_until(lambda: hanging.is_open, 15.0)
    assert not healthy.is_open
    assert tiers.prefix(keys(16, 1)) < 16
    disk.thaw()
    assert wait_until(lambda: tiers.prefix(keys(16, 1)) == 16)
    tiers.close()


def test_the_watch_blames_only_directories_whose_pages_are_under_way() -> None:
    class Call:
        deadline = 0.0
        writing = False

        def __init__(self, flying: list[bool]) -> None:
            self.flying = np.array(flying)

    watch, one, other = CallWatch(), object(), object()
    with watch.call(Call([False, True, False]), [one, other, one]):  # type: ignore[arg-type, list-item]
        assert watch.overdue() == {other}
    with watch.call(Call([False, False]), [one, one]):  # type: ignore[arg-type, list-item]
        assert watch.overdue() == {one}, "the only one there is"
    assert watch.overdue() == set()
