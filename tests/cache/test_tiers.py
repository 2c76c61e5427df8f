"""Several tiers as one: slot files in two tiers, and tiers of every kind of traits (all in memory)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.errors import TierError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.testing.example_tier import MemoryTier
from flexkv_sglang.tier import Tier, TierTraits
from stores.engines import keys, open_hierarchy_on, page_memory, soon, wait_until

PAGE = 8192


@pytest.fixture
def place(tmp_path: Path, shm_path: Path) -> list[tuple[Path, int]]:
    return [(shm_path, 16 * PAGE), (tmp_path, 128 * PAGE)]


@pytest.fixture
def both(place: list[tuple[Path, int]]) -> Iterator[Tiers]:
    tiers = open_hierarchy_on(place, PAGE)
    yield tiers
    tiers.check()
    tiers.close()


def put(tiers: Tiers, count: int, seed: int) -> Any:
    source, buffers = page_memory(count, PAGE, seed=seed)
    assert tiers.put(keys(count, seed), buffers, None, soon()) == [True] * count
    return source


def get(tiers: Tiers, count: int, seed: int) -> tuple[list[bool], Any]:
    target, buffers = page_memory(count, PAGE)
    return tiers.get(keys(count, seed), buffers, soon()), target


def hits(tiers: Tiers) -> tuple[int, int]:
    counters = tiers._metrics.snapshot()
    return counters.get("tier0_hit_pages", 0), counters.get("tier1_hit_pages", 0)


def test_pages_are_written_to_both_and_read_from_memory(both: Tiers) -> None:
    source = put(both, 10, seed=1)
    assert [tier.page_count() for tier in both.tiers] == [10, 10]
    done, target = get(both, 10, seed=1)
    assert all(done)
    assert np.array_equal(source, target)
    assert hits(both) == (10, 0)


def test_a_page_that_memory_evicted_is_promoted_on_its_second_hit(
    both: Tiers,
) -> None:
    source = put(both, 8, seed=1)
    for seed in range(2, 8):
        put(both, 8, seed)
    assert both.tiers[0].prefix(keys(8, 1)) == 0
    for hit in range(3):
        assert both.prefix(keys(8, 1)) == 8
        before = hits(both)
        done, target = get(both, 8, seed=1)
        assert all(done)
        assert np.array_equal(source, target)
        after = hits(both)
        expected = (8, 0) if hit == 2 else (0, 8)
        assert (after[0] - before[0], after[1] - before[1]) == expected
    assert both._metrics.snapshot()["promoted_pages"] == 8


def test_a_run_that_alternates_between_the_tiers_is_read_whole(both: Tiers) -> None:
    source = put(both, 12, seed=1)
    memory = both.tiers[0]
    with memory._pages.lock:
        for position in (0, 3, 4, 9):
            slot = memory._pages.index.find(keys(12, 1)[position])
            assert slot is not None
            memory._pages.index.discard(keys(12, 1)[position], slot)
    assert both.prefix(keys(13, 1)) == 12
    done, target = get(both, 13, seed=1)
    assert done == [True] * 12 + [False]
    assert np.array_equal(source, target[:12])
    assert hits(both) == (8, 4)


def test_a_page_that_is_bad_in_memory_is_served_by_the_disk(both: Tiers, shm_path: Path) -> None:
    source = put(both, 6, seed=1)
    for path in shm_path.rglob("*.slots"):
        data = bytearray(path.read_bytes())
        for start in range(0, len(data), 512):
            data[start] ^= 1
        path.write_bytes(data)
    done, target = get(both, 6, seed=1)
    assert all(done)
    assert np.array_equal(source, target)
    assert hits(both) == (0, 6)


def test_memory_is_shared_with_neighbours_and_kept_over_a_restart(
    place: list[tuple[Path, int]],
) -> None:
    first, second = (open_hierarchy_on(place, PAGE) for _ in range(2))
    source = put(first, 6, seed=1)
    assert all(get(second, 6, seed=1)[0])
    assert hits(second) == (6, 0)
    second.close()
    first.close()
    third = open_hierarchy_on(place, PAGE)
    done, target = get(third, 6, seed=1)
    assert all(done)
    assert np.array_equal(source, target)
    assert hits(third) == (6, 0)
    third.close()


def test_clear_empties_every_tier(both: Tiers) -> None:
    put(both, 6, seed=1)
    both.clear()
    assert both.prefix(keys(6, 1)) == 0
    assert [tier.page_count() for tier in both.tiers] == [0, 0]


class Far(MemoryTier):
    """A tier that is not local; ``broken``: its reads begin, and deliver nothing."""

    traits = TierTraits(local=False, written=False, promotes=False, backfills=True)
    broken = False

    def get(self, *args: Any) -> list[bool]:
        return [False] * len(args[0]) if self.broken else super().get(*args)

    def begin_get(self, *args: Any) -> Any:
        return super().begin_get(*args) or (Nothing() if self.broken else None)


class Nothing:
    """A read that delivers nothing."""

    waited = 0

    def wait(self) -> int:
        Nothing.waited += 1
        return 0


class Slow(Far):
    """It allows itself half a second per call; ``deadlines`` of its reads."""

    limit = 0.0
    deadlines: tuple[float, ...] = ()

    def get_deadline(self, page_count: int, deadline: float) -> float:
        self.limit = min(deadline, time.monotonic() + 0.5)
        return self.limit

    def begin_get(self, *args: Any) -> Any:
        self.deadlines += (args[2],)
        return super().begin_get(*args)


def planted(count: int, seed: int, **places: tuple[Tier, list[int]]) -> Any:
    """Pages of a chain, each in the tiers that are named for it."""
    source, buffers = page_memory(count, PAGE, seed=seed)
    for tier, rows in places.values():
        tier.put([keys(count, seed)[row] for row in rows], buffers.take(rows), None, soon())
    return source


def test_tiers_that_are_not_local_are_asked_in_their_order() -> None:
    here, near, far = MemoryTier(64), Far(64), Far(64)
    tiers = Tiers([here, near, far], Metrics())
    source = planted(12, 1, a=(here, [0, 1, 6]), b=(near, [2, 3, 7, 8]), c=(far, [3, 4, 5, 9, 10]))
    assert tiers.prefix(keys(12, 1)) == 11
    assert tiers.holds(keys(12, 1)) == [True] * 11 + [False]
    done, target = get(tiers, 12, seed=1)
    assert done == [True] * 11 + [False]
    assert np.array_equal(source[:11], target[:11])
    assert (target[11] == 0xA5).all()
    tiers.close()


def test_the_next_tier_is_asked_when_one_delivers_nothing() -> None:
    here, near, far = MemoryTier(64), Far(64), Far(64)
    tiers = Tiers([here, near, far], Metrics())
    source = planted(6, 1, a=(here, [0]), b=(near, [1, 2, 3]), c=(far, [1, 2, 3, 4]))
    near.broken = True
    done, target = get(tiers, 6, seed=1)
    assert done == [True] * 5 + [False]
    assert np.array_equal(source[:5], target[:5])
    far.broken = True
    assert get(tiers, 6, seed=1)[0] == [True] + [False] * 5
    tiers.close()


def test_a_read_that_has_begun_is_awaited_although_another_tier_raises() -> None:
    here, far = MemoryTier(64), Far(64)
    tiers = Tiers([here, far], Metrics())
    planted(4, 1, a=(here, [0]))
    far.broken, waited = True, Nothing.waited
    with mock.patch.object(here, "get", side_effect=TierError("planted")), pytest.raises(TierError):
        get(tiers, 4, seed=1)
    assert (
        Nothing.waited == waited + 1
    )  # or the far tier could still write into the caller's memory
    tiers.close()


def test_all_turns_of_a_call_share_the_limit_of_a_tier() -> None:
    here, far = MemoryTier(64), Slow(64)
    tiers = Tiers([here, far], Metrics())
    planted(12, 1, a=(here, [2, 3, 8]), b=(far, [0, 1, 4, 5, 9]))
    assert sum(get(tiers, 12, seed=1)[0]) == 6
    assert sum(get(tiers, 6, seed=1)[0]) == 6
    assert len(far.deadlines) >= 4
    assert set(far.deadlines[-2:]) == {far.limit}
    tiers.close()


def test_pages_of_a_tier_that_backfills_are_put_into_the_written_tiers() -> None:
    here, far = MemoryTier(64), Far(64)
    tiers = Tiers([here, far], Metrics(), backfill_bytes=PAGE)
    planted(6, 1, a=(here, [0]), b=(far, [1, 2, 3, 4, 5]))
    assert all(get(tiers, 6, seed=1)[0])
    assert wait_until(lambda: here.prefix(keys(6, 1)) == 6)
    put(tiers, 4, seed=2)
    assert here.prefix(keys(4, 2)) == 4
    assert far.holds(keys(4, 2)) == [False] * 4  # not written
    tiers.close()


def test_a_page_goes_up_only_from_a_tier_that_promotes() -> None:
    for promotes in (True, False):
        fast, slow = MemoryTier(64), MemoryTier(64)
        slow.traits = TierTraits(promotes=promotes)
        tiers = Tiers([fast, slow], Metrics())
        planted(6, 1, a=(slow, list(range(6))))
        for _ in range(2):
            assert all(get(tiers, 6, seed=1)[0])
        assert fast.page_count() == (6 if promotes else 0)
        tiers.close()


def test_pinned_pages_are_kept_in_the_fastest_tier_that_has_them() -> None:
    fast, slow = MemoryTier(4), MemoryTier(64)
    tiers = Tiers([fast, slow], Metrics())
    planted(6, 1, a=(slow, list(range(6))), b=(fast, [0, 1]))
    pins = tiers.pin(keys(7, 1))
    assert [pin[0] if pin else None for pin in pins] == [0, 0, 1, 1, 1, 1, None]
    for seed in range(2, 20):
        put(tiers, 4, seed)
    pinned = {key: pin for key, pin in zip(keys(7, 1), pins, strict=True) if pin is not None}
    assert tiers.invalidated(pinned) == []
    assert all(get(tiers, 6, seed=1)[0])
    slow.clear()
    assert tiers.invalidated(pinned) == keys(6, 1)[2:]
    tiers.unpin(list(pinned.values()))
    for seed in range(2, 20):
        put(tiers, 4, seed)
    assert fast.prefix(keys(6, 1)) == 0
    tiers.close()


def test_a_page_that_is_late_is_counted_once(both: Tiers) -> None:
    put(both, 10, seed=1)
    far = Far(64)
    shared = Tiers([*both.tiers, far], both._metrics)
    for tiers, calls in ((both, 1), (shared, 2)):
        _, buffers = page_memory(10, PAGE)
        assert not any(tiers.get(keys(10, 1), buffers, time.monotonic() - 1))
        assert both._metrics.snapshot()["read_late_pages"] == 10 * calls
        assert both._metrics.snapshot()["read_miss_pages"] == 10 * calls
