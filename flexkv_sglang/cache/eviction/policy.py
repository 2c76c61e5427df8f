"""EvictionPolicy: which leaf gives up its slot. Pure: no I/O, no lock, no wall clock.

The index guarantees to any policy: only leaves are offered (``offer``, ``used``), and a page that gains a child is
used or renewed, so that its old offer is stale. Time is counted in uses. Not thread-safe: the index calls under
``LocalPages.lock``.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Protocol

from flexkv_sglang.types import I64, PageKey

ANY_VALUE = float("inf")


class KeyOf(Protocol):
    """Key of the page in a slot."""

    def __getitem__(self, slot: int, /) -> PageKey | None: ...


class EvictionPolicy(Protocol):
    """Interface to ``TierIndex``. A slot is known from its first ``used`` to ``forget``."""

    last_use: array[int]  # per slot: tick of the last use, 0 if unknown

    def used(self, slots: Sequence[int], key_of: KeyOf, children: Sequence[int]) -> None:
        """READY pages were written or read, in this order: one call per chain, not per page.

        A chain comes tail first. ``key_of``, ``children``: the index's columns, by slot. A page without a
        cached child may be a victim.
        """

    def renew(self, slot: int, child_count: int) -> None:
        """The page gained a child, so its offer is stale. This is not a use, but moves it to the end of its queue."""

    def offer(self, slot: int) -> None:
        """The last cached child of this page is gone: it may be a victim."""

    def forget(self, slot: int, key: PageKey) -> None:
        """The page has left its slot."""

    def admission_values(self, keys: Sequence[PageKey]) -> Sequence[float] | None:
        """Value of each page of a new chain, for ``victim``. None: higher than any leaf's."""

    def declined(self, keys: Sequence[PageKey]) -> None:
        """These pages of a chain, in its order, got no slot: no leaf had a value below theirs."""

    def victim(
        self, may_go: Callable[[int], bool], admission_value: float = ANY_VALUE
    ) -> int | None:
        """The leaf to evict; None if there is none, or none with a value below ``admission_value``.

        Leaves that ``may_go`` refuses (pinned) are kept for later. A found leaf is found again
        until its last use changes.
        """

    def retain(self, keep: Callable[[int], bool]) -> None:
        """Withdraw the offers that ``keep`` refuses, until these slots are offered again."""

    def load(self, slots: I64, leaves: I64) -> None:
        """Start from recovered pages, oldest first."""

    def clear(self) -> None:
        """Every page is gone."""

    def offers(self) -> set[int]:
        """Slots that can be found as victims. For checks."""
