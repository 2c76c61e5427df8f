"""Change logs: the numbered changes of this node's own sets of pages, for other nodes to follow.

A log has the set of a namespace, the last changes (for POLL), and an outbox of changes not yet in Redis. All logs
share one epoch, drawn at the start and again when an outbox overflows: then all followers take a snapshot. Numbers
have no holes within an epoch. Calls never wait for other nodes.
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from flexkv_sglang.backends.fleet.replica.fingerprint_set import EMPTY, FingerprintSet
from flexkv_sglang.backends.fleet.vocabulary import CHANGE_KEYS, Change, Op, Snapshot
from flexkv_sglang.types import U64

OUTBOX_KEYS = 1 << 20
"""Limit of fingerprints that wait for Redis, per namespace (8 MiB)."""

RING_CHANGES = 4096
"""Changes kept for ``since``, per namespace: at most 16 MiB of fingerprints."""

_ENDED_MAX = 1024


class ChangeLogs:
    """The change logs of a node, by namespace. Any thread. ``outbox``: False without Redis: nothing piles up."""

    def __init__(
        self, outbox: bool = True, outbox_keys: int = OUTBOX_KEYS, ring_changes: int = RING_CHANGES
    ) -> None:
        self.outbox_keys = outbox_keys if outbox else 0
        self.ring_changes = ring_changes
        self.lock = threading.Lock()
        self.overflows = 0
        self._epoch = new_epoch()  # guarded by lock, as is everything in the logs
        self._logs: dict[str, OwnChanges] = {}
        self._ended: dict[str, int] = {}

    @property
    def epoch(self) -> int:
        """The node's epoch: 64 random bits, never 0."""
        with self.lock:
            return self._epoch

    def log(self, namespace: str) -> OwnChanges:
        """Return the log of a namespace; made at its first use."""
        with self.lock:
            found = self._logs.get(namespace)
            if found is None:
                found = OwnChanges(self, self._ended.pop(namespace, 0))
                self._logs[namespace] = found
            return found

    def find(self, namespace: str) -> OwnChanges | None:
        """Return the log of a namespace, or None if it was never used."""
        with self.lock:
            return self._logs.get(namespace)

    def namespaces(self) -> tuple[str, ...]:
        """Names of the namespaces with a log."""
        with self.lock:
            return tuple(sorted(self._logs))

    def remove(self, namespace: str) -> None:
        """Forget a namespace. If it comes back, its numbers go on with a hole, which followers notice."""
        with self.lock:
            log = self._logs.pop(namespace, None)
            if log is None:
                return
            self._ended[namespace] = log.last_locked + 1
            if len(self._ended) > _ENDED_MAX:
                self._ended.clear()
                self.renew_locked()

    def renew_locked(self) -> None:
        """Draw a new epoch and drop all kept changes; the caller holds ``lock``."""
        self._epoch = new_epoch()
        for log in self._logs.values():
            log.forget_locked()

    @property
    def epoch_locked(self) -> int:
        """As ``epoch``; the caller holds ``lock``."""
        return self._epoch


class OwnChanges:
    """This node's changes in one namespace; implements ``vocabulary.ChangeLog``. Any thread; made by ``ChangeLogs``."""

    def __init__(self, node: ChangeLogs, last: int) -> None:
        self._node = node
        self._lock = node.lock
        self._pages = FingerprintSet()  # guarded by _lock, like the rest
        self._last = last
        self._ring: deque[Change] = deque(maxlen=node.ring_changes)
        self._outbox: deque[Change] = deque()
        self._waiting = 0
        self._wake: Callable[[], None] | None = None

    def __len__(self) -> int:
        with self._lock:
            return len(self._pages)

    def add(self, fingerprints: U64) -> None:
        """Add pages. Pages that are in the set already are no change."""
        self._change(Op.ADD, fingerprints)

    def drop(self, fingerprints: U64) -> None:
        """Remove pages. Pages that are not in the set are no change."""
        self._change(Op.DROP, fingerprints)

    def clear(self) -> None:
        """Remove all pages."""
        with self._lock:
            self._pages.clear()
            self._append(Op.CLEAR, EMPTY)
            wake = self._wake
        if wake:
            wake()

    def since(self, epoch: int, last: int) -> list[Change] | None:
        """Return the changes after number ``last`` of ``epoch``; None: they are no longer kept, take a snapshot."""
        with self._lock:
            if epoch != self._node.epoch_locked or last > self._last:
                return None
            found: list[Change] = []
            for change in reversed(self._ring):
                if change.first + change.numbers <= last + 1:
                    break
                found.append(change)
            if (found[-1].first if found else self._last + 1) > last + 1:
                return None
            found.reverse()
            if found:
                found[0] = after(found[0], last)
            return found

    def snapshot(self) -> Snapshot:
        """Return all pages of now. ``fingerprints`` is shared: read only."""
        with self._lock:
            return Snapshot(self._node.epoch_locked, self._last, self._pages.snapshot())

    def listen(self, wake: Callable[[], None]) -> None:
        """Have ``wake`` called after every change, on the changing thread; it must not block."""
        with self._lock:
            self._wake = wake

    def pending(self, limit: int) -> list[Change]:
        """Return the oldest changes that are not ``published``, ``limit`` at most."""
        with self._lock:
            return [change for change, _ in zip(self._outbox, range(limit), strict=False)]

    def published(self, epoch: int, last: int) -> None:
        """Drop changes from the outbox: Redis has them up to number ``last`` of ``epoch``."""
        with self._lock:
            if epoch != self._node.epoch_locked:
                return
            while self._outbox and self._outbox[0].first <= last:
                change = self._outbox.popleft()
                self._waiting -= change.numbers
                if change.first + change.numbers > last + 1:  # grew since it was sent
                    rest = after(change, last)
                    self._outbox.appendleft(rest)
                    self._waiting += rest.numbers

    def heartbeat(self) -> Change | None:
        """Return a HEARTBEAT with the next number; None while changes wait to be published."""
        with self._lock:
            if self._outbox:
                return None
            return Change(self._node.epoch_locked, self._last + 1, Op.HEARTBEAT, EMPTY)

    @property
    def last_locked(self) -> int:
        """The last number; the caller holds the lock."""
        return self._last

    def forget_locked(self) -> None:
        """Drop all kept changes: the epoch is new. The caller holds the lock."""
        self._ring.clear()
        self._outbox.clear()
        self._waiting = 0

    def _change(self, op: Op, fingerprints: U64) -> None:
        wake = None
        for start in range(0, len(fingerprints), CHANGE_KEYS):
            some = fingerprints[start : start + CHANGE_KEYS]
            with self._lock:
                changed = self._pages.drop(some) if op is Op.DROP else self._pages.add(some)
                if len(changed):
                    self._append(op, changed)
                    wake = self._wake
        if wake:
            wake()

    def _append(self, op: Op, fingerprints: U64) -> None:
        change = Change(self._node.epoch_locked, self._last + 1, op, fingerprints)
        self._last += change.numbers
        _append_merged(self._ring, change)
        if not self._node.outbox_keys:
            return
        _append_merged(self._outbox, change)
        self._waiting += change.numbers
        if self._waiting > self._node.outbox_keys:
            self._node.overflows += 1
            self._node.renew_locked()


def new_epoch() -> int:
    """Draw 64 random bits, never 0."""
    return secrets.randbits(64) or 1


def after(change: Change, last: int) -> Change:
    """Return the part of a change that is beyond number ``last``."""
    if change.first > last or change.op in (Op.CLEAR, Op.HEARTBEAT):
        return change
    return Change(change.epoch, last + 1, change.op, change.fingerprints[last + 1 - change.first :])


def _append_merged(changes: deque[Change], change: Change) -> None:
    """Append, or lengthen the last entry: many small changes take as few entries as large ones."""
    if changes and change.op is changes[-1].op is not Op.CLEAR:
        tail = changes[-1]
        if tail.numbers + change.numbers <= CHANGE_KEYS:
            both = np.concatenate([tail.fingerprints, change.fingerprints])
            changes[-1] = Change(tail.epoch, tail.first, tail.op, both)
            return
    changes.append(change)
