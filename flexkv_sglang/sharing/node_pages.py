"""NodePages: the pages of one namespace on this node, as its agent serves them to other nodes.

They belong to rank processes, alive or dead. The agent finds them as any neighbour does, by tailing journals, and
looks at the journal again after a read. Pages that appear or vanish go to the node's change log. Threads: any.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.backends.fleet.members.change_log import OwnChanges
from flexkv_sglang.backends.fleet.vocabulary import MISSING, PageStatus, ServedPage, fingerprints_of
from flexkv_sglang.backends.io.mover import PageMover
from flexkv_sglang.backends.io.probe import IoMode, make_engine
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.ring import Ring
from flexkv_sglang.backends.io.transfer import IoEngine, Outcome, PageTransfer
from flexkv_sglang.backends.memory import AlignedMemory
from flexkv_sglang.backends.slots.following.neighbour_journal import NeighbourPage
from flexkv_sglang.backends.slots.journal import generations, journal_path
from flexkv_sglang.backends.slots.manifest import noted
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.backends.slots.records import HEADER_BYTES, JOURNAL_MAGIC, Header
from flexkv_sglang.errors import JournalError, TierError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.types import SECTOR, PageBuffers, PageKey, round_up

logger = logging.getLogger(__name__)

_HIDDEN_MAX = 1 << 16
_VERIFY_S = 5.0


class NodePages:
    """``PageSource`` of one namespace; ``log`` gets its changes. ``depth``: reads in flight at the disk."""

    def __init__(
        self,
        places: Mapping[Path, IoMode],
        namespace: str,
        payload_bytes: int,
        log: OwnChanges,
        metrics: Metrics,
        depth: int,
    ) -> None:
        self.payload_bytes = payload_bytes
        self.namespace = namespace
        self._log = log
        self.changes = 0  # calls of ``_changed``; the poller compares
        self._metrics = metrics
        self._hidden: dict[PageKey, None] = {}  # the oldest first
        self._store = NeighbourStore(
            [(directory / namespace, mode) for directory, mode in places.items()],
            namespace,
            payload_bytes,
            own=(),
            accepted=frozenset(ChecksumKind),
            observer=self._changed,
        )

        def make(kind: str, traffic: ReadPriority) -> IoEngine:
            return Ring(depth, traffic) if kind == "io_uring" else make_engine(kind, traffic)

        # Whole slots with their padding: aligned memory takes them without a copy.
        self._row_bytes = round_up(payload_bytes, SECTOR)
        self._mover = PageMover(self._row_bytes, metrics, make)

    def __len__(self) -> int:
        return len(self._store)

    def scan(self) -> None:
        """Find new and removed owners."""
        self._store.scan()

    def poll(self) -> None:
        """Follow the journals."""
        self._store.poll()

    def read(
        self, keys: Sequence[PageKey], addresses: Sequence[int], deadline: float
    ) -> list[ServedPage]:
        """As ``PageSource.read``: the leading run of ``keys`` that is here, MISS after it."""
        answer = [MISSING] * len(keys)
        claims = self._store.find(self._visible(keys))
        if not claims:
            return answer
        try:
            outcomes = self._move(claims, addresses, deadline)
            valid = self._store.still_valid(claims)
        finally:
            self._store.release(claims)
        for row, (claim, outcome, same) in enumerate(zip(claims, outcomes, valid, strict=True)):
            if outcome is Outcome.LATE:
                answer[row] = ServedPage(PageStatus.LATE)
            elif outcome is Outcome.DONE and same:
                answer[row] = ServedPage(PageStatus.OK, claim.kind, claim.checksum)
        return answer

    def reported_bad(self, keys: Sequence[PageKey]) -> None:
        """As ``PageSource.reported_bad``. Reads the pages again, one by one."""
        memory = AlignedMemory(self._row_bytes)
        address = memory.address
        for key in keys:
            if key in self._hidden:
                continue
            (page,) = self.read([key], [address], time.monotonic() + _VERIFY_S)
            if page.status is not PageStatus.OK or page.kind is ChecksumKind.NONE:
                continue
            if page_checksum(page.kind, key, [(address, self.payload_bytes)]) != page.checksum:
                logger.error("flexkv: page %s is bad on disk; it is served no more", key.hex())
                self._metrics.count("corrupt_pages")
                self._hidden[key] = None
                if len(self._hidden) > _HIDDEN_MAX:
                    self._hidden.pop(next(iter(self._hidden), key), None)
                self._log.drop(fingerprints_of([key]))

    def close(self) -> None:
        """Close descriptors after a bounded wait for running reads. Idempotent."""
        self._mover.close()
        self._store.close()

    def _changed(self, present: bool, keys: list[PageKey]) -> None:
        self.changes += 1
        if present:
            for key in keys:
                self._hidden.pop(key, None)  # written again
            self._log.add(fingerprints_of(keys))
        else:
            self._log.drop(fingerprints_of(keys))

    def _visible(self, keys: Sequence[PageKey]) -> Sequence[PageKey]:
        for count, key in enumerate(keys):
            if key in self._hidden:
                return keys[:count]
        return keys

    def _move(
        self,
        claims: Sequence[NeighbourPage],
        addresses: Sequence[int],
        deadline: float,
    ) -> list[Outcome]:
        rows = np.array(addresses[: len(claims)], np.uint64)[:, None]
        targets = PageBuffers(rows, np.array([self._row_bytes], np.uint64))
        try:
            extents = self._store.extents(claims)
            return self._mover.move(PageTransfer(*extents, targets, deadline))
        except (OSError, TierError) as exc:
            self._metrics.count("read_errors")
            logger.warning("flexkv: reading for another node failed: %s", exc)
            return [Outcome.FAILED] * len(claims)


def payload_bytes_of(directory: Path) -> int | None:
    """Bytes of a page in a namespace's directory, from a journal; None if there is no readable one."""
    try:
        for owner in owners(directory):
            for generation in generations(directory, owner):
                try:
                    with journal_path(directory, owner, generation).open("rb") as file:
                        header = Header.unpack(file.read(HEADER_BYTES), JOURNAL_MAGIC)
                except (OSError, JournalError):
                    continue
                if header.namespace == directory.name and header.files:
                    return header.files[0].payload_bytes
    except OSError as exc:
        logger.debug("flexkv: %s: %s", directory, exc)
    return None


def is_shareable(directory: Path) -> bool:
    """False if only one server knows the weights of these pages, so that no other can ask for them."""
    return directory.is_dir() and not noted(directory, "epoch")
