"""One peer's set of pages in one namespace, followed by its numbered changes: what to do with each. Pure.

Only (epoch, number) counts: never the order of arrival, never ids of the stream. Whatever is lost, repeated or
exchanged on the way, a follower either knows that it has everything up to a number, or it wants a snapshot.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.members.change_log import after
from flexkv_sglang.backends.fleet.vocabulary import Change, Op, Snapshot
from flexkv_sglang.types import U64

HINT_S = 1.8
"""After a peer's restart its old set is used for this long while a snapshot is under way: two seconds, with upkeep."""

PARKED_CHANGES = 1024
"""Changes kept while a snapshot is under way (4 MiB at most). The oldest go first: a gap, so another snapshot."""


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
    """Use the set no more."""


Step = Reset | Apply | Forget


class Follower:
    """States: *waiting* for a snapshot (``wants_snapshot``), or following. Not thread-safe, holds no set itself.

    ``last``: number up to which the set is right. ``held``: there is a set, perhaps an outdated one.
    ``now``: ``time.monotonic()`` seconds.
    """

    def __init__(self) -> None:
        self.epoch: int | None = None
        self.last = 0
        self.known = 0
        self.held = False
        self.wants_snapshot = True
        self.pages = 0
        self._hint_until: float | None = None
        self._parked: deque[Change] = deque(maxlen=PARKED_CHANGES)

    @property
    def behind(self) -> int:
        """Changes that are known to exist and are not in the set."""
        return max(0, self.known - self.last)

    def announced(self, epoch: int, now: float) -> list[Step]:
        """The peer's epoch, from the list of members."""
        if epoch == self.epoch:
            return []
        self.epoch = epoch
        self.last = self.known = 0
        self.wants_snapshot = True
        self._parked.clear()
        if self.held:
            self._hint_until = now + HINT_S
        return []

    def changed(self, change: Change) -> list[Step]:
        """An entry of the peer's feed."""
        if change.epoch != self.epoch:
            return []  # the next beat shows which of the two is right
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
        """A snapshot came. One of another epoch, or older than the set, is of no use."""
        if snapshot.epoch != self.epoch or not self.wants_snapshot:
            return []
        if self.held and self._hint_until is None and snapshot.last < self.last:
            return []
        steps: list[Step] = [Reset(snapshot)]
        self.held, self.wants_snapshot, self._hint_until = True, False, None
        self.last, self.pages = snapshot.last, len(snapshot.fingerprints)
        self.known = max(self.known, self.last)
        parked = sorted(self._parked, key=lambda change: change.first)
        self._parked.clear()
        for change in parked:
            steps += self.changed(change)
        self.wants_snapshot |= self.last < self.known
        return steps

    def gap(self) -> list[Step]:
        """The peer has not kept what comes after ``last``."""
        self.wants_snapshot = True
        return []

    def invalidate(self) -> list[Step]:
        """What the set says is not so."""
        self.wants_snapshot = True
        return self._forget()

    def tick(self, now: float) -> list[Step]:
        """Time passes."""
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
        held, self.held, self.pages = self.held, False, 0
        return [Forget()] if held else []
