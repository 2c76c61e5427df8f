"""How much of a directory a process may take, at its start and later.

Dead owners of namespaces that the server does not use make room first. Where running servers have the rest, the tier
starts with what there is. Anything else that does not fit is a ``ConfigError``, which names what takes the space.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.slots.journal import slots_path
from flexkv_sglang.backends.slots.records import SlotClass
from flexkv_sglang.backends.slots.space.allocation import commit_freed, fill_holes, holes
from flexkv_sglang.backends.slots.space.memory_limit import is_memory, tightest
from flexkv_sglang.backends.slots.space.owners import (
    Holding,
    describe_takers,
    make_room,
)
from flexkv_sglang.backends.slots.space.places import Place
from flexkv_sglang.errors import ConfigError, JournalError

logger = logging.getLogger(__name__)

AUTO_SIZE_MAX = 64 * 10**9
"""Without a configured size: a quarter of the free space, at most this."""


@dataclass(frozen=True, slots=True)
class Shortage:
    """``byte_count`` bytes are missing in a directory. ``useless``: dead owners that gave none: (folder, owner)."""

    place: Place
    slot_bytes: int
    byte_count: int
    useless: frozenset[tuple[Path, str]]


@dataclass(frozen=True, slots=True)
class SpaceRequest:
    """Arguments that are the same for every directory.

    ``share``: bytes of this process per directory, or None. ``whole``: the same of the whole server.
    """

    namespace: str
    slot_class: SlotClass
    share: int | None
    whole: int | None
    accepted: frozenset[ChecksumKind]
    key_name: str
    auto_part: float


def auto_bytes(place: Place, asked: SpaceRequest, holdings: Sequence[Holding]) -> int:
    free, spare = place.free_bytes(), place.spare_bytes()
    dead = sum(h.byte_count for h in holdings if h.may_go)  # makes room when needed
    limit = tightest() if is_memory(place.directory) else None
    if limit is not None:
        spare = min(spare, limit.left - limit.reserve)
    return int(min((free + dead) // 4, spare + dead, AUTO_SIZE_MAX) * asked.auto_part)


def room_for(
    place: Place,
    asked: SpaceRequest,
    wanted: int,
    holdings: Sequence[Holding],
    own: frozenset[str],
) -> int:
    """Make room for ``wanted`` slots. Returns how many there is room for. Raises ``ConfigError`` for too little."""
    needed = wanted * asked.slot_class.slot_bytes
    beyond = -1
    if asked.whole is not None:
        related = sum(h.byte_count for h in holdings if h.related)
        beyond = max(0, asked.whole - related - needed)
    _respect_memory(place, asked, needed)
    removed = make_room(holdings, short=needed - place.spare_bytes(), beyond=beyond)
    spare = place.spare_bytes()
    if removed and spare < needed:
        commit_freed(place.root)
        spare = place.spare_bytes()
    if spare >= needed:
        return wanted
    gone = frozenset((h.folder, h.owner) for h in removed)
    others = [h for h in holdings if h.owner not in own and (h.folder, h.owner) not in gone]
    takers = describe_takers(place.root, others)
    lent = sum(h.byte_count for h in others if h.alive and h.ours)
    problem = (
        f"{asked.key_name}: {needed} more bytes are needed in {place.directory}, but only {spare} can be taken: "
        f"min_free={place.floor_bytes()} of {place.free_bytes()} free bytes are "
        f"left to others. {takers}"
    )
    if spare + lent < needed:
        raise ConfigError(f"{problem}. Valid: a size that fits, or free space")
    found = max(0, spare) // asked.slot_class.slot_bytes
    logger.warning(
        "flexkv: %s. Starts with %d of %d slots there, and takes the others when running servers have left them",
        problem,
        found,
        wanted,
    )
    return found


def _respect_memory(place: Place, asked: SpaceRequest, needed: int) -> None:
    """Raises ``ConfigError`` if slot files in memory would go beyond a limit: the kernel would kill the process."""
    limit = tightest() if is_memory(place.directory) else None
    if limit is not None and needed > limit.left - limit.reserve:
        raise ConfigError(
            f"{asked.key_name}: {needed} more bytes are needed in {place.directory}, which lies in memory, but the "
            f"limit in {limit.place} is {limit.limit} bytes, of which {max(0, limit.left)} are left and "
            f"{limit.reserve} stay for the process. Valid: a smaller size of this tier, a larger memory limit, or a "
            "path on a disk"
        )


def slots_without_holes(place: Place, owner: str, asked: SpaceRequest, slots_max: int) -> int:
    """Fill the holes of a sparse copy (rsync -S), or else writes into them would fill the disk in spite of
    ``min_free``. Returns how many slots can be adopted: fewer than ``slots_max`` where the disk has too little room.
    """
    path = slots_path(place.directory, owner, asked.slot_class.slot_bytes)
    missing = holes(path)
    if not missing:
        return slots_max
    size, beyond = path.stat().st_size, missing - place.spare_bytes()
    if beyond > 0:
        keep = (size - beyond) // asked.slot_class.slot_bytes
        if keep < 1:
            raise JournalError(f"{path} is a sparse copy, and the disk has no room for its holes")
        os.truncate(path, keep * asked.slot_class.slot_bytes)
        slots_max = min(slots_max, keep)
    filled = fill_holes(path)
    text = "flexkv: %s is a sparse copy: %d bytes had no blocks%s"
    logger.warning(text, path, missing, "" if filled else ", and this file system cannot add them")
    return slots_max
