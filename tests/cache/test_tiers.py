"""Two tiers as one: written through, read from the fastest, promoted on the second hit, kept over restarts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.cache.tiers import Tiers
from stores.engines import keys, open_hierarchy_on, page_memory, soon

PAGE = 8192


@pytest.fixture
def place(tmp_path: Path, shm_path: Path) -> list[tuple[Path, int]]:
    return [(shm_path, 16 * PAGE), (tmp_path, 128 * PAGE)]


@pytest.fixture
def both(place: list[tuple[Path, int]]) -> Iterator[Tiers]:
    hierarchy = open_hierarchy_on(place, PAGE)
    yield hierarchy
    hierarchy.check()
    hierarchy.close()


def put(hierarchy: Tiers, count: int, seed: int) -> Any:
    source, buffers = page_memory(count, PAGE, seed=seed)
    assert hierarchy.put(keys(count, seed), buffers, None, soon()) == [True] * count
    return source


def get(hierarchy: Tiers, count: int, seed: int) -> tuple[list[bool], Any]:
    target, buffers = page_memory(count, PAGE)
    return hierarchy.get(keys(count, seed), buffers, soon()), target


def hits(hierarchy: Tiers) -> tuple[int, int]:
    counters = hierarchy._metrics.snapshot()
    return counters.get("tier0_hit_pages", 0), counters.get("tier1_hit_pages", 0)


def test_pages_are_written_to_both_and_read_from_memory(both: Tiers) -> None:
    source = put(both, 10, seed=1)
    assert [tier.page_count() for tier in both.tiers] == [10, 10]
    done, target = get(both, 10, seed=1)
    assert all(done)
    assert np.array_equal(source, target)
    assert hits(both) == (10, 0)


def test_what_memory_evicted_comes_from_the_disk_and_is_promoted_on_its_second_hit(
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
