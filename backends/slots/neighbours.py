"""NeighbourStore: pages of other owners in the same directory and namespace, found by tailing their journals.

No service, no shared memory: reading files. A neighbour's slot is protected by nothing, so every read is
followed by ``still_valid``, which tails the journal again (the idea of a seqlock): the owner appends the
tombstone *before* it rewrites a slot, so a torn read implies a tombstone that the second look sees. The
page's checksum is verified as well. Everything here is a hint until both have passed.

Threads: any. One lock guards the replicas; it is held for dict work and for reading the tail of a file
that lies in the page cache (0.5 us), never while loading a whole journal.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.io.transfer import Extents, IoMode
from flexkv_sglang.backends.slots.neighbour import NeighbourJournal, NeighbourPage
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.errors import JournalError, TierUnavailableError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

_POLL_INTERVAL_S = 0.001
_LOAD_TRIES = 3


Observer = Callable[[bool, list[PageKey]], None]
"""(are they there now?, keys). A key may be told again without having changed."""


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
        """``observer`` is told of every page that appears or vanishes, under the lock."""
        self._accepted = accepted
        self._observer = observer
        self._departed: list[PageKey] = []  # of owners that were dropped; guarded by _lock
        self._places = list(places)
        self._namespace = namespace
        self._payload_bytes = payload_bytes
        self._own = frozenset(own)
        self._lock = threading.Lock()
        self._replicas: dict[tuple[Path, str], NeighbourJournal] = {}  # guarded by _lock
        self._polled_at = 0.0  # guarded by _lock
        self._log = RateLimitedLog(logger, math.inf)  # each reason once

    def __len__(self) -> int:
        """Pages that neighbours claim to hold (a page held twice counts twice)."""
        with self._lock:
            return sum(len(replica) for replica in self._replicas.values())

    @property
    def neighbour_count(self) -> int:
        """Owners that are tailed."""
        return len(self._replicas)

    def scan(self) -> None:
        """Look for new owners and load their journals. Called at start and by the engine's tail thread alone."""
        for directory, mode in self._places:
            try:
                names = owners(directory)
            except FileNotFoundError:
                continue  # nobody has pages of this namespace there
            except OSError as exc:
                kind = directory, str(exc)
                self._log.log(kind, logging.WARNING, "flexkv: cannot list %s: %s", directory, exc)
                continue
            for owner in names:
                if owner not in self._own and (directory, owner) not in self._replicas:
                    self._load(directory, owner, mode)
        with self._lock:
            self._poll_locked()
            departed, self._departed = self._departed, []
            self._told([(False, key) for key in departed])  # unless another has it by now

    def poll(self) -> None:
        """Follow the journals of the owners that are known."""
        with self._lock:
            self._poll_locked()

    def find(self, keys: Sequence[PageKey]) -> list[NeighbourPage]:
        """Claims on the leading run of ``keys``. Takes a lease on every replica named: give them to ``release``."""
        found: list[NeighbourPage] = []
        with self._lock:
            self._poll_if_due()
            for key in keys:
                page = self._find_locked(key)
                if page is None:
                    break
                page.replica.leases += 1
                found.append(page)
        return found

    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: does a neighbour claim it?"""
        with self._lock:
            self._poll_if_due()
            return [self._find_locked(key) is not None for key in keys]

    def prefix(self, keys: Sequence[PageKey]) -> int:
        """Length of the leading run of keys that neighbours claim. Memory only."""
        with self._lock:
            self._poll_if_due()
            if not self._replicas:
                return 0
            for count, key in enumerate(keys):
                if self._find_locked(key) is None:
                    return count
        return len(keys)

    def still_valid(self, pages: Sequence[NeighbourPage]) -> list[bool]:
        """The second look: per page, whether the bytes just read are those that were claimed."""
        with self._lock:
            self._poll_locked()
            return [page.replica.confirms(page) for page in pages]

    def forget(self, pages: Sequence[NeighbourPage]) -> None:
        """These turned out bad: do not claim them again until their owner says something new."""
        with self._lock:
            for page in pages:
                page.replica.forget(page)

    def release(self, pages: Sequence[NeighbourPage]) -> None:
        """Give back the leases of ``find``."""
        with self._lock:
            for page in pages:
                page.replica.leases -= 1
                self._close_if_unused(page.replica)

    def close(self) -> None:
        """Drop all replicas. Idempotent."""
        with self._lock:
            for key in list(self._replicas):
                self._drop(key)

    @staticmethod
    def extents(pages: Sequence[NeighbourPage]) -> Extents:
        """Files, offsets and modes of claimed pages, as ``PageTransfer`` takes them."""
        files = [page.replica.slots for page in pages]
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
                replica = NeighbourJournal(
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
                self._replicas[directory, owner] = replica
            logger.info("flexkv: neighbour %s in %s: %d pages", owner, directory, len(replica))
            return

    def _find_locked(self, key: PageKey) -> NeighbourPage | None:
        for replica in self._replicas.values():
            page = replica.find(key)
            if page is not None:
                return page
        return None

    def _poll_if_due(self) -> None:
        if time.monotonic() - self._polled_at > _POLL_INTERVAL_S:
            self._poll_locked()

    def _poll_locked(self) -> None:
        for key, replica in list(self._replicas.items()):
            if not replica.poll():
                self._drop(key)
            if replica.said:
                said, replica.said = replica.said, []
                self._told(said)
        self._polled_at = time.monotonic()

    def _told(self, said: list[tuple[bool, PageKey]]) -> None:
        """Tell the observer, in order, how things are now."""
        if self._observer is None or not said:
            return
        now = [(self._find_locked(key) is not None, key) for _, key in said]
        for present, group in groupby(now, key=itemgetter(0)):
            self._observer(present, [key for _, key in group])

    def _drop(self, key: tuple[Path, str]) -> None:
        replica = self._replicas.pop(key)
        replica.dropped = True
        if self._observer is not None:  # it may be back at the next scan
            self._departed += replica.keys()
        self._close_if_unused(replica)

    @staticmethod
    def _close_if_unused(replica: NeighbourJournal) -> None:
        if replica.dropped and replica.leases == 0:
            replica.close()
