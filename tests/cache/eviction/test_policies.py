"""Eviction policies: the leaf rule holds under both, and the default is not worse than LRU on other traces."""

from __future__ import annotations

import collections
import gc
import random
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from belady import optimum
from flexkv_sglang.cache.eviction.lru import Lru
from flexkv_sglang.cache.eviction.policy import EvictionPolicy
from flexkv_sglang.cache.eviction.reuse_density import ReuseDensity
from flexkv_sglang.cache.eviction.reuse_model import (
    BUCKETS,
    CLASSES,
    ReuseTimes,
    bucket_of,
    buckets_of,
)
from flexkv_sglang.cache.index.index import TierIndex
from flexkv_sglang.types import PageKey
from replay import hit_ratio

Trace = list[list[int]]


def sessions(seed: int, returning: float) -> Trace:
    """Conversations that grow turn by turn; some never come back; a system prompt before all of them."""
    rng, trace, fresh = random.Random(seed), [], 100
    open_ones: list[list[int]] = []
    for _ in range(3000):
        if open_ones and rng.random() < returning:
            talk = open_ones.pop(rng.randrange(max(0, len(open_ones) - 40), len(open_ones)))
        else:
            talk = [0, 1]
        grown = talk + list(range(fresh, fresh + rng.randint(2, 12)))
        fresh += 20
        trace.append(grown)
        if rng.random() < 0.6:
            open_ones.append(grown)
    return trace


def documents(seed: int) -> Trace:
    """Questions about documents of Zipf-like popularity: no growth, only repeats."""
    rng = random.Random(seed)
    numbers = [min(int(rng.paretovariate(0.7)), 4000) for _ in range(4000)]
    return [[100 * n + page for page in range(4 + n % 9)] for n in numbers]


def shifting(seed: int) -> Trace:
    """Pages that were popular are never asked for again from the middle on."""
    later = [[one + 10_000_000 for one in request] for request in documents(seed + 1)]
    return documents(seed) + later


def scan_beside_sessions(seed: int) -> Trace:
    """Long one-off prompts between the turns of sessions."""
    trace: Trace = []
    for number, request in enumerate(sessions(seed, 0.7)):
        trace += [request, list(range(10**8 + 100 * number, 10**8 + 100 * number + 20))]
    return trace


@pytest.mark.parametrize("capacity", [150, 1000, 5000])
@pytest.mark.parametrize(
    "trace",
    [
        pytest.param(sessions(1, 0.3), id="mostly-new"),
        pytest.param(sessions(2, 0.8), id="mostly-returning"),
        pytest.param(documents(3), id="documents"),
        pytest.param(shifting(4), id="shifting"),
        pytest.param(scan_beside_sessions(5), id="scan"),
    ],
)
def test_the_default_is_never_worse_than_lru_by_more_than_half_a_point(
    trace: Trace, capacity: int
) -> None:
    default = hit_ratio(trace, capacity, ReuseDensity(capacity))
    lru = hit_ratio(trace, capacity, Lru(capacity))
    assert lru - 0.005 <= default <= optimum(trace, capacity) + 1e-9
    assert lru <= optimum(trace, capacity) + 1e-9


def test_one_off_prompts_do_not_push_sessions_out() -> None:
    trace, capacity = scan_beside_sessions(6), 300
    lru, best = hit_ratio(trace, capacity, Lru(capacity)), optimum(trace, capacity)
    # Measured .28 of the way from LRU to the optimum for two seeds.
    assert hit_ratio(trace, capacity, ReuseDensity(capacity)) > lru + 0.2 * (best - lru)


def test_optimum_knows_the_future() -> None:
    # Two slots, three one-page prompts in turn: LRU never hits; keeping two and refusing the third is best.
    trace = [[1], [2], [3]] * 10
    assert hit_ratio(trace, 2, Lru(2)) == 0
    assert optimum(trace, 2) == (30 - 3 - 9) / 30


@pytest.mark.parametrize("make", [Lru, ReuseDensity])
def test_the_index_keeps_its_rules_under_any_policy(make: Callable[[int], EvictionPolicy]) -> None:
    rng, index = random.Random(7), TierIndex(32, make(32))
    chains = [[PageKey(bytes([chain, page]) * 16) for page in range(6)] for chain in range(20)]
    for step in range(6000):
        keys = chains[rng.randrange(20)][: rng.randint(1, 6)]
        pinned = index.pin_run(keys)
        run = len(pinned)
        other = chains[rng.randrange(20)]
        wanted = index.reserve(other, None)
        assert not set(pinned) & {slot for _, slot in wanted.victims}, "a pinned page was evicted"
        written = [slot for _, slot in wanted.granted]
        if rng.random() < 0.1:
            index.clear()
            index.abort(written)
        elif rng.random() < 0.1:
            index.abort(written)
        else:
            index.commit(written)
        index.unpin(pinned)
        slot = index.find(keys[-1])
        if slot is not None and rng.random() < 0.1:
            index.discard(keys[-1], slot)
        assert run <= len(keys)
        if step % 10 == 0:
            index.check()


def test_ghosts_of_a_page_that_comes_back_raise_its_class() -> None:
    policy = ReuseDensity(4)
    key_of = [PageKey(b"k" * 32), PageKey(b"k" * 32), PageKey(b"x" * 32), None]
    policy.used([0], key_of, bytes(4))
    policy.forget(0, PageKey(b"k" * 32))
    policy.used([1], key_of, bytes(4))
    assert policy._class[1] == 1
    policy.used([2], key_of, bytes(4))
    assert policy._class[2] == 0


@pytest.mark.parametrize("slot_count", [100, 5000])
def test_a_ghost_remembers_when_its_page_was_used(slot_count: int) -> None:
    policy = ReuseDensity(slot_count)
    key_of = [PageKey(bytes([slot]) * 32) for slot in range(100)]
    unit = 1 << policy._unit_bits
    policy.used([7], key_of, bytes(100))
    policy.forget(7, key_of[7])
    policy.used([8] * (3 * slot_count), key_of, bytes(100))  # many units of a ghost's time
    before = list(policy._reuse.observed)
    policy.used([7], key_of, bytes(100))
    counted = [n for n, was in enumerate(before) if policy._reuse.observed[n] != was]
    waited = 3 * slot_count
    assert counted in ([bucket_of(age)] for age in range(waited - unit, waited + unit + 1))


def test_lru_evicts_in_the_order_of_use_with_pinned_pages_and_new_children() -> None:
    """Against a plain list. Six chains of up to ten pages, page ``p`` of chain ``c`` in slot 10 c + p."""
    rng, policy = random.Random(8), Lru(60)
    order: list[int] = []  # slots, least recently used first
    children = [0] * 60
    seen = collections.Counter[str]()
    for step in range(4000):
        root = 10 * rng.randrange(6)
        chain = list(range(root, root + rng.randint(1, 10)))
        parts = [chain[::-1]]
        if rng.random() < 0.5:  # as when the new pages are committed from the head
            parts = [[s for s in chain[::-1] if s in order], [s for s in chain if s not in order]]
        for slot in chain[:-1]:
            children[slot] = 1
        for part in parts:
            policy.used(part, [None] * 60, children)
            order = [slot for slot in order if slot not in part] + part
        for _ in range(rng.randint(0, 6)):
            pinned = set(rng.sample(range(60), 20)) if rng.random() < 0.3 else set()
            leaves = [slot for slot in order if not children[slot]]
            expected = next((slot for slot in leaves if slot not in pinned), None)
            found = policy.victim(lambda slot, kept=frozenset(pinned): slot not in kept)  # type: ignore[misc]
            assert found == expected, step
            assert policy.offers() == set(leaves), step
            if found is None:
                continue
            seen["first" if found == order[0] else "not first"] += 1
            order.remove(found)
            policy.forget(found, PageKey(b"k" * 32))
            if found % 10:
                children[found - 1] = 0
                policy.offer(found - 1)
    assert min(seen["first"], seen["not first"]) > 100, seen


def test_the_page_used_after_the_last_victim_goes_next_only_if_no_older_leaf_has_come() -> None:
    """Slots 0, 2, 3, 1, 4, used in this order; 1 is the child of 0 and 4 the child of 3."""

    def some_leaves() -> Lru:
        policy = Lru(5)
        policy.used([0, 2, 3, 1, 4], [None] * 5, [1, 0, 0, 1, 0])
        return policy

    def discard(policy: Lru, child: int, parent: int) -> None:
        policy.forget(child, PageKey(b"k" * 32))
        policy.offer(parent)

    policy = some_leaves()
    assert policy.victim(lambda _: True) == 2
    policy.forget(2, PageKey(b"k" * 32))
    discard(policy, child=1, parent=0)  # used before the victim
    discard(policy, child=4, parent=3)  # used right after it
    assert policy.victim(lambda _: True) == 0

    policy = some_leaves()
    assert policy.victim(lambda _: True) == 2
    policy.forget(2, PageKey(b"k" * 32))
    policy.offer(0)  # their directory answers again
    policy.offer(3)
    assert policy.victim(lambda _: True) == 0

    policy = some_leaves()
    assert policy.victim(lambda _: True) == 2  # found, and not taken
    discard(policy, child=4, parent=3)
    assert policy.victim(lambda _: True) == 2


@pytest.mark.parametrize("make", [Lru, ReuseDensity])
def test_a_policy_takes_at_most_40_bytes_per_slot(make: Callable[[int], EvictionPolicy]) -> None:
    """The worst case: every page is a leaf, each is used three times over, then some are evicted."""
    slot_count = 50_000
    key_of = [PageKey(number.to_bytes(4, "little") * 8) for number in range(slot_count)]
    slots, children = list(range(slot_count)), bytes(slot_count)
    tracemalloc.start()
    try:
        policy = make(slot_count)
        for _ in range(3):
            for begin in range(0, slot_count, 10):
                policy.used(slots[begin : begin + 10], key_of, children)
        for _ in range(1000):
            found = policy.victim(lambda _: True)
            assert found is not None
            policy.forget(found, key_of[found])
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held / slot_count <= 40


def learned(slot_count: int, waits: list[int], pages: int) -> ReuseDensity:
    """Of ``pages`` pages in their first wait, as many as ``waits`` came back, at these ages."""
    policy = ReuseDensity(slot_count)
    for age in waits:
        policy._reuse.observed[bucket_of(age)] += 1
    policy._reuse.censored[bucket_of(1 << 20)] += pages - len(waits)
    policy._reuse.learn(np.zeros((CLASSES, BUCKETS)))
    return policy


def test_a_page_is_worth_most_shortly_before_it_is_likely_to_be_used() -> None:
    policy = learned(1000, [3000] * 500, 1000)
    young, ripe, late = (policy._reuse.value[0][bucket_of(age)] for age in (10, 2900, 9000))
    assert ripe > 2 * young > 0
    assert late < young


def test_waits_that_are_not_over_do_not_make_a_class_look_dead() -> None:
    """Half of the pages come back at age 3000, but most have not had the time to get there."""
    waits = ReuseTimes()
    waits.observed[bucket_of(3000)] = 100
    waits.censored[bucket_of(10_000)] = 100
    waiting = np.zeros((CLASSES, BUCKETS))
    waits.learn(waiting)
    settled = waits.value[0][bucket_of(2900)]
    waits.observed[bucket_of(3000)] = 100
    waits.censored[bucket_of(10_000)] = 100
    waiting[0, bucket_of(100)] = 10_000
    waits.learn(waiting)
    assert waits.value[0][bucket_of(2900)] == pytest.approx(settled, rel=0.05)


def test_pages_that_wait_are_counted_by_class_and_age() -> None:
    policy = ReuseDensity(100)
    key_of = [PageKey(bytes([slot]) * 32) for slot in range(100)]
    policy.used(list(range(30)), key_of, bytes(100))
    policy.used(list(range(10)), key_of, bytes(100))
    for slot in range(5, 20):
        policy.forget(slot, key_of[slot])
    waiting = policy._waiting()
    assert waiting.sum(1).tolist() == [20.0, 10.0, 0.0, 0.0]
    assert waiting[0, : bucket_of(10)].sum() == 0  # the first class has waited since before the ten


@pytest.mark.parametrize("age", [0, 1, 2, 3, 4, 5, 6, 7, 1000, 1535, 1536, 2**31, 2**40])
def test_buckets_of_ages_are_the_same_one_by_one_and_all_at_once(age: int) -> None:
    assert buckets_of(np.array([age])).tolist() == [bucket_of(age)]


def test_a_new_chain_is_declined_where_every_leaf_is_worth_more() -> None:
    """A loop over three times the capacity: LRU never hits; cached pages must stay to be of use."""
    index = TierIndex(1000, ReuseDensity(1000))
    loop = [
        [PageKey((100 * chain + page).to_bytes(4, "big") * 8) for page in range(10)]
        for chain in range(300)
    ]
    found, declined, refused = [0] * 12, [0] * 12, 0
    for turn in range(12):
        for keys in loop:
            slots = index.pin_run(keys)
            index.unpin(slots)
            found[turn] += len(slots)
            got = index.reserve(keys[len(slots) :], keys[len(slots) - 1] if slots else None)
            index.commit([slot for _, slot in reversed(got.granted)])
            declined[turn] += len(got.declined)
            refused += len(got.refused)
            assert len(slots) + len(got.granted) + len(got.declined) == len(keys)
    index.check()
    assert refused == 0
    assert declined[0] == 0  # nothing is declined before anything is learned
    assert found[-1] > 700
    assert declined[-1] > 1500


def test_nothing_is_declined_while_there_are_free_slots_or_under_lru() -> None:
    policy = learned(8, [3000] * 500, 1000)
    for index in (TierIndex(8, policy), TierIndex(8, Lru(8))):
        chain = [PageKey(bytes([page]) * 32) for page in range(12)]
        first = index.reserve(chain[:8], None)
        assert len(first.granted) == 8
        index.commit([slot for _, slot in reversed(first.granted)])
        second = index.reserve([PageKey(b"n" * 32)], None)
        assert not second.refused
        assert bool(second.declined) == (index._policy is policy)


def test_pinned_leaves_make_a_refusal_not_a_decline() -> None:
    index = TierIndex(4, learned(4, [3000] * 500, 1000))
    chain = [PageKey(bytes([page]) * 32) for page in range(4)]
    index.commit([slot for _, slot in reversed(index.reserve(chain, None).granted)])
    index.pin_run(chain)
    got = index.reserve([PageKey(b"n" * 32)], None)
    assert got.refused == [0]
    assert not got.declined


def test_a_declined_page_leaves_a_ghost_and_gets_a_slot_when_it_comes_again() -> None:
    policy = learned(8, [3000] * 10, 1000)
    for _ in range(1000):  # pages of the second class come back at once, nearly all of them
        policy._reuse.observed[1 << 6 | bucket_of(20)] += 1
    policy._reuse.learn(np.zeros((CLASSES, BUCKETS)))
    index = TierIndex(8, policy)
    chain = [PageKey(bytes([page]) * 32) for page in range(8)]
    index.commit([slot for _, slot in reversed(index.reserve(chain, None).granted)])
    new = [PageKey(b"n" * 32), PageKey(b"m" * 32)]
    assert index.reserve(new, None).declined == [0, 1]
    again = index.reserve([*new, PageKey(b"k" * 32)], None)
    assert [position for position, _ in again.granted] == [0, 1]
    assert again.declined == [2]


def test_writing_behind_a_page_is_no_use_of_it() -> None:
    policy = ReuseDensity(8)
    index = TierIndex(8, policy)
    chain = [PageKey(bytes([page]) * 32) for page in range(4)]
    index.commit([slot for _, slot in reversed(index.reserve(chain[:2], None).granted)])
    behind = index.reserve(chain[2:], chain[1])
    index.commit([slot for _, slot in reversed(behind.granted)])
    assert sum(policy._reuse.observed) == 0
    assert set(policy._class) == {0}
    index.check()


def test_a_page_counts_as_used_as_often_as_those_after_it() -> None:
    """The head's ghost is lost; that of the tail says the chain was here."""
    policy = ReuseDensity(8)
    key_of = [PageKey(bytes([page]) * 32) for page in range(8)]
    policy.used([2, 1, 0], key_of, bytes(8))
    for slot in (2, 1, 0):
        policy.forget(slot, key_of[slot])
    place = int.from_bytes(key_of[0][:4], "little") % len(policy._ghosts)
    policy._ghosts[place] = 0
    policy.used([2, 1, 0], key_of, bytes(8))
    assert list(policy._class[:3]) == [1, 1, 1]


def test_several_conversations_live_until_their_next_turn_in_a_small_cache() -> None:
    """Turns lie further apart than the capacity reaches: keeping the youngest, as LRU does, is useless."""
    rng, talks, trace, fresh = random.Random(11), [[0]] * 100, [], 10
    for _ in range(12):
        for number in rng.sample(range(100), 100):
            talks[number] = [*talks[number], fresh, fresh + 1]
            trace += [talks[number], list(range(10**8 + 10 * fresh, 10**8 + 10 * fresh + 8))]
            fresh += 2
    lru, default = hit_ratio(trace, 300, Lru(300)), hit_ratio(trace, 300, ReuseDensity(300))
    assert default > lru + 0.25 * (optimum(trace, 300) - lru)
