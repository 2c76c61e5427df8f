"""A follower against a model: for every behaviour of the feed it ends with exactly the peer's set."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flexkv_sglang.backends.fleet.members.change_log import ChangeLogs
from flexkv_sglang.backends.fleet.members.follower import (
    HINT_S,
    PARKED_CHANGES,
    Apply,
    Follower,
    Forget,
    Reset,
    Step,
)
from flexkv_sglang.backends.fleet.vocabulary import Change, Op, Snapshot
from nodes.fleet_bed import NS, fingerprints

KEYS = st.lists(st.integers(0, 20), min_size=1, max_size=6)


class Replica:
    """The copy that results from a follower's steps; None: there is none."""

    def __init__(self) -> None:
        self.pages: set[int] | None = None

    def take(self, steps: list[Step]) -> None:
        for step in steps:
            if isinstance(step, Reset):
                self.pages = set(step.snapshot.fingerprints.tolist())
            elif isinstance(step, Forget):
                assert self.pages is not None
                self.pages = None
            else:
                assert self.pages is not None, "a change to no set"
                keys = set(step.fingerprints.tolist())
                if step.op is Op.ADD:
                    assert not keys & self.pages, "applied twice"
                    self.pages |= keys
                elif step.op is Op.DROP:
                    assert keys <= self.pages, "applied twice"
                    self.pages -= keys
                else:
                    self.pages = set()


class FeedMachine(RuleBasedStateMachine):
    """The owner is a real change log; its oracle is a Python set of its own. The wire loses, repeats, exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.truth: set[int] = set()
        self.start_owner()
        self.follower = Follower()
        self.replica = Replica()
        self.wire: list[Change] = []
        self.old: list[Snapshot] = []

    def start_owner(self) -> None:
        self.logs = ChangeLogs(outbox_keys=40, ring_changes=8)
        self.log = self.logs.log(NS)
        self.log.add(fingerprints(*self.truth))

    # the owner

    @rule(keys=KEYS)
    def add(self, keys: list[int]) -> None:
        self.log.add(fingerprints(*keys))
        self.truth |= set(keys)

    @rule(keys=KEYS)
    def drop(self, keys: list[int]) -> None:
        self.log.drop(fingerprints(*keys))
        self.truth -= set(keys)

    @rule()
    def clear(self) -> None:
        self.log.clear()
        self.truth = set()

    @rule()
    def restart_owner(self) -> None:
        self.start_owner()

    @rule(count=st.integers(1, 5))
    def publish(self, count: int) -> None:
        changes = self.log.pending(count)
        if changes:
            self.wire += changes
            self.log.published(changes[-1].epoch, changes[-1].first + changes[-1].numbers - 1)

    @rule(count=st.integers(1, 5))
    def publish_and_hear_nothing_of_it(self, count: int) -> None:
        self.wire += self.log.pending(count)

    @rule()
    def keep(self) -> None:
        keep = self.log.heartbeat()
        if keep is not None:
            self.wire.append(keep)

    # the wire

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        self.wire.pop(data.draw(st.integers(0, len(self.wire) - 1)))

    @precondition(lambda self: self.wire)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        self.wire.append(self.wire[data.draw(st.integers(0, len(self.wire) - 1))])

    @precondition(lambda self: len(self.wire) > 1)
    @rule(data=st.data())
    def exchange(self, data: st.DataObject) -> None:
        at = data.draw(st.integers(0, len(self.wire) - 2))
        self.wire[at : at + 2] = self.wire[at + 1], self.wire[at]

    # the follower

    @rule(count=st.integers(1, 8))
    def deliver(self, count: int) -> None:
        for change in self.wire[:count]:
            self.replica.take(self.follower.changed(change))
        del self.wire[:count]

    @rule()
    def heartbeat(self) -> None:
        self.follower.announced(self.logs.epoch, self.now)

    @rule()
    def poll(self) -> None:
        if self.follower.epoch is None or self.follower.wants_snapshot:
            return
        changes = self.log.since(self.follower.epoch, self.follower.last)
        if changes is None:
            self.replica.take(self.follower.gap())
        for change in changes or ():
            self.replica.take(self.follower.changed(change))

    @rule()
    def build_snapshot(self) -> None:
        self.old.append(self.log.snapshot())

    @rule()
    def snapshot_comes(self) -> None:
        if self.old:
            self.replica.take(self.follower.answered(self.old.pop(0)))

    @rule()
    def catch_up(self) -> None:
        """Do a heartbeat and a fresh snapshot in one rule, or the interesting states are seldom reached."""
        self.heartbeat()
        if self.follower.wants_snapshot:
            self.replica.take(self.follower.answered(self.log.snapshot()))

    @rule(keys=KEYS)
    def add_and_publish(self, keys: list[int]) -> None:
        self.add(keys)
        self.publish(1)

    @rule()
    def invalidate(self) -> None:
        self.replica.take(self.follower.invalidate())

    @rule(seconds=st.sampled_from([0.5, 3.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.replica.take(self.follower.tick(self.now))

    # what must hold

    @invariant()
    def pages_are_counted(self) -> None:
        held = self.replica.pages
        assert self.follower.has_set == (held is not None)
        assert self.follower.pages == len(held or ())

    @invariant()
    def who_is_up_to_date_has_exactly_that(self) -> None:
        now = self.log.snapshot()
        follower = self.follower
        if (
            not follower.wants_snapshot
            and follower.epoch == now.epoch
            and follower.last == now.last
        ):
            assert self.replica.pages == self.truth

    def teardown(self) -> None:
        """Lose nothing from now on: after both heartbeats, and a snapshot if wanted, the copy is right."""
        self.publish(1 << 20)
        self.deliver(1 << 20)
        self.heartbeat()
        self.keep()
        self.deliver(1 << 20)
        if self.follower.wants_snapshot:
            self.replica.take(self.follower.answered(self.log.snapshot()))
        assert not self.follower.wants_snapshot
        assert self.replica.pages == self.truth
        assert self.follower.behind == 0


TestFeed = FeedMachine.TestCase


def followed(last: int = 0) -> Follower:
    """A follower of epoch 7 with pages 0 to ``last - 1``."""
    follower = Follower()
    follower.announced(7, 0.0)
    follower.answered(Snapshot(7, last, np.arange(last, dtype=np.uint64)))
    return follower


def test_only_the_new_part_of_an_overlap_is_applied() -> None:
    follower = followed(3)
    (step,) = follower.changed(Change(7, 2, Op.ADD, fingerprints(1, 2, 3, 4)))
    assert isinstance(step, Apply)
    assert step.fingerprints.tolist() == [3, 4]
    assert follower.changed(Change(7, 2, Op.ADD, fingerprints(1, 2, 3, 4))) == []


def test_a_snapshot_of_another_epoch_is_no_use() -> None:
    follower = Follower()
    follower.announced(7, 0.0)
    assert follower.answered(Snapshot(8, 3, fingerprints(1, 2, 3))) == []
    assert follower.wants_snapshot


def test_a_heartbeat_shows_how_many_changes_are_missing() -> None:
    follower = followed(3)
    follower.changed(Change(7, 4, Op.HEARTBEAT, fingerprints()))
    assert not follower.wants_snapshot
    follower.changed(Change(7, 6, Op.HEARTBEAT, fingerprints()))
    assert follower.wants_snapshot
    assert follower.behind == 2
    follower.answered(Snapshot(7, 4, fingerprints(1, 2, 3, 4)))
    assert follower.wants_snapshot  # 5 is still missing


def test_an_old_set_is_a_hint_for_two_seconds() -> None:
    follower = followed(3)
    follower.announced(8, 10.0)
    assert follower.has_set
    assert follower.tick(10.0 + HINT_S - 0.1) == []
    assert follower.tick(10.0 + HINT_S) == [Forget()]
    assert follower.tick(100.0) == []


def test_a_snapshot_in_time_replaces_the_hint() -> None:
    follower = followed(3)
    follower.announced(8, 10.0)
    snapshot = Snapshot(8, 1, fingerprints(9))
    assert follower.answered(snapshot) == [Reset(snapshot)]
    assert follower.tick(100.0) == []
    assert follower.has_set


def test_changes_that_came_before_the_snapshot_follow_it() -> None:
    follower = Follower()
    follower.announced(7, 0.0)
    for number in (2, 3, 4):
        assert follower.changed(Change(7, number, Op.ADD, fingerprints(number))) == []
    steps = follower.answered(Snapshot(7, 2, fingerprints(1, 2)))
    assert [step.fingerprints.tolist() for step in steps[1:] if isinstance(step, Apply)] == [
        [3],
        [4],
    ]
    assert follower.last == 4
    assert not follower.wants_snapshot


def test_clear_empties_even_a_set_that_waits() -> None:
    follower = followed(3)
    follower.changed(Change(7, 9, Op.ADD, fingerprints(9)))
    assert follower.wants_snapshot
    assert follower.has_set
    assert follower.changed(Change(7, 10, Op.CLEAR, fingerprints())) == [Forget()]


def test_a_snapshot_older_than_the_set_is_no_use() -> None:
    follower = followed(5)
    follower.changed(Change(7, 9, Op.ADD, fingerprints(9)))
    assert follower.answered(Snapshot(7, 4, fingerprints(1, 2, 3, 4))) == []
    assert follower.wants_snapshot


def test_parked_changes_are_bounded_and_their_loss_is_noticed() -> None:
    follower = Follower()
    follower.announced(7, 0.0)
    for number in range(1, PARKED_CHANGES + 11):
        follower.changed(Change(7, number, Op.ADD, fingerprints(number)))
    follower.answered(Snapshot(7, 5, fingerprints(1, 2, 3, 4, 5)))  # 6 to 10 are gone
    assert follower.wants_snapshot
    assert follower.behind == PARKED_CHANGES + 5
    follower.answered(Snapshot(7, PARKED_CHANGES + 10, np.arange(1000, dtype=np.uint64)))
    assert not follower.wants_snapshot
