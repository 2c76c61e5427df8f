"""FreeSpace: gives slots back when others need the disk, and notices when a tier that started short may grow.

A remedy looks at its effect. Freed space may show late (btrfs, ZFS: with the next commit) or never (a snapshot or a
copy holds the blocks), so what was given back counts as free for ``_SETTLE_S``; after two rounds that freed next to
nothing no more is given back until the disk has room again. A journal that found no space is no reason to keep the
space: its file is cut first, and the directory comes back with a new generation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexkv_sglang.backends.slots.slot_file import OwnedStore
from flexkv_sglang.backends.slots.space.disk_space import (
    floor_bytes,
    free_bytes,
    unallocated_bytes,
)
from flexkv_sglang.backends.slots.space.room import Shortage
from flexkv_sglang.cache.disks.directories import Directory
from flexkv_sglang.cache.local_pages import LocalPages
from flexkv_sglang.errors import JournalError, TierError
from flexkv_sglang.metrics.registry import Metrics

logger = logging.getLogger(__name__)

_SETTLE_S = 45.0  # btrfs commits every 30 s
_ROUNDS_MAX = 2
_SHRINK_S = 5.0
_SHRINK_PARTS, _SHRINK_MIN = 32, 64 << 20  # at least a slot in 32, but no more than this, at once


@dataclass(slots=True)
class _Effort:
    """What was given back in one directory and is not seen to be free yet. Bytes; monotonic seconds.

    ``low``: the least free space seen since. ``useless``: rounds in a row that freed next to nothing.
    """

    given: int = 0
    low: int = 0
    until: float = 0.0
    useless: int = 0


class FreeSpace:
    """Of one engine. The methods that take a ``Directory`` run on its thread. ``short``: see ``Recovered``."""

    def __init__(
        self,
        pages: LocalPages,
        metrics: Metrics,
        min_free: int | None,
        short: Sequence[Shortage] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pages = pages
        self._metrics = metrics
        self._min_free = min_free
        self._short = tuple(short)
        self._clock = clock
        self._efforts: dict[Directory, _Effort] = {}
        self.may_grow = False

    def keep_floor(self, directory: Directory) -> None:
        """Give slots back while the disk has less free space than the reserve for others."""
        stores = {r: s for r, s in directory.stores.items() if s.slots.slot_class.slot_count}
        if not stores:
            return
        try:
            free = unallocated_bytes(directory.path)
            missing = floor_bytes(directory.path, self._min_free) - free_bytes(directory.path)
            missing = self._still_missing(directory, missing, free)
            if missing <= 0:
                return
            region = max(stores, key=lambda r: stores[r].slots.slot_class.slot_count)
            given = self._shrink(region, directory, missing)
            shown = unallocated_bytes(directory.path) - free
        except (OSError, TierError, JournalError) as exc:
            self._metrics.count("shrink_errors")
            logger.warning("flexkv: cannot shrink %s: %s", directory.path, exc)
            return
        effort = self._efforts.setdefault(directory, _Effort())
        if shown >= given // 2:  # most file systems count it at once
            effort.given = effort.useless = 0
            return
        effort.low = min(effort.low, free) if effort.given else free
        effort.given += given
        effort.until = self._clock() + _SETTLE_S

    def _still_missing(self, directory: Directory, missing: int, free: int) -> int:
        """``missing`` without the bytes that were given back and do not show yet; 0 if giving back is of no use."""
        effort = self._efforts.get(directory)
        if effort is None:
            return missing
        if missing <= 0:
            del self._efforts[directory]
            return 0
        if effort.useless >= _ROUNDS_MAX:
            return 0
        if not effort.given:
            return missing
        effort.low = min(effort.low, free)  # others may take what is freed
        shown = min(free - effort.low, effort.given)
        if self._clock() < effort.until:
            return missing - (effort.given - shown)
        effort.useless = effort.useless + 1 if shown < effort.given // 4 else 0
        effort.given = 0
        if effort.useless >= _ROUNDS_MAX:
            logger.warning(
                "flexkv: %s: slots that were given back free no space on this disk: snapshots or copies hold their "
                "blocks, or others take them. No more are given back until it has room. Remove snapshots and reflink "
                "copies of the directory, or exclude it from them",
                directory.path,
            )
            return 0
        return missing

    def _shrink(self, region: int, directory: Directory, missing: int) -> int:
        """Give slots of a region back, about ``missing`` bytes. Returns the bytes."""
        store = directory.stores[region]
        before = store.slots.slot_class
        least = min(before.slot_count // _SHRINK_PARTS, _SHRINK_MIN // before.slot_bytes)
        wanted = min(max(-(-missing // before.slot_bytes), least), before.slot_count - 1)
        if not wanted:
            return 0

        def work() -> tuple[int, int]:
            return self._give_back(region, store, wanted)

        if store.failed:  # nothing is appended meanwhile; the probe begins a new generation
            lost, left = work()
        else:
            lost, left = directory.journal.run(work, time.monotonic() + _SHRINK_S)
        count = before.slot_count - left
        if count:
            self._metrics.count("given_back_slots", count)
            logger.warning(
                "flexkv: %s: the disk is nearly full, %d slots are given back (%d pages), %d left",
                store.lock.directory,
                count,
                lost,
                left,
            )
        return count * before.slot_bytes

    def _give_back(self, region: int, store: OwnedStore, wanted: int) -> tuple[int, int]:
        pages = self._pages
        pages.release_lookup_pins()
        with pages.lock:
            gone, left = pages.index.retire(region, wanted)
            snapshot = pages.index.snapshot()
        if left < store.slots.slot_class.slot_count:
            if store.failed:
                store.cut(left)
            else:
                pages.tier.publish_del(gone)
                store.shrink(left, pages.tier.snapshot_records(*snapshot.by_age(), region))
        return len(gone), left

    def look_for_room(self, directory: Directory) -> None:
        """Set ``may_grow`` when a tier that started short would get more by opening its files again."""
        for short in self._short:
            if short.place.directory == directory.path and not self.may_grow:
                room = max(0, short.place.spare_bytes()) + sum(
                    holding.byte_count
                    for holding in short.place.survey()
                    if holding.ours
                    and not holding.alive
                    and (holding.may_go or holding.folder == directory.path)
                    and (holding.folder, holding.owner) not in short.useless
                )
                self.may_grow = room >= max(short.slot_bytes, short.byte_count // 8)
