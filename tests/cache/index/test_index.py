"""The rules of TierIndex one by one; any order of calls is tests/cache/index/test_index_model.py."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv_sglang.backends.slots.journal import keys_field
from flexkv_sglang.cache.eviction.lru import Lru
from flexkv_sglang.cache.index.index import TierIndex
from flexkv_sglang.types import PageKey, SlotId
from stores.engines import keys


def filled(slot_count: int, *chains: list[PageKey]) -> TierIndex:
    """An index with these chains READY, the first one the least recently used."""
    index = TierIndex(slot_count, Lru(slot_count))
    for chain in chains:
        store(index, chain)
    return index


def store(index: TierIndex, chain: list[PageKey], parent: PageKey | None = None) -> list[PageKey]:
    """Reserve and commit; the keys of the victims."""
    reserved = index.reserve(chain, parent)
    assert not reserved.refused
    index.commit([slot for _, slot in reserved.granted])
    index.check()
    return [key for key, _ in reserved.victims]


def load(index: TierIndex, chain: list[PageKey], slots: list[int], parents: list[int]) -> list[int]:
    """``index.load`` of lists."""
    return index.load(keys_field(chain), np.array(slots), np.array(parents))


def test_a_page_being_written_is_known_but_not_found() -> None:
    index = TierIndex(4, Lru(4))
    (key,) = keys(1)
    index.reserve([key], None)
    assert index.holds(key)
    assert index.find(key) is None
    assert index.prefix([key]) == 0
    assert index.pin_run([key]) == []


def test_slots_are_given_out_in_order_so_that_a_chain_is_one_run_on_disk() -> None:
    index = TierIndex(8, Lru(8))
    assert [slot for _, slot in index.reserve(keys(5), None).granted] == [0, 1, 2, 3, 4]


def test_least_recently_used_leaf_goes_first_and_never_a_page_with_a_child() -> None:
    old, young = keys(3, seed=1), keys(3, seed=2)
    index = filled(6, old, young)
    assert store(index, keys(2, seed=3)) == [old[2], old[1]]
    assert index.prefix(old) == 1
    assert index.prefix(young) == 3


def test_use_protects() -> None:
    old, young = keys(3, seed=1), keys(3, seed=2)
    index = filled(6, old, young)
    index.unpin(index.pin_run(old))
    assert store(index, keys(1, seed=3)) == [young[2]]


def test_asking_is_not_using() -> None:
    old, young = keys(3, seed=1), keys(3, seed=2)
    index = filled(6, old, young)
    index.prefix(old)
    index.find(old[0])
    assert store(index, keys(1, seed=3)) == [old[2]]


def test_pinned_pages_are_never_victims_and_the_rest_of_a_batch_is_refused() -> None:
    mine = keys(2, seed=1)
    index = filled(3, mine)
    pinned = index.pin_run(mine)
    reserved = index.reserve(keys(3, seed=2), None)
    assert [position for position, _ in reserved.granted] == [0]
    assert reserved.refused == [1, 2]
    index.abort([slot for _, slot in reserved.granted])
    index.unpin(pinned)
    index.check()


def test_a_batch_never_evicts_its_own_pages() -> None:
    chain = keys(4)
    index = filled(3, chain[:3])
    reserved = index.reserve(chain, None)
    assert reserved.granted == []
    assert reserved.victims == []
    assert reserved.refused == [3]


def test_a_parent_known_to_the_caller_is_not_evicted_for_its_child() -> None:
    chain = keys(3)
    index = filled(2, chain[:2])
    assert index.reserve([chain[2]], chain[1]).refused == [0]


def test_a_page_being_written_protects_its_parent() -> None:
    chain = keys(2)
    index = filled(2, chain[:1])
    index.reserve([chain[1]], chain[0])
    assert index.reserve(keys(1, seed=9), None).refused == [0]


def test_a_page_with_a_child_is_offered_no_more_though_it_was_not_used() -> None:
    old, young = keys(2, seed=1), keys(1, seed=2)
    index = filled(3, old[:1], young)
    store(index, old[1:], old[0])  # the child of what was the oldest leaf, and more recent than all
    assert store(index, keys(1, seed=3)) == young


def test_abort_gives_the_slots_back() -> None:
    index = TierIndex(2, Lru(2))
    for _ in range(5):
        reserved = index.reserve(keys(2), None)
        index.abort([slot for _, slot in reserved.granted])
        index.check()
    assert not index.holds(keys(1)[0])


def test_a_discarded_page_is_gone_at_once_but_its_slot_only_after_the_last_reader() -> None:
    (key,) = keys(1)
    index = filled(1, [key])
    slots = index.pin_run([key])
    assert index.discard(key, slots[0])
    assert index.find(key) is None
    assert index.reserve(keys(1, seed=2), None).refused == [0]
    index.unpin(slots)
    assert len(index.reserve(keys(1, seed=2), None).granted) == 1
    index.check()


def test_discard_of_a_slot_that_holds_something_else_by_now_does_nothing() -> None:
    first, second = keys(1, seed=1), keys(1, seed=2)
    index = filled(1, first)
    store(index, second)
    assert not index.discard(first[0], SlotId(0))
    assert index.find(second[0]) == 0


def test_clear_dooms_what_is_in_use_and_it_comes_back() -> None:
    ready, writing = keys(1, seed=1), keys(1, seed=2)
    index = filled(3, ready)
    pinned = index.pin_run(ready)
    reserved = [slot for _, slot in index.reserve(writing, None).granted]
    index.clear()
    assert len(index) == 0
    assert index.still_writing(reserved) == [False]
    assert len(index.reserve(keys(3, seed=3), None).refused) == 2
    index.abort(reserved)
    index.unpin(pinned)
    index.check()


def test_unpin_without_pin_is_a_bug_that_is_said() -> None:
    index = filled(1, keys(1))
    with pytest.raises(AssertionError, match="not pinned"):
        index.unpin([SlotId(0)])


def test_load_keeps_order_links_and_the_first_of_two_pages_with_one_key() -> None:
    chain = keys(3)
    index = TierIndex(8, Lru(8))
    assert load(index, [*chain, chain[0]], [5, 1, 7, 2], [-1, 5, 1, -1]) == [3]
    index.check()
    assert [index.find(key) for key in chain] == [5, 1, 7]
    assert index.parent_slot(7) == 1
    slots = [slot for _, slot in index.reserve(keys(5, seed=2), None).granted]
    assert sorted(slots) == [0, 2, 3, 4, 6]
    reserved = index.reserve(keys(1, seed=3), None)
    assert reserved.victims == [(chain[2], 7)], "the leaf, though its parent is older"


def test_links_to_nonsense_are_dropped_when_loading() -> None:
    index = TierIndex(4, Lru(4))
    load(index, keys(3), [0, 1, 2], [0, 99, 3])
    index.check()
    assert [index.parent_slot(slot) for slot in (0, 1, 2)] == [-1, -1, -1]


def test_after_a_directory_came_back_the_oldest_leaf_goes_first_again() -> None:
    """The page used right after the last victim is not the oldest when leaves are offered again."""
    chain = keys(4)
    index = TierIndex(3, Lru(3))
    granted = index.reserve(chain, None, frozenset([2])).granted
    index.commit([slot for _, slot in granted])  # head, its child, a root: used in this order
    assert index.reserve(keys(1, seed=1), None).victims == [(chain[1], granted[1][1])]
    index.suspend(0)
    index.resume(0)
    reserved = index.reserve(keys(1, seed=2), None)
    assert [key for key, _ in reserved.victims] == [chain[0]]


def test_an_index_without_slots_refuses_everything() -> None:
    index = TierIndex(0, Lru(0))
    assert index.reserve(keys(2), None).refused == [0, 1]
    index.check()


def test_leaf_heap_stays_bounded_under_touching() -> None:
    chain = keys(4)
    index = filled(4, chain)
    for _ in range(3000):
        index.unpin(index.pin_run(chain))
    assert sum(map(len, index._policy._queues)) <= 2 * 4 + 1024
    index.check()


def test_a_parent_that_is_named_in_its_own_batch_does_no_harm() -> None:
    index = TierIndex(4, Lru(4))
    chain = keys(2)
    assert len(index.reserve(chain, chain[0]).granted) == 2
