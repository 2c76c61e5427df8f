"""The set of fingerprints against Python's, with changes, merges, odd spreads and damaged memory."""

from __future__ import annotations

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.replica.fingerprint_set import (
    EMPTY,
    HEADS_PER_RECORD,
    ChangeTable,
    FingerprintSet,
    SortedBase,
    in_memory,
    merged,
    record_count,
)
from flexkv_sglang.backends.fleet.vocabulary import Op
from flexkv_sglang.types import U64

EXTREMES = (0, 1, 2, (1 << 64) - 1, 1 << 63, (1 << 63) - 1)


def array(*fingerprints: int) -> U64:
    return np.array(fingerprints, np.uint64)


def spread(rng: np.random.Generator, count: int) -> U64:
    return rng.integers(0, 1 << 64, count, dtype=np.uint64)


def kinds(rng: np.random.Generator) -> dict[str, U64]:
    """Pools of fingerprints: evenly spread, all in one bucket, all in one chain, at the ends."""
    return {
        "spread": spread(rng, 5000),
        "close": np.arange(7, 4007, dtype=np.uint64),
        "one chain": (spread(rng, 90) >> np.uint64(24) << np.uint64(24)),
        "ends": np.concatenate([array(*EXTREMES), spread(rng, 60)]),
    }


@pytest.mark.parametrize("kind", ["spread", "close", "one chain", "ends"])
def test_all_operations_are_those_of_a_set(kind: str) -> None:
    rng = np.random.default_rng(5)
    pool, pages, model = kinds(rng)[kind], FingerprintSet(), set[int]()
    for _ in range(60 if kind == "one chain" else 300):
        some = rng.choice(pool, rng.integers(0, 60))
        turn = rng.random()
        if turn < 0.65:
            new = pages.add(some).tolist()
            assert sorted(new) == sorted(set(some.tolist()) - model)
            model.update(new)
        elif turn < 0.99:
            gone = pages.drop(some).tolist()
            assert sorted(gone) == sorted(set(some.tolist()) & model)
            model.difference_update(gone)
        elif turn < 0.992:
            pages.clear()
            model.clear()
        asked = rng.choice(pool, 128)
        assert pages.holds(asked).tolist() == [fp in model for fp in asked.tolist()]
        assert len(pages) == len(model)
    assert pages.snapshot().tolist() == sorted(model)
    pages.rebase()
    assert pages.snapshot().tolist() == sorted(model)


def test_one_and_many_are_answered_alike() -> None:
    rng = np.random.default_rng(6)
    pool = np.unique(spread(rng, 40_000))
    base, changes = in_memory(pool[::2])
    changes.append(Op.ADD, rng.choice(pool[1::2], 700, replace=False))
    changes.append(Op.DROP, rng.choice(pool, 300, replace=False))
    asked = rng.choice(pool, 4000)
    assert base.holds(asked).tolist() == [base.holds_one(fp) for fp in asked.tolist()]
    latest_both(changes, asked)


def test_new_fingerprints_are_returned_once_and_in_order() -> None:
    pages = FingerprintSet(array(5))
    assert pages.add(array(9, 5, 3, 9, 1, 3)).tolist() == [9, 3, 1]
    assert pages.drop(array(1, 4, 9, 1)).tolist() == [1, 9]


def test_a_snapshot_does_not_change_later() -> None:
    pages = FingerprintSet(array(1, 2))
    before = pages.snapshot()
    pages.add(array(3))
    pages.clear()
    assert before.tolist() == [1, 2]


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000, 70_000])
def test_a_base_of_any_size(count: int) -> None:
    fingerprints = np.unique(spread(np.random.default_rng(count), count))
    base = SortedBase(fingerprints)
    others = np.setdiff1d(
        np.unique(np.concatenate([fingerprints + np.uint64(1), array(*EXTREMES)])), fingerprints
    )
    assert base.holds(fingerprints).all()
    assert not base.holds(others).any()


def test_changes_that_do_not_fit_are_folded_in_at_once() -> None:
    fingerprints = np.unique(spread(np.random.default_rng(7), 5000))
    pages = FingerprintSet()
    pages.add(fingerprints)
    assert len(fingerprints) > record_count(0)
    assert pages.snapshot().tolist() == fingerprints.tolist()
    pages.drop(fingerprints)
    assert len(pages) == len(pages.snapshot()) == 0


def test_the_last_change_counts() -> None:
    fingerprints, added = array(5, 7, 5, 7, 5, 8), np.array([True, False, False, True, True, False])
    assert merged(array(6, 7, 8), fingerprints, added).tolist() == [5, 6, 7]
    assert merged(EMPTY, fingerprints, added).tolist() == [5, 7]


def table(records: int = 1024, salt: int = 3) -> tuple[ChangeTable, np.ndarray, U64]:
    heads, rows = np.zeros(records * HEADS_PER_RECORD, np.uint32), np.zeros((records, 2), np.uint64)
    return ChangeTable(heads, rows, salt), heads, rows


def latest_both(changes: ChangeTable, fingerprints: U64) -> list[int]:
    """Look up one by one, and all at once (enough for the vectorised way)."""
    single = [changes.latest_one(fp) for fp in fingerprints.tolist()]
    for before in (False, True):
        for times in (1, 40):
            held = np.full(len(fingerprints) * times, before)
            changes.amend(np.repeat(fingerprints, times), held)
            expected = [before if not op else op == Op.ADD for op in single]
            assert held.tolist() == np.repeat(expected, times).tolist()
    return single


@pytest.mark.parametrize("word", [0, 1])
@pytest.mark.parametrize("bit", [0, 7, 31, 33, 34, 63])
def test_a_half_written_record_is_not_there(word: int, bit: int) -> None:
    changes, _, rows = table()
    fingerprints = array(10, 11)
    changes.append(Op.ADD, fingerprints)
    rows[0, word] ^= np.uint64(1 << bit)
    assert latest_both(changes, fingerprints) == [0, Op.ADD]


def test_a_record_that_no_chain_leads_to_is_not_there() -> None:
    changes, heads, _ = table()
    changes.append(Op.ADD, array(10))
    heads[10] = 0
    assert latest_both(changes, array(10)) == [0]


def test_a_record_of_another_file_is_not_there() -> None:
    changes, heads, rows = table(salt=3)
    changes.append(Op.ADD, array(10))
    assert latest_both(ChangeTable(heads, rows, 4), array(10)) == [0]


def test_damaged_chains_end() -> None:
    rng = np.random.default_rng(8)
    changes, heads, rows = table()
    fingerprints = spread(rng, 1000)
    changes.append(Op.ADD, fingerprints)
    for _ in range(50):
        heads[:] = rng.integers(0, 1 << 32, len(heads), dtype=np.uint32)
        rows[rng.integers(0, 1024, 100)] = spread(rng, 200).reshape(100, 2)
        latest_both(changes, fingerprints[:40])
    loop = array(5, 5 + len(heads))
    changes, heads, rows = table()
    changes.append(Op.ADD, loop)  # the second leads to the first; now the other way round
    heads[5] = 1
    other = ChangeTable(np.array(heads), np.array(rows[::-1]), 3)
    assert latest_both(other, array(5, 5 + 2 * len(heads))) == [0, 0]
