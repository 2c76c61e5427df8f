"""When to ask which peer for a snapshot. Pure.

Once per peer and namespace in five seconds (after a new epoch in one second), spread by chance so that a fleet
does not ask at once, later and later while nobody answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from flexkv_sglang.backends.fleet.vocabulary import NodeId

Feed = tuple[str, NodeId]
"""(namespace, node)."""

ASK_AGAIN_S, ASK_AGAIN_MAX_S, NEW_EPOCH_S = 5.0, 30.0, 1.0
JITTER_S, JITTER_MAX_S, JITTER_NODES = 0.5, 5.0, 32


class SnapshotQueue:
    """Not thread-safe. ``now``: ``time.monotonic()`` seconds."""

    def __init__(self, random_s: Callable[[float, float], float] = random.uniform) -> None:
        self._random_s = random_s
        self._due: dict[Feed, float] = {}
        self._asked: dict[Feed, float] = {}
        self._failures: dict[Feed, int] = {}
        self._busy: set[Feed] = set()
        self._renewed: set[Feed] = set()
        self.nodes = 1

    def want(self, feed: Feed, now: float, new_epoch: bool = False) -> None:
        """Ask for it as soon as may be. ``new_epoch``: what was asked before is of no use."""
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
        """It is not wanted any more."""
        for table in (self._due, self._asked, self._failures):
            table.pop(feed, None)
        self._renewed.discard(feed)

    def take(self, now: float) -> Feed | None:
        """The one that is most overdue; until ``done`` it is not asked for again."""
        feed = min(self._due, key=self._due.__getitem__, default=None)
        if feed is None or self._due[feed] > now:
            return None
        del self._due[feed]
        self._busy.add(feed)
        self._renewed.discard(feed)
        self._asked[feed] = now
        return feed

    def done(self, feed: Feed, *, failed: bool, useless: bool = False) -> None:
        """An answer came, or none, or one that was outdated: peers keep a snapshot for a second."""
        self._busy.discard(feed)
        if useless:
            self._renewed.add(feed)
        self._failures[feed] = min(self._failures.get(feed, 0) + 1, 8) if failed else 0

    def due_in(self, now: float) -> float:
        """Seconds until the next may be asked for; at most 1."""
        return min(1.0, max(0.0, min(self._due.values(), default=now + 1.0) - now))
