"""PeerSetsReader: a rank process's view of the pages of other nodes. Memory only; no lock shared with the writer.

``refresh`` takes in changes of nodes and sets. Changes of a set's pages need no refresh: they are in memory that is
shared with the agent. A result is a hint: the read at the peer decides.

Threads: any. One lock serialises ``refresh``; lookups use the view of the last one without a lock. Call ``refresh``
at least once a second, also when idle: a view keeps the memory of replaced sets.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.fleet.replica.files import (
    SLOTS,
    UP,
    Entry,
    Peer,
    PeersTable,
    SetIndex,
    SetPlace,
    open_set,
)
from flexkv_sglang.backends.fleet.replica.fingerprint_set import Parts, parts_hold
from flexkv_sglang.backends.fleet.vocabulary import Op
from flexkv_sglang.types import U64, BoolArray

_OPENED_PER_REFRESH, _PAGES_PER_REFRESH = 16, 1_000_000
"""Limit of sets, and of their pages, mapped per ``refresh`` (a million pages take 1 ms). The next maps the others."""

_LOOK_NS = 100_000_000  # pause before another look for missing files
_RETRY_NS = 10_000_000  # pause before another look at a set that was being changed
_QUIET_NS = 1_000_000_000  # a table without heartbeats for this long may have been replaced
_AHEAD_NS = 1_000_000_000  # a heartbeat of the future is of another boot
_NO_VERSIONS, _NO_GENERATIONS = bytes(4 * SLOTS), bytes(8 * SLOTS)


@dataclass(frozen=True, slots=True)
class _PeerPages:
    """A node that is up, and its pages."""

    peer: Peer
    parts: Parts

    def holds_one(self, fp: int) -> bool:
        base, changes = self.parts
        latest = changes.latest_one(fp)
        return latest == Op.ADD or (not latest and base.holds_one(fp))

    def leading(self, fingerprints: U64) -> int:
        """Number of leading ``fingerprints`` that are in the set."""
        found = parts_hold(self.parts, fingerprints)
        return len(fingerprints) if found.all() else int(found.argmin())


class PeerSetsReader:
    """Pages of other nodes in one namespace, as this node's agent wrote them.

    There are no peers while ``run_dir`` or its table is missing, or the agent's last heartbeat is more than ``ttl_s``
    seconds ago.
    """

    def __init__(self, run_dir: Path | str, namespace: str, ttl_s: float) -> None:
        self._run_dir = Path(run_dir)
        self._directory = self._run_dir / namespace
        self._ttl_ns = int(ttl_s * 1e9)
        self._lock = threading.Lock()
        # guarded by _lock; read without it by look-ups: _table, _index, _peers, _view
        self._table: PeersTable | None = None
        self._index: SetIndex | None = None
        self._entries: dict[int, Entry] = {}
        self._sets: dict[int, tuple[SetPlace, Parts]] = {}
        self._peers: tuple[Peer, ...] = ()
        self._view: tuple[_PeerPages, ...] = ()
        self._look_at_ns = 0
        self._retry_at_ns = 0
        self._forget()
        self._last_slot = -1  # of the last answer; a hint, written by any thread

    def refresh(self) -> None:
        """Take in new nodes and sets. A few us if nothing changed, a few ms at most."""
        with self._lock:
            now = time.monotonic_ns()
            self._follow_table(now)
            if self._table is not None:
                changed = self._follow_entries(self._table)
                changed |= self._follow_sets(self._table, now)
                if changed:
                    self._make_view()

    @property
    def alive(self) -> bool:
        """Was there a heartbeat of the agent within ``ttl_s``?"""
        table = self._table
        if table is None:
            return False
        age = time.monotonic_ns() - table.heartbeat_ns
        return -_AHEAD_NS <= age <= self._ttl_ns

    def peers(self) -> Sequence[Peer]:
        """The nodes that are up, with or without pages in this namespace."""
        return self._peers if self.alive else ()

    def run(self, fingerprints: U64, skip: Callable[[Peer], bool]) -> tuple[Peer, int] | None:
        """Return the peer with the longest leading run of ``fingerprints`` (uint64 ``[n]``), and the run's length.

        None: no peer has the first. Of equal peers it is the last answer again. ``skip`` is called only for nodes
        that have the first page.
        """
        if not len(fingerprints) or not self.alive:
            return None
        first = int(fingerprints[0])
        holders = [pages for pages in self._view if pages.holds_one(first)]
        if len(holders) > 1:
            holders.sort(key=lambda pages: pages.peer.slot != self._last_slot)
        best, length = None, 0
        for pages in holders:
            if (length and not pages.holds_one(int(fingerprints[length]))) or skip(pages.peer):
                continue
            leading = pages.leading(fingerprints)
            if leading > length:
                best, length = pages.peer, leading
            if length == len(fingerprints):
                break
        if best is None:
            return None
        self._last_slot = best.slot
        return best, length

    def holds(self, fingerprints: U64, skip: Callable[[Peer], bool]) -> BoolArray:
        """For each of ``fingerprints`` (uint64 ``[n]``): does any peer have it?"""
        answer = np.zeros(len(fingerprints), np.bool_)
        for pages in self._view if self.alive else ():
            if skip(pages.peer):
                continue
            open_rows = np.flatnonzero(~answer)
            if not len(open_rows):
                break
            answer[open_rows] = parts_hold(pages.parts, fingerprints[open_rows])
        return answer

    def page_count(self) -> int:
        """Number of pages of all peers in this namespace; a page of two peers counts twice."""
        index = self._index
        if index is None or not self.alive:
            return 0
        return sum(index.pages[pages.peer.slot] for pages in self._view)

    def close(self) -> None:
        """Release all maps. ``refresh`` would open them again."""
        with self._lock:
            self._table = None
            self._forget()

    def _forget(self) -> None:
        """Forget the contents of a table."""
        self._index, self._namespaces = None, -1
        self._versions, self._generations = _NO_VERSIONS, _NO_GENERATIONS
        self._entries, self._sets = {}, {}
        self._peers, self._view = (), ()

    def _follow_table(self, now: int) -> None:
        """Open the table, or the one that has replaced it."""
        table = self._table
        retired = table is not None and table.retired
        if table is not None and not retired and now - table.heartbeat_ns < _QUIET_NS:
            return
        if not retired and now < self._look_at_ns:
            return
        self._look_at_ns = now + _LOOK_NS
        found = PeersTable.open(self._run_dir)
        if found is not None and (table is None or found.writer != table.writer):
            self._forget()
            self._table = found

    def _follow_entries(self, table: PeersTable) -> bool:
        """Take in changed entries. An entry that is being written is read again at the next refresh."""
        versions = table.versions()
        if versions == self._versions:
            return False
        before = np.frombuffer(self._versions, np.uint32)
        seen = np.frombuffer(versions, np.uint32).copy()
        for slot in np.flatnonzero(seen != before).tolist():
            entry = table.entry(slot)
            if entry is None:
                seen[slot] = before[slot]
                continue
            seen[slot] = entry.version
            if entry.state == UP:
                self._entries[slot] = entry
            else:
                self._entries.pop(slot, None)
            self._generations = _NO_GENERATIONS  # the tenancy may be new: look at all sets again
        self._versions = seen.tobytes()
        return True

    def _follow_sets(self, table: PeersTable, now: int) -> bool:
        """Map new sets and drop removed ones. A missing set is looked for again."""
        namespaces = table.namespaces
        if self._index is None and self._namespaces != namespaces:
            self._index = SetIndex.open(self._directory, table.writer)
            self._namespaces = namespaces
        if self._index is None or now < self._retry_at_ns:
            return False
        generations = self._index.generations()
        if generations == self._generations:
            return False
        missing, opened, pages = False, 0, 0
        current = np.frombuffer(generations, np.uint64).tolist()
        for slot in [slot for slot in self._sets if slot not in self._entries or not current[slot]]:
            del self._sets[slot]
        for slot, entry in self._entries.items():
            place = SetPlace(self._directory, slot, entry.tenancy, current[slot])
            known = self._sets.get(slot)
            if not place.generation or (known and known[0] == place):
                continue
            if opened == _OPENED_PER_REFRESH or pages >= _PAGES_PER_REFRESH:
                return True
            opened += 1
            parts = open_set(place)
            pages += len(parts[0]) if parts is not None else 0
            if parts is None:  # replaced meanwhile, or its entry is newer than ours
                missing = True
            else:
                self._sets[slot] = place, parts
        if missing:
            self._retry_at_ns = now + _RETRY_NS
        else:
            self._generations = generations
        return True

    def _make_view(self) -> None:
        entries = [self._entries[slot] for slot in sorted(self._entries)]
        self._peers = tuple(entry.peer for entry in entries)
        view = []
        for entry in entries:
            known = self._sets.get(entry.peer.slot)
            if known is not None and known[0].tenancy == entry.tenancy:
                view.append(_PeerPages(entry.peer, known[1]))
        self._view = tuple(view)
