"""Follower: keeps the copy of one peer's set of pages in one namespace up to date. Pure.

Only (epoch, number) of a change counts: never the order of arrival, never ids of the stream. Changes may be lost,
repeated or exchanged on the way: a follower knows that it has all of them up to a number, or it wants a snapshot.
``SnapshotQueue`` says when to fetch one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.members.change_log import after
from flexkv_sglang.backends.fleet.vocabulary import Change, NodeId, Op, Snapshot
from flexkv_sglang.types import U64

Feed = tuple[str, NodeId]
"""(namespace, node)."""

HINT_S = 1.8
"""A peer's old set stays in use for this long after its restart, while a snapshot is under way; upkeep makes it 2 s."""

PARKED_CHANGES = 1024
"""Limit of changes kept while a snapshot is under way (4 MiB). The oldest are dropped: a gap, so another snapshot."""

ASK_AGAIN_S, ASK_AGAIN_MAX_S, NEW_EPOCH_S = 5.0, 30.0, 1.0
JITTER_S, JITTER_MAX_S, JITTER_NODES = 0.5, 5.0, 32


@dataclass(frozen=True, slots=True)
class Reset:
    """Replace the set."""

    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Apply:
    """Change the set: ADD, DROP or CLEAR."""

    op: Op
    fingerprints: U64


@dataclass(frozen=True, slots=True)
class Forget:
    """Stop using the set."""


Step = Reset | Apply | Forget


class Follower:
    """Turns news of a peer into steps for the copy of its set. Not thread-safe; has no copy itself.

    States: *waiting* for a snapshot (``wants_snapshot``), or following. ``last``: number up to which the copy is
    right. ``known``: the highest number seen. ``has_set``: there is a copy, perhaps an outdated one. ``pages``: its
    size. ``now``: ``time.monotonic()`` seconds.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.last = 0
        self.known = 0
        self.has_set = False
        self.wants_snapshot = True
        self.pages = 0
        self._hint_until: float | None = None
        self._parked: deque[Change] = deque(maxlen=PARKED_CHANGES)

    @property
    def behind(self) -> int:
        """Number of changes that exist and are not in the copy."""
        return max(0, self.known - self.last)

    def announced(self, epoch: int, now: float) -> None:
        """Take the peer's epoch, from the list of members."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        self.last = self.known = 0
        self.wants_snapshot = True
        self._parked.clear()
        if self.has_set:
            self._hint_until = now + HINT_S

    def changed(self, change: Change) -> list[Step]:
        """Take an entry of the peer's feed."""
        if change.epoch != self.epoch:
            return []  # the next heartbeat shows which of the two is right
        end = change.first + change.numbers - 1
        self.known = max(self.known, end)
        if end <= self.last and change.op is not Op.HEARTBEAT:
            return []
        if self.wants_snapshot:
            return self._park(change)
        if change.first > self.last + 1:
            self.wants_snapshot = True
            return self._park(change)
        if change.op is Op.HEARTBEAT:
            return []
        return [self._apply(after(change, self.last))]

    def answered(self, snapshot: Snapshot) -> list[Step]:
        """Take a snapshot, unless it is of another epoch or older than the copy."""
        if snapshot.epoch != self.epoch or not self.wants_snapshot:
            return []
        if self.has_set and self._hint_until is None and snapshot.last < self.last:
            return []
        steps: list[Step] = [Reset(snapshot)]
        self.has_set, self.wants_snapshot, self._hint_until = True, False, None
        self.last, self.pages = snapshot.last, len(snapshot.fingerprints)
        self.known = max(self.known, self.last)
        parked = sorted(self._parked, key=lambda change: change.first)
        self._parked.clear()
        for change in parked:
            steps += self.changed(change)
        self.wants_snapshot |= self.last < self.known
        return steps

    def gap(self) -> list[Step]:
        """Want a snapshot: the peer no longer keeps the changes after ``last``."""
        self.wants_snapshot = True
        return []

    def invalidate(self) -> list[Step]:
        """Forget the copy and want a snapshot: it contains pages that the peer does not have."""
        self.wants_snapshot = True
        return self._forget()

    def tick(self, now: float) -> list[Step]:
        """Forget an old set whose time is over."""
        if self._hint_until is not None and now >= self._hint_until:
            return self._forget()
        return []

    def _park(self, change: Change) -> list[Step]:
        if change.op is Op.HEARTBEAT:
            return []
        self._parked.append(change)
        return self._forget() if change.op is Op.CLEAR else []

    def _apply(self, change: Change) -> Step:
        self.last += change.numbers
        if change.op is Op.CLEAR:
            self.pages = 0
        else:
            self.pages += (
                len(change.fingerprints) if change.op is Op.ADD else -len(change.fingerprints)
            )
        return Apply(change.op, change.fingerprints)

    def _forget(self) -> list[Step]:
        self._hint_until = None
        had_set, self.has_set, self.pages = self.has_set, False, 0
        return [Forget()] if had_set else []


class SnapshotQueue:
    """Says when to fetch which snapshot. Not thread-safe. ``now``: ``time.monotonic()`` seconds.

    A feed's snapshot is fetched once in 5 seconds (after a new epoch once a second), and less often while the peer
    fails. A random delay keeps a fleet from asking at once. ``nodes``: size of the fleet.
    """

    def __init__(self, random_s: Callable[[float, float], float] = random.uniform) -> None:
        self._random_s = random_s
        self._due: dict[Feed, float] = {}
        self._asked: dict[Feed, float] = {}
        self._failures: dict[Feed, int] = {}
        self._busy: set[Feed] = set()
        self._renewed: set[Feed] = set()
        self.nodes = 1

    def want(self, feed: Feed, now: float, new_epoch: bool = False) -> None:
        """Queue a snapshot. ``new_epoch``: one that is under way will be useless."""
        if new_epoch:
            self._failures.pop(feed, None)
            self._renewed.add(feed)
        if feed in self._busy or (feed in self._due and not new_epoch):
            return
        pause = (
            NEW_EPOCH_S
            if feed in self._renewed
            else ASK_AGAIN_S * 2.0 ** self._failures.get(feed, 0)
        )
        soonest = self._asked.get(feed, now - 1e9) + min(pause, ASK_AGAIN_MAX_S)
        jitter = JITTER_S
        if self.nodes > JITTER_NODES:
            jitter = min(JITTER_MAX_S, self.nodes / 20.0)
        self._due[feed] = max(now, soonest) + self._random_s(0.0, jitter)

    def forget(self, feed: Feed) -> None:
        """Remove a feed."""
        for table in (self._due, self._asked, self._failures):
            table.pop(feed, None)
        self._renewed.discard(feed)

    def take(self, now: float) -> Feed | None:
        """Remove and return the most overdue feed, or None; it is not queued again before ``done``."""
        feed = min(self._due, key=self._due.__getitem__, default=None)
        if feed is None or self._due[feed] > now:
            return None
        del self._due[feed]
        self._busy.add(feed)
        self._renewed.discard(feed)
        self._asked[feed] = now
        return feed

    def done(self, feed: Feed, *, failed: bool, useless: bool = False) -> None:
        """End a fetch. ``useless``: the answer was outdated; peers keep a snapshot for a second, so ask again soon."""
        self._busy.discard(feed)
        if useless:
            self._renewed.add(feed)
        self._failures[feed] = min(self._failures.get(feed, 0) + 1, 8) if failed else 0

    def due_in(self, now: float) -> float:
        """Seconds until a snapshot may be due; at most 1."""
        return min(1.0, max(0.0, min(self._due.values(), default=now + 1.0) - now))
