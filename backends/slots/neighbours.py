"""Pages of other owners in the same directory and namespace, found by following their journals.

There is no service and no shared memory, only files. Nothing protects a neighbour's slot, so every read is
followed by ``still_valid``, which reads the journal's tail again (the idea of a seqlock): the owner appends the
tombstone *before* it rewrites a slot, so a torn read implies a tombstone that the second look sees. The
page's checksum is verified as well. Until both have passed, everything here is a hint.

Threads: any. One lock guards what the journals say; it is held for dict work. Files are read by ``scan_directory``,
``poll_directory`` and ``still_valid`` only, without that lock: they may hang. Lookups are memory only.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.io.transfer import Extents, IoMode
from flexkv_sglang.backends.slots.following.choice import Choice
from flexkv_sglang.backends.slots.following.neighbour_journal import (
    NeighbourJournal,
    NeighbourPage,
)
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.errors import JournalError, TierUnavailableError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

_LOAD_TRIES = 3

Observer = Callable[[bool, list[PageKey]], None]
"""(present now, keys). A key may be reported again without a change."""


class NeighbourStore:
    """All neighbours of this process in a list of (directory, how to read there)."""

    def __init__(
        self,
        places: Sequence[tuple[Path, IoMode]],
        namespace: str,
        payload_bytes: int,
        own: Iterable[str],
        accepted: frozenset[ChecksumKind],
        observer: Observer | None = None,
    ) -> None:
        """``observer`` is called for every page that appears or vanishes, under the lock."""
        self._accepted = accepted
        self._observer = observer
        self._departed: list[PageKey] = []  # of owners that were dropped; guarded by _lock
        self._places = list(places)
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._own = frozenset(own)
        self._choices = {directory: Choice() for directory, _ in places}
        self._lock = threading.Lock()
        self._journals: dict[tuple[Path, str], NeighbourJournal] = {}  # guarded by _lock
        self._reading = {directory: threading.Lock() for directory, _ in places}  # one poller each
        self._log = RateLimitedLog(logger, math.inf)  # each reason once

    def __len__(self) -> int:
        """Pages that neighbours claim to hold (a page held twice counts twice)."""
        with self._lock:
            return sum(len(journal) for journal in self._journals.values())

    @property
    def neighbour_count(self) -> int:
        """Owners whose journals are followed."""
        return len(self._journals)

    @property
    def directories(self) -> list[Path]:
        """Where it looks."""
        return [directory for directory, _ in self._places]

    def scan(self) -> None:
        """Look for new owners in every directory and load their journals. One thread at a time."""
        for directory, _ in self._places:
            self.scan_directory(directory)

    def scan_directory(self, directory: Path) -> None:
        """Look for new owners in one directory and load their journals. One thread at a time per directory."""
        (mode,) = (mode for place, mode in self._places if place == directory)
        try:
            names = owners(directory)
        except FileNotFoundError:
            names = []  # no pages of this namespace there
        except OSError as exc:
            kind = directory, str(exc)
            self._log.log(kind, logging.WARNING, "flexkv: cannot list %s: %s", directory, exc)
            names = []
        known = {owner for place, owner in list(self._journals) if place == directory} | self._own
        unknown = [owner for owner in names if owner not in known]
        for owner in self._choices[directory].of(directory, unknown, len(self._journals)):
            self._load(directory, owner, mode)
        self.poll_directory(directory)
        with self._lock:
            departed, self._departed = self._departed, []
            self._report(
                [(False, key) for key in departed]
            )  # ``_report`` looks whether another owner has it by now

    def poll(self) -> None:
        """Follow the journals of the owners that are known."""
        for directory, _ in self._places:
            self.poll_directory(directory)

    def poll_directory(self, directory: Path) -> None:
        """Follow the journals in one directory."""
        with self._reading[directory]:
            for place, journal in list(self._journals.items()):
                if place[0] == directory:
                    self._poll(place, journal)

    def _poll(self, place: tuple[Path, str], journal: NeighbourJournal) -> None:
        with self._lock:
            if journal.dropped:
                return
            journal.leases += 1  # its descriptors stay open
        followed = journal.poll(self._lock)
        with self._lock:
            journal.leases -= 1
            if not followed and not journal.dropped:
                self._drop(place)
            if journal.events:
                events, journal.events = journal.events, []
                self._report(events)
            self._close_if_unused(journal)

    def bypass(self, directory: Path) -> None:
        """Forget the owners in a directory that hangs; a later scan finds them again. Memory only."""
        with self._lock:
            for place in [place for place in self._journals if place[0] == directory]:
                self._drop(place)

    def find(self, keys: Sequence[PageKey]) -> list[NeighbourPage]:
        """Claims on the leading run of ``keys``. Takes a lease on every journal named: give them to ``release``."""
        found: list[NeighbourPage] = []
        with self._lock:
            for key in keys:
                page = self._find_locked(key)
                if page is None:
                    break
                page.journal.leases += 1
                found.append(page)
        return found

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: does a neighbour claim it?"""
        with self._lock:
            return [self._find_locked(key) is not None for key in keys]

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of the leading run of keys that neighbours claim. Memory only."""
        with self._lock:
            if not self._journals:
                return 0
            for count, key in enumerate(keys):
                if self._find_locked(key) is None:
                    return count
        return len(keys)

    def still_valid(self, pages: Sequence[NeighbourPage]) -> list[bool]:
        """The second look: per page, whether the bytes just read are those that were claimed."""
        for directory in dict.fromkeys(page.journal.directory for page in pages):
            self.poll_directory(directory)
        return self.confirmed(pages)

    def confirmed(self, pages: Sequence[NeighbourPage]) -> list[bool]:
        """The same, from what is known. Memory only: the directories must have been polled since the read."""
        with self._lock:
            return [page.journal.confirms(page) for page in pages]

    def forget(self, pages: Sequence[NeighbourPage]) -> None:
        """Drop pages whose bytes were bad, until their owner records them again."""
        with self._lock:
            for page in pages:
                page.journal.forget(page)

    def release(self, pages: Sequence[NeighbourPage]) -> None:
        """Give back the leases of ``find``."""
        with self._lock:
            for page in pages:
                page.journal.leases -= 1
                self._close_if_unused(page.journal)

    def close(self) -> None:
        """Close all journals. Idempotent."""
        with self._lock:
            for key in list(self._journals):
                self._drop(key)

    @staticmethod
    def extents(pages: Sequence[NeighbourPage]) -> Extents:
        """Files, offsets and modes of claimed pages, as ``PageTransfer`` takes them."""
        files = [page.journal.slots for page in pages]
        offsets = [
            page.slot * file.slot_class.slot_bytes for page, file in zip(pages, files, strict=True)
        ]
        return (
            np.array([file.fd for file in files], np.int32),
            np.array(offsets, np.uint64),
            tuple(file.mode for file in files),
        )

    def _load(self, directory: Path, owner: str, mode: IoMode) -> None:
        for _ in range(_LOAD_TRIES):  # the owner may start a new generation while we read
            try:
                journal = NeighbourJournal(
                    directory,
                    owner,
                    self._namespace,
                    self._payload_bytes,
                    mode,
                    self._accepted,
                    observed=self._observer is not None,
                )
            except FileNotFoundError:
                continue
            except (JournalError, TierUnavailableError, OSError) as exc:
                text = "flexkv: owner %s in %s is not readable (yet): %s"
                kind = directory, owner, str(exc)
                self._log.log(kind, logging.INFO, text, owner, directory, exc)
                return
            with self._lock:
                self._journals[directory, owner] = journal
            logger.info("flexkv: neighbour %s in %s: %d pages", owner, directory, len(journal))
            return

    def _find_locked(self, key: PageKey) -> NeighbourPage | None:
        for journal in self._journals.values():
            page = journal.find(key)
            if page is not None:
                return page
        return None

    def _report(self, events: list[tuple[bool, PageKey]]) -> None:
        """Tell the observer, in order, which of these keys are present now."""
        if self._observer is None or not events:
            return
        now = [(self._find_locked(key) is not None, key) for _, key in events]
        for present, group in groupby(now, key=itemgetter(0)):
            self._observer(present, [key for _, key in group])

    def _drop(self, key: tuple[Path, str]) -> None:
        journal = self._journals.pop(key)
        journal.dropped = True
        if self._observer is not None:  # it may be back at the next scan
            self._departed += journal.keys()
        self._close_if_unused(journal)

    @staticmethod
    def _close_if_unused(journal: NeighbourJournal) -> None:
        if journal.dropped and journal.leases == 0:
            journal.close()  # read only: closing waits for nothing
