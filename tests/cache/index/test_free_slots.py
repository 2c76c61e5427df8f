"""FreeSlots: runs of neighbouring slots first, spread over the open regions, never one slot twice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.cache.index.free_slots import FreeSlots


def runs(slots: list[int]) -> int:
    """Number of runs of consecutive numbers."""
    ordered = np.sort(slots)
    return 1 + int((np.diff(ordered) != 1).sum()) if len(ordered) else 0


def test_a_call_gets_one_run_where_there_is_one() -> None:
    free = FreeSlots([1000])
    assert free.take(128) == list(range(128))
    assert free.take(128) == list(range(128, 256))


def test_a_hole_of_the_right_size_is_used_whole() -> None:
    free = FreeSlots([100])
    free.take(100)
    for slot in [3, 17, *range(40, 60), 99]:
        free.give(slot)
    assert free.take(20) == list(range(40, 60))
    assert sorted(free.take(20)) == [3, 17, 99]


def test_a_call_is_spread_over_the_regions_in_one_run_each() -> None:
    free = FreeSlots([100, 100, 100])
    slots = free.take(60)
    assert [sum(s // 100 == region for s in slots) for region in range(3)] == [20, 20, 20]
    assert runs(slots) == 3


def test_single_pages_take_turns() -> None:
    free = FreeSlots([100, 100])
    assert len({free.region_of(free.take(1)[0]) for _ in range(2)}) == 2


def test_a_region_with_too_little_is_made_up_for() -> None:
    free = FreeSlots([3, 100, 0])
    assert len(free.take(50)) == 50
    assert len(free.take(100)) == 53


def test_a_closed_region_gives_nothing_but_takes_back() -> None:
    free = FreeSlots([4, 4])
    slots = free.take(8)
    free.close(0)
    for slot in slots:
        free.give(slot)
    assert sorted(free.take(8)) == [4, 5, 6, 7]
    free.reopen(0)
    assert sorted(free.take(8)) == [0, 1, 2, 3]


def test_giving_a_free_slot_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="free twice"):
        FreeSlots([4]).give(2)


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30)), max_size=40),
)
def test_every_slot_has_one_owner(counts: list[int], steps: list[tuple[bool, int]]) -> None:
    free, taken = FreeSlots(counts), set[int]()
    for give, amount in steps:
        if give:
            for slot in sorted(taken)[:: max(1, amount)]:
                taken.remove(slot)
                free.give(slot)
        else:
            got = free.take(amount)
            assert len(got) == min(amount, sum(counts) - len(taken))
            assert not taken & set(got)
            assert len(set(got)) == len(got)
            taken |= set(got)
    assert [s for s in range(sum(counts)) if free.is_free(s)] == [
        s for s in range(sum(counts)) if s not in taken
    ]
