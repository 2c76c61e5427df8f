"""Tier: the one interface between ``Tiers`` and a place that keeps pages. docs/EXTENDING.md says how to add one.

The caller guarantees:
* The keys of a call are one chain: each page's key covers the pages before it. No key occurs twice.
* ``len(keys) == len(targets)`` (or ``sources``), and every page has the bytes that the tier was opened for.
* Targets and sources stay mapped until the call returns (``begin_get``: until ``wait`` returns), and during a ``put``
  the bytes of the sources do not change.
* Deadlines are in ``time.monotonic()`` seconds. A deadline may lie in the past.
* Calls come from any thread, several at once. ``close`` may overlap them and is repeated.

A tier must:
* Answer True to a ``get`` only for a page whose bytes are whole and right. It verifies them; a page that fails that
  is a miss.
* Answer a ``get`` with one bool per key: True for a leading run, False from the first failure on.
* Touch no target after the call has returned. It leaves the target of a page that it does not have as it was.
* Bound every wait. ``get`` and ``put`` return soon after their deadline; ``prefix``, ``holds`` and ``pin`` do no I/O.
* Count and log its own failures and answer them as a miss. It raises nothing but ``TierError``, and that only where
  the whole call can have no answer: it makes the call a miss.
* Never evict a page that is pinned or being read. It may evict every other page at any time.
* After ``close``: release its threads and files within seconds, and answer every ``get`` and ``put`` with False.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flexkv_sglang.prefix import leading_run
from flexkv_sglang.types import PageBuffers, PageKey, SlotId


@dataclass(frozen=True, slots=True)
class TierTraits:
    """How ``Tiers`` uses a tier.

    ``local``: it is looked up and read first. Any other tier is asked only for pages that no local tier has, and it
    reads while the local tiers read. ``written``: each ``put`` goes to it. ``promotes``: a page that is read from it
    for the second time is put into the next faster local tier. ``backfills``: pages that are read from it are put
    into the written tiers later, in the background.
    """

    local: bool = True
    written: bool = True
    promotes: bool = True
    backfills: bool = False


class PendingGet(Protocol):
    """A read that has begun."""

    def wait(self) -> int:
        """Number of leading pages that arrived whole and right. Called once; no target is touched afterwards."""


class Tier(ABC):
    """A place that keeps pages of one namespace, all of one size. The module says what both sides owe each other."""

    traits = TierTraits()

    @property
    def may_grow(self) -> bool:
        """Would it get more space if it were closed and opened again now? Memory only."""
        return False

    @abstractmethod
    def holds(self, keys: Sequence[PageKey]) -> list[bool]:
        """Per key: can this page be read? Pages behind a missing one count as well. Memory only."""

    @abstractmethod
    def get(self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float) -> list[bool]:
        """Read pages into ``targets``. Per key True if the page is there now; False from the first failure on."""

    @abstractmethod
    def page_count(self) -> int:
        """Pages of this process that are here; of a tier that is not local, all that it knows of."""

    def prefix(self, keys: Sequence[PageKey], *, promise: bool = True) -> int:
        """Number of leading pages that can be read and are worth it. Memory only.

        ``promise``: a ``get`` of them will probably follow, so the tier may keep them for a few seconds.
        """
        return leading_run(self.holds(keys))

    def get_deadline(self, page_count: int, deadline: float) -> float:
        """The time limit for all reads of one call that asks for ``page_count`` pages: ``deadline`` or earlier."""
        return deadline

    def begin_get(
        self, keys: Sequence[PageKey], targets: PageBuffers, deadline: float
    ) -> PendingGet | None:
        """Start reading the leading pages that are here; None if there are none.

        The caller calls ``wait`` exactly once. A tier that is not local overrides this.
        """
        count = leading_run(self.get(keys, targets, deadline))
        return _Done(count) if count else None

    def put(
        self,
        keys: Sequence[PageKey],
        sources: PageBuffers,
        parent: PageKey | None,
        deadline: float,
        *,
        own: bool = False,
    ) -> list[bool]:
        """Store the pages that are absent. Per key True if the page is stored, or was declined as not worth its space.

        ``parent``: the page before the first one, if known. ``own``: store a page although another process of this
        machine has it. The sources are not read after the call.
        """
        return [False] * len(keys)

    @property
    def slot_count(self) -> int:
        """Pages that this process may store here at most; 0 where it stores none."""
        return 0

    def pin(self, keys: Sequence[PageKey]) -> list[SlotId | None]:
        """Keep pages from eviction until ``unpin``. Per key a number of the tier's choice; None: not pinned."""
        return [None] * len(keys)

    def unpin(self, slots: Sequence[SlotId]) -> None:
        """Undo ``pin``, once per page. Also called after ``close``."""

    def is_valid(self, pages: Sequence[tuple[PageKey, SlotId]]) -> list[bool]:
        """Per pinned page: can it still be read? A pin does not help against damage and ``clear``."""
        return [False] * len(pages)

    def register_memory(self, address: int, byte_count: int) -> None:
        """Announce memory that calls will use often. It stays mapped until ``close``. Called again without harm."""

    def prepare(self, page: PageBuffers) -> None:
        """Make now what the first call would wait for. ``page``: one page as calls will name it; not to be touched."""

    def clear(self) -> None:
        """Forget every page of this process."""

    def close(self) -> None:
        """End running calls and release everything. Idempotent."""

    def released(self) -> bool:
        """After ``close``: has every transfer ended, so that the files may be deleted?"""
        return True

    def discard(self) -> None:
        """Delete what this process stored, once it ``released``. Raises ``OSError``."""

    def check(self) -> None:
        """Assert the tier's own invariants; for tests."""


@dataclass(frozen=True, slots=True)
class _Done:
    """The result of a read that ended before ``begin_get`` returned."""

    count: int

    def wait(self) -> int:
        return self.count
