"""GetPlan: where each page of a request comes from, held still while it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.neighbours import NeighbourPage, NeighbourStore
from flexkv_sglang.local_pages import LocalPages
from flexkv_sglang.types import PageKey, SlotId

_LOCK_SPAN = 512  # keys looked up under one hold of the lock


@dataclass(frozen=True, slots=True)
class Source:
    """Where one page of a get comes from: an own slot, or a neighbour's claim."""

    key: PageKey
    slot: SlotId | None
    neighbour: NeighbourPage | None
    kind: ChecksumKind
    checksum: int


class GetPlan:
    """The leading run of a request that can be read, pinned until the block is left."""

    def __init__(
        self, pages: LocalPages, neighbours: NeighbourStore, keys: Sequence[PageKey]
    ) -> None:
        self._pages = pages
        self._neighbours = neighbours
        self.sources: list[Source] = []
        try:
            self._collect(keys)
        except BaseException:
            self._release()
            raise

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
        self._pages.unpin([s.slot for s in self.sources if s.slot is not None])
        self._neighbours.release([s.neighbour for s in self.sources if s.neighbour is not None])

    def _collect(self, keys: Sequence[PageKey]) -> None:
        """Alternate between own pages and neighbours' pages until neither goes on."""
        while len(self.sources) < len(keys):
            start = len(self.sources)
            slots = self._pages.pin(keys[start : start + _LOCK_SPAN])
            checks = self._pages.tier.checksums(slots)
            self.sources += [
                Source(keys[start + i], slot, None, *checks[i]) for i, slot in enumerate(slots)
            ]
            after = len(self.sources)
            if after < len(keys):
                claims = self._neighbours.find(keys[after:])
                self.sources += [Source(c.key, None, c, c.kind, c.checksum) for c in claims]
            if len(self.sources) == start:
                return
