"""GetPlan: where each page of a request comes from, held still while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.slots.neighbours import NeighbourPage, NeighbourStore
from flexkv_sglang.cache.local_pages import LocalPages
from flexkv_sglang.types import PageKey, SlotId

_LOCK_SPAN = 512  # keys looked up under one hold of the lock


class GetPlan:
    """The leading run of a request that can be read, pinned until the block is left.

    Columns, no object per own page. ``keys``, ``kinds``, ``sums``: per page of the run, its key and what its
    bytes must hash to. ``own`` and ``slots``: positions of own pages and their slots; ``foreign`` and
    ``claims``: positions of neighbours' pages and what is claimed of them.
    """

    def __init__(
        self, pages: LocalPages, neighbours: NeighbourStore, keys: Sequence[PageKey]
    ) -> None:
        self._pages = pages
        self._neighbours = neighbours
        self.keys: Sequence[PageKey] = ()
        self.kinds: list[ChecksumKind] = []
        self.sums: list[int] = []
        self.own: list[int] = []
        self.slots: list[SlotId] = []
        self.foreign: list[int] = []
        self.claims: list[NeighbourPage] = []
        try:
            self._collect(keys)
        except BaseException:
            self._release()
            raise
        self.keys = keys[: len(self.sums)]

    def __enter__(self) -> GetPlan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self.slots:
            self._pages.unpin(self.slots)
        if self.claims:
            self._neighbours.release(self.claims)

    def _collect(self, keys: Sequence[PageKey]) -> None:
        """Alternate between own pages and neighbours' pages until neither goes on."""
        count = 0
        while count < len(keys):
            start = count
            slots = self._pages.pin(keys[start : start + _LOCK_SPAN])
            self.slots += slots
            kinds, sums = self._pages.tier.checksums(slots)
            self.kinds += kinds
            self.sums += sums
            count += len(slots)
            self.own += range(start, count)
            if count < len(keys):
                claims = self._neighbours.find(keys[count:])
                self.claims += claims
                self.kinds += [claim.kind for claim in claims]
                self.sums += [claim.checksum for claim in claims]
                self.foreign += range(count, count + len(claims))
                count += len(claims)
            if count == start:
                return
