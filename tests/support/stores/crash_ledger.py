"""Events that a child acknowledged before it was killed, and the pages that its successor must find.

The ledger is an append-only file of 16-byte events, one ``write`` each, made before an operation begins
and after it returned; SIGKILL cannot take back what is in the page cache. ``Judge`` reads it between two
lives. It knows nothing of the engine: only which keys were acknowledged and what could have removed them.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

EVENT = struct.Struct("<BBHIQ")  # kind, thread, count, first key, mask or number


class Kind(IntEnum):
    """Kind of an event."""

    READY = 1  # adopted and open; number: READY pages
    SEEN = 2  # mask: which of ``count`` keys from ``first`` on were served right after the start
    CHECKED = 3  # every page was looked at; number: pages compared
    PUT_BEGIN = 4
    PUT_END = 5  # mask: acknowledged keys
    CLEAR_BEGIN = 6
    CLEAR_END = 7
    WRONG = 8  # first: a key that was served with other bytes
    REFUSED = 9  # number: pages that failed their checksum
    LITTER = 10  # number: files that no process will ever use or remove
    OVERSIZE = 11  # number: bytes of slot files beyond the quota
    CLOSED = 12


class Ledger:
    """The writing side. Threads: any (O_APPEND, one write per event)."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def note(
        self, kind: Kind, first: int = 0, count: int = 0, number: int = 0, thread: int = 0
    ) -> None:
        """Append one event."""
        os.write(self._fd, EVENT.pack(kind, thread, count, first, number))

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass
class Verdict:
    """Sums over all lives; ``lost``, ``wrong``, ``undead``, ``refused``, ``litter``, ``oversize`` must be 0."""

    starts: int = 0
    checked: int = 0
    acknowledged: int = 0
    clears: int = 0
    lost: int = 0  # acknowledged, nothing removed it, not found
    wrong: int = 0  # other bytes than were put
    undead: int = 0  # found after an acknowledged clear without a later put
    refused: int = 0  # a commit record whose bytes do not match
    litter: int = 0
    oversize: int = 0
    closed: int = 0

    def bad(self) -> int:
        """Findings of any kind."""
        return self.lost + self.wrong + self.undead + self.refused + self.litter + self.oversize


@dataclass
class Judge:
    """Follows one ledger. ``keys``: size of the key universe. ``slots``: pages the tier can hold.

    ``lossless``: the tier is larger than the universe, so nothing is ever evicted and every acknowledged
    page must come back. Else at least as many pages as fit, less ``in_flight`` (evicted, not yet replaced).
    ``clears_all``: no page lies with a neighbour that ``clear`` does not reach. ``cut_max``: pages that a start
    may lose because its quota is smaller than the one before.
    """

    keys: int
    slots: int
    in_flight: int
    lossless: bool
    clears_all: bool = True
    cut_max: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    held: set[int] = field(default_factory=set)
    gone: set[int] = field(default_factory=set)
    _offset: int = 0
    _open: dict[int, tuple[range, bool]] = field(default_factory=dict)
    _clearing: set[int] | None = None  # keys that will be gone when the running clear has returned
    _seen: set[int] = field(default_factory=set)

    def wiped(self) -> None:
        """The directory was emptied between two lives."""
        self.held.clear()
        self.gone.clear()

    def read(self, path: Path) -> None:
        """Judge the events since the last call. The writer must be dead."""
        with path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        whole = len(data) // EVENT.size * EVENT.size
        self._offset += whole
        for kind, thread, count, first, number in EVENT.iter_unpack(data[:whole]):
            self._event(Kind(kind), thread, range(first, first + count), number)
        self._open.clear()
        self._clearing = None

    def _event(self, kind: Kind, thread: int, keys: range, number: int) -> None:
        verdict = self.verdict
        if kind in (Kind.PUT_BEGIN, Kind.PUT_END):
            self._put(kind, thread, keys, number)
        elif kind in (Kind.CLEAR_BEGIN, Kind.CLEAR_END):
            self._clear(kind)
        elif kind is Kind.READY:
            verdict.starts += 1
            self._seen.clear()
            if not self.lossless:
                least = min(self.slots, len(self.held)) - self.in_flight
                verdict.lost += max(0, least - number)
        elif kind is Kind.SEEN:
            self._seen.update(key for i, key in enumerate(keys) if number >> i & 1)
        elif kind is Kind.CHECKED:
            verdict.checked += number
            self._compare()
        else:
            name = kind.name.lower()
            setattr(verdict, name, getattr(verdict, name) + max(1, number))

    def _compare(self) -> None:
        if self.lossless:
            self.verdict.lost += max(0, len(self.held - self._seen) - self.cut_max)
        if self.clears_all:
            self.verdict.undead += len(self._seen & self.gone)
        self.held = set(self._seen)  # committed beyond doubt: must be there the next time as well
        self.gone -= self._seen

    def _put(self, kind: Kind, thread: int, keys: range, mask: int) -> None:
        if kind is Kind.PUT_BEGIN:
            self._open[thread] = keys, self._clearing is None
            self.gone.difference_update(keys)
            if self._clearing is not None:
                self._clearing.difference_update(keys)
            return
        _, certain = self._open.pop(thread)
        acknowledged = [key for i, key in enumerate(keys) if mask >> i & 1]
        self.verdict.acknowledged += len(acknowledged)
        if certain:  # no clear can have come after the commit
            self.held.update(acknowledged)

    def _clear(self, kind: Kind) -> None:
        if kind is Kind.CLEAR_BEGIN:
            self.held.clear()
            self._clearing = set(range(self.keys))
            for thread, (keys, _) in self._open.items():
                self._open[thread] = keys, False
                self._clearing.difference_update(keys)
        elif self._clearing is not None:
            self.verdict.clears += 1
            self.gone |= self._clearing
            self._clearing = None
