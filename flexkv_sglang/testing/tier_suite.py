"""TierSuite: what every tier must do, as tests. A subclass of at most 25 lines runs them over a tier of its own.

    class TestMemoryTier(TierSuite):
        @pytest.fixture
        def tier(self) -> Iterator[Tier]:
            tier = MemoryTier(room=64)
            yield tier
            tier.close()

The fixture makes an empty tier of pages of ``page_bytes``, with room for 64 or a few hundred. A subclass overrides
``fill`` where pages can be planted behind the tier's back, ``damage`` where a stored byte can be flipped, and
``broken_medium`` where the medium can be made to fail. Checks that need the last two are skipped without them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np
import pytest

from flexkv_sglang.testing.pages import POISON, Bytes, keys, page_memory, soon
from flexkv_sglang.tier import Tier
from flexkv_sglang.types import PageBuffers, PageKey

LATE_S = 2.0
"""A call may return this long after its deadline."""


class TierSuite:
    """Subclass it with the fixture ``tier``; the module says what else may be overridden."""

    page_bytes = 8192

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        """An empty tier, closed afterwards."""
        raise NotImplementedError

    def fill(self, tier: Tier, names: Sequence[PageKey], pages: Bytes) -> None:
        """Make row ``i`` of ``pages`` (uint8, as ``page_memory`` returns it) the page of ``names[i]``."""
        assert tier.put(names, self._buffers(pages), None, soon()) == [True] * len(names)

    def damage(self, tier: Tier, key: PageKey) -> None:
        """Flip at least one bit of the stored page."""
        pytest.skip("no access to the stored bytes")

    def broken_medium(self, tier: Tier) -> AbstractContextManager[object]:
        """While the context is open, reads and writes of the medium fail."""
        pytest.skip("the medium cannot be made to fail")

    @pytest.fixture(autouse=True)
    def _sound(self, tier: Tier) -> Iterator[None]:
        """After every test the tier's own invariants hold."""
        yield
        tier.check()

    # What the checks are made of.

    def _buffers(self, pages: Bytes) -> PageBuffers:
        rows = np.arange(len(pages), dtype=np.uint64)[:, None] * np.uint64(self.page_bytes)
        return PageBuffers(
            np.uint64(pages.ctypes.data) + rows, np.array([self.page_bytes], np.uint64)
        )

    def _filled(self, tier: Tier, count: int, seed: int = 1) -> tuple[list[PageKey], Bytes]:
        names, (pages, _) = keys(count, seed), page_memory(count, self.page_bytes, seed=seed)
        self.fill(tier, names, pages)
        return names, pages

    def _read(self, tier: Tier, names: Sequence[PageKey]) -> tuple[list[bool], Bytes]:
        target, buffers = page_memory(len(names), self.page_bytes)
        return tier.get(names, buffers, soon()), target

    def _stored(
        self, tier: Tier, count: int, seed: int, deadline: float | None = None
    ) -> tuple[list[bool], Bytes]:
        """Put a chain: the answer, and its bytes."""
        if not tier.traits.written:
            pytest.skip("this tier is not written")
        pages, buffers = page_memory(count, self.page_bytes, seed=seed)
        until = soon() if deadline is None else deadline
        return tier.put(keys(count, seed), buffers, None, until), pages

    def _overflow(self, tier: Tier) -> None:
        """Put four times as many pages as the tier has room for."""
        self._stored(tier, 1, 99)
        assert tier.slot_count, "a written tier has room"
        for seed in range(100, 104):
            for part in range(0, tier.slot_count, 16):
                self._stored(tier, 16, seed * 1000 + part)

    @staticmethod
    def _check_run(flags: list[bool], target: Bytes, pages: Bytes) -> int:
        """One leading run of True, with the right bytes. Returns its length."""
        run = flags.index(False) if False in flags else len(flags)
        assert flags == [True] * run + [False] * (len(flags) - run)
        assert np.array_equal(target[:run], pages[:run])
        return run

    # Reading.

    def test_pages_come_back_byte_for_byte(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 16)
        flags, target = self._read(tier, names)
        assert flags == [True] * 16
        assert np.array_equal(target, pages)

    def test_a_page_may_lie_in_several_buffers(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 6)
        target, buffers = page_memory(6, self.page_bytes, 4)
        assert tier.get(names, buffers, soon()) == [True] * 6
        assert np.array_equal(target, pages)

    def test_targets_need_no_alignment(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 6)
        target, buffers = page_memory(6, self.page_bytes, 2, shift=1)
        assert tier.get(names, buffers, soon()) == [True] * 6
        assert np.array_equal(target, pages)

    def test_the_targets_of_absent_pages_keep_their_bytes(self, tier: Tier) -> None:
        flags, target = self._read(tier, keys(5, 9))
        assert flags == [False] * 5
        assert (target == POISON).all()
        assert tier.prefix(keys(5, 9)) == 0
        assert tier.holds(keys(5, 9)) == [False] * 5

    def test_a_get_ends_at_the_first_missing_page(self, tier: Tier) -> None:
        names, (pages, _) = keys(5), page_memory(5, self.page_bytes, seed=1)
        here = [0, 1, 3]
        self.fill(tier, [names[i] for i in here], pages[here])
        assert tier.holds(names) == [True, True, False, True, False]
        assert tier.prefix(names) == 2
        flags, target = self._read(tier, names)
        assert flags == [True, True, False, False, False]
        assert np.array_equal(target[:2], pages[:2])
        assert (target[[2, 4]] == POISON).all()

    def test_a_chain_can_be_read_from_its_middle(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 8)
        assert tier.prefix(names[3:], promise=False) == tier.prefix(names[3:]) == 5
        flags, target = self._read(tier, names[3:6])
        assert flags == [True] * 3
        assert np.array_equal(target, pages[3:6])

    def test_no_keys_are_no_pages(self, tier: Tier) -> None:
        _, none = page_memory(0, self.page_bytes)
        assert tier.prefix([]) == 0
        assert tier.holds([]) == tier.is_valid([]) == []
        assert tier.pin([]) == []
        assert tier.get([], none, soon()) == tier.put([], none, None, soon()) == []

    def test_a_read_can_begin_and_be_awaited(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 6)
        target, buffers = page_memory(8, self.page_bytes)
        read = tier.begin_get([*names, *keys(2, 9)], buffers, soon())
        assert read is not None
        assert read.wait() == 6
        assert np.array_equal(target[:6], pages)
        assert (target[6:] == POISON).all()
        absent = tier.begin_get(keys(2, 9), buffers.take([6, 7]), soon())
        assert absent is None or absent.wait() == 0

    def test_no_read_may_last_longer_than_the_call(self, tier: Tier) -> None:
        now = time.monotonic()
        for deadline in (now - 1.0, now + 0.001, now + 60.0):
            assert tier.get_deadline(8, deadline) <= deadline

    # Deadlines and the caller's memory.

    def test_a_get_whose_deadline_is_over_returns_at_once(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 16)
        target, buffers = page_memory(16, self.page_bytes)
        begin = time.monotonic()
        flags = tier.get(names, buffers, begin - 1.0)
        assert time.monotonic() - begin < LATE_S
        self._check_run(flags, target, pages)

    def test_a_put_whose_deadline_is_over_returns_at_once(self, tier: Tier) -> None:
        begin = time.monotonic()
        answers, pages = self._stored(tier, 16, 3, begin - 1.0)
        assert time.monotonic() - begin < LATE_S
        assert len(answers) == 16
        for number in range(16):
            flags, target = self._read(tier, keys(16, 3)[number : number + 1])
            assert not flags[0] or np.array_equal(target[0], pages[number])

    def test_no_target_is_touched_after_the_call(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 32)
        for patience in (0.0, 0.0002, 0.001, 0.005):
            target, buffers = page_memory(32, self.page_bytes)
            flags = tier.get(names, buffers, time.monotonic() + patience)
            before = target.copy()
            time.sleep(0.1)
            assert np.array_equal(target, before)
            self._check_run(flags, target, pages)

    def test_no_source_is_read_after_the_call(self, tier: Tier) -> None:
        answers, pages = self._stored(tier, 16, 4)
        assert answers == [True] * 16
        expected = pages.copy()
        pages[:] = 0
        flags, target = self._read(tier, keys(16, 4))
        assert self._check_run(flags, target, expected) == 16

    def test_memory_may_be_registered_again(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 4)
        target, buffers = page_memory(4, self.page_bytes)
        for _ in range(2):
            tier.register_memory(target.ctypes.data, target.nbytes)
            target[:] = POISON
            assert tier.get(names, buffers, soon()) == [True] * 4
            assert np.array_equal(target, pages)

    # Writing.

    def test_sources_may_lie_anywhere(self, tier: Tier) -> None:
        self._stored(tier, 1, 5)
        pages, buffers = page_memory(6, self.page_bytes, 4, shift=1, seed=6)
        assert tier.put(keys(6, 6), buffers, None, soon()) == [True] * 6
        flags, target = self._read(tier, keys(6, 6))
        assert self._check_run(flags, target, pages) == 6

    def test_a_present_page_is_not_stored_twice(self, tier: Tier) -> None:
        self._stored(tier, 8, 7)
        count = tier.page_count()
        answers, pages = self._stored(tier, 8, 7)
        assert answers == [True] * 8
        assert tier.page_count() == count == 8
        assert self._check_run(*self._read(tier, keys(8, 7)), pages) == 8

    def test_a_missing_page_can_be_added_later(self, tier: Tier) -> None:
        names, (pages, buffers) = keys(5), page_memory(5, self.page_bytes, seed=8)
        self._stored(tier, 1, 5)
        tier.put(names[:2], buffers.take([0, 1]), None, soon())
        tier.put(names[3:], buffers.take([3, 4]), names[2], soon())
        assert tier.put(names[2:3], buffers.take([2]), names[1], soon()) == [True]
        assert self._check_run(*self._read(tier, names), pages) == 5

    def test_a_full_tier_stays_within_its_room_and_right(self, tier: Tier) -> None:
        self._overflow(tier)
        assert 0 < tier.page_count() <= tier.slot_count
        found = 0
        for seed in range(100, 104):
            for part in range(0, tier.slot_count, 16):
                name = seed * 1000 + part
                pages, _ = page_memory(16, self.page_bytes, seed=name)
                found += self._check_run(*self._read(tier, keys(16, name)), pages)
        assert found

    def test_what_is_cleared_is_gone_and_can_be_stored_again(self, tier: Tier) -> None:
        _, pages = self._stored(tier, 8, 10)
        tier.clear()
        assert tier.prefix(keys(8, 10)) == tier.page_count() == 0
        assert self._read(tier, keys(8, 10))[0] == [False] * 8
        assert self._stored(tier, 8, 10)[0] == [True] * 8
        assert self._check_run(*self._read(tier, keys(8, 10)), pages) == 8

    # Pins.

    def test_a_pinned_page_is_not_evicted(self, tier: Tier) -> None:
        _, pages = self._stored(tier, 6, 11)
        slots = [slot for slot in tier.pin(keys(6, 11)) if slot is not None]
        if not slots:
            pytest.skip("this tier pins nothing")
        assert len(slots) == 6
        again = [slot for slot in tier.pin(keys(6, 11)) if slot is not None]
        tier.unpin(again)  # pins count
        self._overflow(tier)
        assert self._check_run(*self._read(tier, keys(6, 11)), pages) == 6
        assert tier.is_valid(list(zip(keys(6, 11), slots, strict=True))) == [True] * 6
        tier.unpin(slots)

    def test_unpinned_pages_make_room_again(self, tier: Tier) -> None:
        answers, _ = self._stored(tier, 16, 12)
        tier.unpin([slot for slot in tier.pin(keys(16, 12)) if slot is not None])
        self._overflow(tier)
        assert answers == [True] * 16
        assert tier.page_count() <= tier.slot_count
        assert sum(self._read(tier, keys(16, 12))[0]) < 16

    def test_a_pin_does_not_outlast_clear(self, tier: Tier) -> None:
        self._stored(tier, 4, 13)
        pins = tier.pin([*keys(4, 13), *keys(1, 9)])
        assert pins[4] is None
        pinned = [(k, s) for k, s in zip(keys(4, 13), pins, strict=False) if s is not None]
        tier.clear()
        assert tier.is_valid(pinned) == [False] * len(pinned)
        tier.unpin([slot for _, slot in pinned])
        assert self._stored(tier, 4, 13)[0] == [True] * 4
        assert tier.is_valid(pinned) == [False] * len(pinned)

    # Failures and threads.

    def test_a_damaged_page_is_a_miss(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 5)
        self.damage(tier, names[2])
        flags, target = self._read(tier, names)
        assert self._check_run(flags, target, pages) == 2
        assert tier.prefix(names) == 2
        flags, target = self._read(tier, names[3:])
        assert self._check_run(flags, target, pages[3:]) == 2
        if tier.traits.written:
            self.fill(tier, names, pages)
            assert self._check_run(*self._read(tier, names), pages) == 5

    def test_a_broken_medium_is_a_miss(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 5)
        _, buffers = page_memory(5, self.page_bytes, seed=14)
        with self.broken_medium(tier):
            flags, target = self._read(tier, names)
            assert self._check_run(flags, target, pages) == 0
            answers = tier.put(keys(5, 14), buffers, None, soon())
            assert len(answers) == 5
            assert self._read(tier, keys(5, 14))[0] == [False] * 5
        assert len(self._read(tier, names)[0]) == 5

    def test_threads_share_a_tier(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 16)

        def read(start: int) -> None:
            for _ in range(20):
                self._check_run(*self._read(tier, names[start:]), pages[start:])

        def write(seed: int) -> None:
            for number in range(seed, seed + 10):
                rows, buffers = page_memory(4, self.page_bytes, seed=number)
                tier.put(keys(4, number), buffers, None, soon())
                self._check_run(*self._read(tier, keys(4, number)), rows)

        with ThreadPoolExecutor(5) as threads:
            jobs = [threads.submit(read, start) for start in (0, 5)]
            jobs += [threads.submit(write, seed) for seed in (500, 500, 600)]
            for job in jobs:
                job.result(60.0)

    def test_a_close_may_overlap_reads_and_be_repeated(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 16)

        def read() -> None:
            for _ in range(50):
                self._check_run(*self._read(tier, names), pages)

        with ThreadPoolExecutor(1) as threads:
            job = threads.submit(read)
            time.sleep(0.01)
            tier.close()
            tier.close()
            job.result(60.0)

    def test_calls_after_close_are_misses(self, tier: Tier) -> None:
        names, pages = self._filled(tier, 4)
        pins = [slot for slot in tier.pin(names) if slot is not None]
        tier.close()
        assert tier.released()
        flags, target = self._read(tier, names)
        assert flags == [False] * 4
        assert (target == POISON).all()
        for chain in (names, keys(4, 15)):
            assert tier.put(chain, self._buffers(pages), None, soon()) == [False] * 4
        assert tier.prefix(keys(4, 15)) == 0
        tier.unpin(pins)
