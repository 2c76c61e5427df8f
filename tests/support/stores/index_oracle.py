"""An independent, simple model of TierIndex: whole-table scans, objects, no links by number."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise

from flexkv_sglang.types import PageKey


@dataclass(eq=False)
class Page:
    """One cached page. ``parent`` is the page object, so a page that was replaced is not its successor."""

    key: PageKey
    slot: int
    ready: bool = False
    suspended: bool = False
    parent: Page | None = None
    pins: int = 0
    used: int = 0


@dataclass
class Oracle:
    """Cached pages by key, and the forgotten ones whose slots are not free yet."""

    counts: tuple[int, ...]
    pages: dict[PageKey, Page] = field(default_factory=dict)
    ghosts: list[Page] = field(default_factory=list)
    clock: int = 0
    closed: set[int] = field(default_factory=set)

    def region_of(self, slot: int) -> int:
        return sum(slot >= end for end in accumulate(self.counts))

    @property
    def free(self) -> int:
        """Slots that may be taken; a page without one yet (-1) is about to get one of them."""
        room = sum(n for region, n in enumerate(self.counts) if region not in self.closed)
        busy = [page.slot for page in [*self.pages.values(), *self.ghosts]]
        return room - sum(slot < 0 or self.region_of(slot) not in self.closed for slot in busy)

    def suspend(self, region: int) -> int:
        self.closed.add(region)
        hit = [p for p in self.pages.values() if p.ready and self.region_of(p.slot) == region]
        for page in hit:
            page.ready, page.suspended = False, True
        return len(hit)

    def resume(self, region: int) -> int:
        self.closed.discard(region)
        hit = [p for p in self.pages.values() if p.suspended and self.region_of(p.slot) == region]
        for page in hit:
            page.ready, page.suspended = True, False
        return len(hit)

    def busy_slots(self) -> set[int]:
        return {page.slot for page in [*self.pages.values(), *self.ghosts]}

    def prefix(self, keys: list[PageKey]) -> int:
        count = 0
        while count < len(keys) and keys[count] in self.pages and self.pages[keys[count]].ready:
            count += 1
        return count

    def use(self, page: Page) -> None:
        self.clock += 1
        page.used = self.clock

    def use_chain(self, pages: list[Page]) -> None:
        for page in reversed(pages):
            if page.ready:
                self.use(page)

    def pin(self, keys: list[PageKey]) -> list[Page]:
        run = [self.pages[key] for key in keys[: self.prefix(keys)]]
        for before, page in pairwise(run):
            self.adopt(page, before)
        for page in run:
            page.pins += 1
        self.use_chain(run)
        return run

    def unpin(self, pages: list[Page]) -> None:
        for page in pages:
            page.pins -= 1
            if page in self.ghosts and page.pins == 0:
                self.ghosts.remove(page)

    def adopt(self, page: Page, parent: Page) -> None:
        alive = page.parent is not None and self.pages.get(page.parent.key) is page.parent
        if not alive:
            page.parent = parent

    def has_child(self, page: Page) -> bool:
        return any(other.parent is page for other in self.pages.values())

    def victim(self, spared: list[Page]) -> Page | None:
        candidates = [
            page
            for page in self.pages.values()
            if page.ready and page.pins == 0 and page not in spared and not self.has_child(page)
        ]
        return min(candidates, key=lambda page: page.used, default=None)

    def reserve(
        self, keys: list[PageKey], parent: PageKey | None, skip: frozenset[int]
    ) -> tuple[list[int], list[PageKey], list[int]]:
        """(granted positions, victims' keys, refused positions); granted pages get slot -1 for now."""
        for key in keys:
            page = self.pages.get(key)
            if page is not None and page.suspended and not page.pins:
                del self.pages[key]
        chain = ([] if parent is None else [parent]) + keys
        spared = [self.pages[key] for key in chain if key in self.pages]
        granted, victims, refused = [], [], []
        previous = self.pages.get(parent) if parent is not None else None
        for position, key in enumerate(keys):
            if key not in self.pages and position not in skip:
                out = self.victim(spared) if self.free == 0 else None
                if refused or (self.free == 0 and out is None):
                    refused.append(position)
                else:
                    if out is not None:
                        del self.pages[out.key]
                        victims.append(out.key)
                    self.pages[key] = Page(key, -1)
                    granted.append(position)
            page = self.pages.get(key)
            if page is not None and previous is not None:
                self.adopt(page, previous)
            previous = page
        self.use_chain(spared)
        return granted, victims, refused

    def commit(self, pages: list[Page]) -> None:
        for page in pages:
            page.ready = True
            self.use(page)

    def abort(self, pages: list[Page]) -> None:
        for page in pages:
            if page in self.ghosts:
                self.ghosts.remove(page)
            else:
                del self.pages[page.key]

    def discard(self, page: Page) -> None:
        del self.pages[page.key]
        if page.pins:
            self.ghosts.append(page)

    def clear(self) -> None:
        self.ghosts += [p for p in self.pages.values() if p.pins or not (p.ready or p.suspended)]
        self.pages.clear()
