"""TierIndex against an oracle under any sequence of calls; reserve, commit and abort are rules of their own."""

from __future__ import annotations

import hashlib
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexkv_sglang.cache.eviction.lru import Lru
from flexkv_sglang.cache.index.index import TierIndex
from flexkv_sglang.types import PageKey, SlotId
from stores.index_oracle import Oracle, Page

BRANCHES = 2
paths = st.lists(st.integers(0, BRANCHES - 1), min_size=1, max_size=6)


def chain(path: list[int]) -> list[PageKey]:
    """Page keys of a prompt: each stands for everything before it, as SGLang's do."""
    return [
        PageKey(hashlib.sha256(bytes(path[: length + 1])).digest()) for length in range(len(path))
    ]


class IndexMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.pinned: list[tuple[list[SlotId], list[Page]]] = []
        self.writing: list[tuple[list[SlotId], list[Page]]] = []

    @initialize(counts=st.lists(st.integers(0, 6), min_size=1, max_size=2).map(tuple))
    def start(self, counts: tuple[int, ...]) -> None:
        self.index = TierIndex(sum(counts), Lru(sum(counts)), counts)
        self.oracle = Oracle(counts)

    @precondition(lambda self: len(self.writing) < 2)
    @rule(path=paths, start=st.integers(0, 5), skip=st.frozensets(st.integers(0, 5), max_size=2))
    def reserve(self, path: list[int], start: int, skip: frozenset[int]) -> None:
        self._reserve(path, start, skip)

    def _reserve(self, path: list[int], start: int, skip: frozenset[int]) -> None:
        whole = chain(path)
        start = min(start, len(whole) - 1)
        keys, parent = whole[start:], whole[start - 1] if start else None
        busy = self.oracle.busy_slots()
        got = self.index.reserve(keys, parent, skip)
        slots_of_victims = {slot for _, slot in got.victims}
        granted, victims, refused = self.oracle.reserve(keys, parent, skip)
        assert [position for position, _ in got.granted] == granted
        assert [key for key, _ in got.victims] == victims
        assert got.refused == refused
        slots = [slot for _, slot in got.granted]
        assert len(set(slots)) == len(slots)
        assert set(slots) & busy <= slots_of_victims, "a slot in use was given away"
        pages = [self.oracle.pages[keys[position]] for position in granted]
        for page, slot in zip(pages, slots, strict=True):
            page.slot = slot
        if slots:
            self.writing.append((slots, pages))

    @rule(path=paths)
    def store(self, path: list[int]) -> None:
        """A whole put at once: else few chains would ever be complete, and few pages evicted."""
        before = len(self.writing)
        self._reserve(path, 0, frozenset())
        if len(self.writing) > before:
            self._commit(*self.writing.pop())

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def commit(self, data: Any) -> None:
        self._commit(*self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1))))

    def _commit(self, slots: list[SlotId], pages: list[Page]) -> None:
        closed = self.oracle.closed
        alive = [
            page not in self.oracle.ghosts and self.oracle.region_of(page.slot) not in closed
            for page in pages
        ]
        assert self.index.still_writing(slots) == alive
        good = [slot for slot, flag in zip(slots, alive, strict=True) if flag]
        self.index.commit(good)
        self.index.abort([slot for slot in slots if slot not in good])
        self.oracle.commit([page for page, flag in zip(pages, alive, strict=True) if flag])
        self.oracle.abort([page for page, flag in zip(pages, alive, strict=True) if not flag])

    @precondition(lambda self: self.writing)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        slots, pages = self.writing.pop(data.draw(st.integers(0, len(self.writing) - 1)))
        self.index.abort(slots)
        self.oracle.abort(pages)

    @precondition(lambda self: len(self.pinned) < 2)
    @rule(path=paths)
    def pin(self, path: list[int]) -> None:
        slots = self.index.pin_run(chain(path))
        pages = self.oracle.pin(chain(path))
        assert slots == [page.slot for page in pages]
        if slots:
            self.pinned.append((slots, pages))

    @precondition(lambda self: self.pinned)
    @rule(data=st.data())
    def unpin(self, data: Any) -> None:
        slots, pages = self.pinned.pop(data.draw(st.integers(0, len(self.pinned) - 1)))
        self.index.unpin(slots)
        self.oracle.unpin(pages)

    @precondition(lambda self: any(page.ready for page in self.oracle.pages.values()))
    @rule(data=st.data())
    def discard(self, data: Any) -> None:
        ready = [page for page in self.oracle.pages.values() if page.ready]
        page = ready[data.draw(st.integers(0, len(ready) - 1))]
        assert self.index.discard(page.key, SlotId(page.slot))
        self.oracle.discard(page)
        assert not self.index.discard(page.key, SlotId(page.slot))

    @rule()
    def clear(self) -> None:
        self.index.clear()
        self.oracle.clear()

    @rule(region=st.integers(0, 1))
    def suspend_or_resume(self, region: int) -> None:
        """A directory stops answering, and answers again."""
        if region < len(self.oracle.counts):
            if region in self.oracle.closed:
                assert self.index.resume(region) == self.oracle.resume(region)
            else:
                assert self.index.suspend(region) == self.oracle.suspend(region)

    @precondition(lambda self: not self.oracle.closed and max(self.oracle.counts) > 2)
    @rule(data=st.data())
    def retire(self, data: Any) -> None:
        """Give slots at the end of a region back; its pages there are gone."""
        region = data.draw(st.integers(0, len(self.oracle.counts) - 1))
        low = sum(self.oracle.counts[:region])
        before = self.oracle.counts[region]
        gone, left = self.index.retire(region, 1)
        lost = [page for page in self.oracle.pages.values() if page.slot >= low + left]
        lost = [page for page in lost if self.oracle.region_of(page.slot) == region]
        assert {key for key, _ in gone} == {page.key for page in lost}
        assert all(page.ready and not page.pins for page in lost)
        for page in lost:
            self.oracle.discard(page)
        slots = range(low + left, low + before)
        known = {page.slot for page in self.oracle.ghosts}
        self.oracle.ghosts += [Page(PageKey(b""), slot) for slot in slots if slot not in known]

    @rule()
    def restart(self) -> None:
        """Snapshot and load: READY pages, their order and their links come back; nothing else does."""
        keys, slots, parents = self.index.snapshot().by_age()
        counts = self.oracle.counts
        self.index = TierIndex(sum(counts), Lru(sum(counts)), counts)
        assert self.index.load(keys, slots, parents) == []
        oracle = Oracle(self.oracle.counts)
        kept = sorted(
            (page for page in self.oracle.pages.values() if page.ready), key=lambda page: page.used
        )
        for page in kept:
            if page.parent is not None and (
                self.oracle.pages.get(page.parent.key) is not page.parent or not page.parent.ready
            ):
                page.parent = None
            page.pins = 0
            oracle.pages[page.key] = page
            oracle.use(page)
        self.oracle = oracle
        self.pinned, self.writing = [], []

    @rule(path=paths)
    def look_up(self, path: list[int]) -> None:
        keys = chain(path)
        assert self.index.prefix(keys) == self.oracle.prefix(keys)
        for key in keys:
            page = self.oracle.pages.get(key)
            assert self.index.holds(key) == (page is not None)
            expected = page.slot if page is not None and page.ready else None
            assert self.index.find(key) == expected

    @invariant()
    def sound(self) -> None:
        self.index.check()
        assert len(self.index) == sum(page.ready for page in self.oracle.pages.values())


IndexMachine.TestCase.settings = settings(
    max_examples=10 * settings.default.max_examples, stateful_step_count=50
)
TestIndexModel = IndexMachine.TestCase
