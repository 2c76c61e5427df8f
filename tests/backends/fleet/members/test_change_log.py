"""A node's own changes: numbers without holes, limits of the ring and the outbox."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.members.change_log import ChangeLogs, OwnChanges, after
from flexkv_sglang.backends.fleet.vocabulary import CHANGE_KEYS, Change, Op
from nodes.fleet_bed import NS, OTHER_NS, fingerprints


@pytest.fixture
def logs() -> ChangeLogs:
    return ChangeLogs(outbox_keys=2000, ring_changes=4)


def sent(log: OwnChanges) -> list[tuple[Op, int, list[int]]]:
    """Return the changes that wait to be published."""
    return [(change.op, change.first, change.fingerprints.tolist()) for change in log.pending(1000)]


def test_changes_are_numbered_without_holes_and_only_real_ones_count(logs: ChangeLogs) -> None:
    log = logs.log(NS)
    log.add(fingerprints(5, 3, 5))
    log.add(fingerprints(3, 4))
    log.drop(fingerprints(9, 3))
    log.drop(fingerprints(3))
    log.clear()
    log.add(fingerprints(5))
    assert sent(log) == [
        (Op.ADD, 1, [5, 3, 4]),
        (Op.DROP, 4, [3]),
        (Op.CLEAR, 5, []),
        (Op.ADD, 6, [5]),
    ]
    snapshot = log.snapshot()
    assert (snapshot.epoch, snapshot.last, snapshot.fingerprints.tolist()) == (logs.epoch, 6, [5])


def test_a_change_has_at_most_512_keys(logs: ChangeLogs) -> None:
    log = logs.log(NS)
    log.add(np.arange(CHANGE_KEYS + 1, dtype=np.uint64))
    for number in range(10_000, 10_100):
        log.add(fingerprints(number))
    sizes = [change.numbers for change in log.pending(10)]
    assert sizes == [512, 101]


def test_published_numbers_leave_the_outbox_also_from_a_change_that_grew(logs: ChangeLogs) -> None:
    log = logs.log(NS)
    log.add(fingerprints(1, 2))
    log.pending(10)
    log.add(fingerprints(3))
    log.published(logs.epoch, 2)
    assert sent(log) == [(Op.ADD, 3, [3])]
    log.published(logs.epoch ^ 1, 3)
    assert sent(log) == [(Op.ADD, 3, [3])]
    assert log.heartbeat() is None
    log.published(logs.epoch, 3)
    keep = log.heartbeat()
    assert keep is not None
    assert (keep.op, keep.first, keep.numbers) == (Op.HEARTBEAT, 4, 0)


def test_an_outbox_that_overflows_begins_a_new_epoch_for_all(logs: ChangeLogs) -> None:
    log, other = logs.log(NS), logs.log(OTHER_NS)
    other.add(fingerprints(1))
    epoch = logs.epoch
    log.add(np.arange(2000, dtype=np.uint64))
    assert logs.epoch == epoch
    log.add(fingerprints(5000))
    assert logs.epoch != epoch
    assert logs.overflows == 1
    assert sent(log) == sent(other) == []
    assert other.since(epoch, 1) is None
    assert log.snapshot().epoch == logs.epoch
    assert len(log) == 2001


def test_without_redis_nothing_piles_up() -> None:
    logs = ChangeLogs(outbox=False)
    logs.log(NS).add(np.arange(5000, dtype=np.uint64))
    assert sent(logs.log(NS)) == []
    assert logs.overflows == 0


def test_since_returns_kept_changes_or_none(logs: ChangeLogs) -> None:
    log = logs.log(NS)
    assert log.since(logs.epoch, 0) == []
    log.add(fingerprints(1, 2, 3))
    log.drop(fingerprints(1))
    found = log.since(logs.epoch, 2)
    assert found is not None
    assert [(change.first, change.fingerprints.tolist()) for change in found] == [
        (3, [3]),
        (4, [1]),
    ]
    assert log.since(logs.epoch, 4) == []
    assert log.since(logs.epoch, 5) is None
    assert log.since(logs.epoch ^ 1, 4) is None
    for number in range(3):
        log.add(fingerprints(10 + number))
        log.drop(fingerprints(10 + number))
    assert log.since(logs.epoch, 4) is None
    assert log.since(logs.epoch, 6) is not None


def test_a_namespace_that_comes_back_has_a_hole_in_its_numbers(logs: ChangeLogs) -> None:
    log = logs.log(NS)
    log.add(fingerprints(1, 2))
    epoch = logs.epoch
    logs.remove(NS)
    assert logs.find(NS) is None
    again = logs.log(NS)
    assert logs.epoch == epoch
    assert again.since(epoch, 2) is None
    assert again.snapshot().last == 3


def test_a_snapshot_is_not_changed_by_what_comes_later(logs: ChangeLogs) -> None:
    log = logs.log(NS)
    log.add(fingerprints(3, 1))
    snapshot = log.snapshot()
    log.drop(fingerprints(1))
    log.add(fingerprints(2))
    assert snapshot.fingerprints.tolist() == [1, 3]
    assert log.snapshot().fingerprints.tolist() == [2, 3]


def test_many_pages_come_in_pieces() -> None:
    log = ChangeLogs().log(NS)
    keys = np.random.default_rng(1).permutation(200_000).astype(np.uint64)
    for start in range(0, len(keys), 4096):
        log.add(keys[start : start + 4096])
    assert len(log) == 200_000
    assert np.array_equal(log.snapshot().fingerprints, np.arange(200_000, dtype=np.uint64))


def test_many_threads_leave_no_hole() -> None:
    logs = ChangeLogs(ring_changes=1 << 16)
    log = logs.log(NS)

    def work(base: int) -> None:
        for number in range(200):
            log.add(fingerprints(base + number))
            if number % 3 == 0:
                log.drop(fingerprints(base + number))

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    changes = log.since(logs.epoch, 0)
    assert changes is not None
    held: set[int] = set()
    following = 1
    for change in changes:
        assert change.first == following
        following += change.numbers
        held = (
            held | set(change.fingerprints.tolist())
            if change.op is Op.ADD
            else held - set(change.fingerprints.tolist())
        )
    assert held == set(log.snapshot().fingerprints.tolist())


def test_after() -> None:
    change = Change(1, 5, Op.ADD, fingerprints(1, 2, 3))
    assert after(change, 4) is change
    assert after(change, 6).fingerprints.tolist() == [3]
    assert after(change, 6).first == 7
