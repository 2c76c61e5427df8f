"""The invariants of ``TierIndex``, spelled out. For tests, the crash campaign and the soak."""

from __future__ import annotations

from flexkv_sglang.cache.index.index import FOUND, TierIndex
from flexkv_sglang.types import FREE, NO_SLOT, READY


def check_index(index: TierIndex) -> None:
    """Assert every invariant. O(slots). The caller holds the engine's lock."""
    children = [0] * index.slot_count
    for slot in index._keys.slots().tolist():
        assert index._keys.get(index._keys[slot]) == slot, f"slot {slot} and its key disagree"
        assert index._state[slot] in FOUND, f"key in slot {slot}, state {index._state[slot]}"
        parent = index.parent_slot(slot)
        if parent != NO_SLOT:
            assert index._state[parent] in FOUND, f"slot {slot} has a dead parent {parent}"
            children[parent] += 1
    named = sum(state in FOUND for state in index._state)
    assert named == len(index._keys), f"{named} slots have a key, {len(index._keys)} are found"
    assert index._ready_count == sum(state == READY for state in index._state)
    offers = index._policy.offers()
    for slot in range(index.slot_count):
        counted = index._links.children[slot]
        assert children[slot] == counted, f"slot {slot} counts {counted} children"
        free = index._free_slots.is_free(slot)
        assert free == (index._state[slot] == FREE), f"slot {slot} leaks or is free in use"
        if index._state[slot] == FREE:
            assert index._pins[slot] == 0, f"slot {slot} is free but pinned"
        leaf = index._state[slot] == READY and children[slot] == 0
        if leaf and index._free_slots.is_open(slot):
            assert slot in offers, f"leaf {slot} cannot be found for eviction"
