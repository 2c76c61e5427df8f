"""Opens the local tier of one namespace: directories, adoption of dead owners, new slot files.

Start-up is the one place where a wrong size or an unusable directory is an error the user sees:
``ConfigError`` names the key, the value and what is valid.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.slots.journal import generations
from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.backends.slots.records import NO_PARENT, RECORD, SLOTS_MAX, Records, SlotClass
from flexkv_sglang.backends.slots.retired import remove_folder
from flexkv_sglang.backends.slots.slot_file import OwnedStore, SlotFileTier
from flexkv_sglang.backends.slots.space.disk_space import is_no_space
from flexkv_sglang.backends.slots.space.owners import describe_takers, largest_first, with_journals
from flexkv_sglang.backends.slots.space.places import Place
from flexkv_sglang.backends.slots.space.room import (
    Shortage,
    SpaceRequest,
    auto_bytes,
    room_for,
    slots_without_holes,
)
from flexkv_sglang.backends.slots.space.turns import in_turn
from flexkv_sglang.errors import ConfigError, JournalError, TierUnavailableError
from flexkv_sglang.types import I64, SECTOR, KeyArray, round_up

logger = logging.getLogger(__name__)

_ADOPTED_MAX = 64  # two descriptors each


@dataclass(frozen=True, slots=True)
class Recovered:
    """The pages of the adopted owners, as ``TierIndex.load`` takes them: in parallel, oldest first.

    All ``[n]``; ``parents``: slots or -1. ``short``: directories that hold less than was asked for.
    """

    keys: KeyArray
    slots: I64
    parents: I64
    short: tuple[Shortage, ...] = ()


def open_tier(  # noqa: PLR0913 - one call, spelled out
    places: Sequence[Place],
    namespace: str,
    payload_bytes: int,
    share_bytes: int | None,
    *,
    accepted: frozenset[ChecksumKind],
    key_name: str = "size",
    auto_part: float = 1.0,
    whole_bytes: int | None = None,
    directories: int = 0,
) -> tuple[SlotFileTier, Recovered]:
    """Adopt dead owners, then preallocate what is missing to this process's share.

    ``share_bytes``: bytes this process may take over all directories; 0: it only reads its neighbours;
    None: what was left here by an earlier run, else this namespace's part (``auto_part``) of a quarter of the
    free space. ``whole_bytes``: the same for all processes and pools of the server. ``directories``: number of
    configured ones, if some of them are lost; their shares are not put on the others.

    Where the disk has too little left, dead owners of namespaces that this server does not use make room. If owners
    that live have the rest, the tier starts with what there is (``Recovered.short``). Raises ``ConfigError`` when a
    share is too small for one page or larger than the space there can be; of several directories those that cannot be
    used are left out, as long as one can.
    """
    if share_bytes == 0:
        return SlotFileTier([]), _recovered(SlotFileTier([]), [])
    slot_bytes = round_up(payload_bytes, SECTOR)
    count = directories or len(places)
    if share_bytes is not None and share_bytes // count < slot_bytes:
        raise ConfigError(
            f"{key_name}: this process's share in each of {count} directories is "
            f"{share_bytes // count} bytes, less than one page ({slot_bytes} bytes). "
            f"Valid: at least {slot_bytes * count} bytes per rank process"
        )
    asked = SpaceRequest(
        namespace,
        SlotClass(slot_bytes, payload_bytes, 0),
        None if share_bytes is None else share_bytes // count,
        None if whole_bytes is None else whole_bytes // count,
        accepted,
        key_name,
        auto_part,
    )
    opened, short = _open_all(places, asked)
    for place, store, _ in opened:
        store.breaker, store.durable = place.breaker, place.durable
    tier = SlotFileTier([store for _, store, _ in opened])
    recovered = _recovered(tier, [records for _, _, records in opened])
    return tier, replace(recovered, short=tuple(short))


def _open_all(
    places: Sequence[Place], asked: SpaceRequest
) -> tuple[list[tuple[Place, OwnedStore, Records]], list[Shortage]]:
    opened: list[tuple[Place, OwnedStore, Records]] = []
    short: list[Shortage] = []
    problems: list[ConfigError] = []
    try:
        for place in places:
            try:
                opened += [(place, *one) for one in _open_directory(place, asked, short)]
            except ConfigError as exc:
                problems.append(exc)
                if place.made:
                    remove_folder(place.directory)
    except BaseException:
        for _, store, _ in opened:
            store.close()
        raise
    if len(problems) == len(places):
        raise problems[0]
    for problem in problems:
        logger.error("flexkv: a directory is left out: %s", problem)
    return opened, short


def _open_directory(
    place: Place, asked: SpaceRequest, short: list[Shortage]
) -> list[tuple[OwnedStore, Records]]:
    slot_bytes, share = asked.slot_class.slot_bytes, asked.share
    slots_max = SLOTS_MAX if share is None else min(share // slot_bytes, SLOTS_MAX)
    opened: list[tuple[OwnedStore, Records]] = []
    try:
        with in_turn(place.directory):  # else one measures before the other has cut what it adopted
            opened += _adopt_all(place, asked, slots_max)
            have = sum(store.slots.slot_class.slot_count for store, _ in opened)
            if have < slots_max and not (have and share is None):
                _create_missing(place, asked, slots_max - have, opened, short)
    except BaseException:
        for store, _ in opened:
            store.close()
        raise
    return opened


def _create_missing(
    place: Place,
    asked: SpaceRequest,
    wanted: int,
    opened: list[tuple[OwnedStore, Records]],
    short: list[Shortage],
) -> None:
    slot_bytes = asked.slot_class.slot_bytes
    with in_turn(place.root):  # else each counts the same space as its own
        holdings = place.survey()
        if asked.share is None:
            wanted = max(1, auto_bytes(place, asked, holdings) // slot_bytes)
        found = room_for(
            place, asked, wanted, holdings, frozenset(store.lock.owner for store, _ in opened)
        )
        if found:
            opened.append((_create(place, asked, found), np.zeros(0, RECORD)))
    if found < wanted:
        useless = frozenset((h.folder, h.owner) for h in place.survey() if not h.alive)
        short.append(Shortage(place, slot_bytes, (wanted - found) * slot_bytes, useless))


def _create(place: Place, asked: SpaceRequest, slot_count: int) -> OwnedStore:
    slot_class = replace(asked.slot_class, slot_count=slot_count)
    try:
        return OwnedStore.create(place.directory, asked.namespace, slot_class, place.mode)
    except OSError as exc:
        if is_no_space(exc):
            needed = slot_class.slot_bytes * slot_count
            raise ConfigError(
                f"{asked.key_name}: {needed} bytes do not fit into {place.directory}: {exc.strerror}. "
                f"{describe_takers(place.root, place.survey())}. Valid: a size that fits, or free space"
            ) from exc
        raise ConfigError(
            f"path: cannot create files in {place.directory}: {exc.strerror or exc}"
        ) from exc


def _adopt_all(
    place: Place, asked: SpaceRequest, slots_max: int
) -> list[tuple[OwnedStore, Records]]:
    """Dead owners of this namespace, the largest first, until ``slots_max`` slots are ours."""
    adopted: list[tuple[OwnedStore, Records]] = []
    left = slots_max
    complete = with_journals(place.directory)
    for owner in largest_first(place.directory):
        enough = left < 1 or (asked.share is None and bool(adopted)) or len(adopted) >= _ADOPTED_MAX
        if enough and owner in complete:
            continue
        lock = _dead_owner(place.directory, owner)
        if lock is None:
            continue
        try:
            most = slots_without_holes(place, owner, asked, left)
            store, records = OwnedStore.adopt(
                lock,
                asked.namespace,
                asked.slot_class.payload_bytes,
                place.mode,
                slots_max=most,
                accepted=asked.accepted,
            )
        except (JournalError, TierUnavailableError, OSError) as exc:
            logger.warning("flexkv: owner %s in %s is left alone: %s", owner, place.directory, exc)
            lock.close()
            continue
        left -= store.slots.slot_class.slot_count
        adopted.append((store, records))
        logger.info(
            "flexkv: adopted %s in %s: %d pages in %d slots",
            owner,
            place.directory,
            len(records),
            store.slots.slot_class.slot_count,
        )
    return adopted


def _dead_owner(directory: Path, owner: str) -> OwnerLock | None:
    """The lock of an owner that can be adopted; None if it lives, is not ours, or died while it was being made."""
    try:
        lock = OwnerLock.try_take(directory, owner)
        if lock is None or generations(directory, owner):
            return lock
        with lock:
            lock.remove_files()
    except OSError as exc:
        logger.warning("flexkv: owner %s in %s is left alone: %s", owner, directory, exc)
    return None


def _recovered(tier: SlotFileTier, live: Sequence[Records]) -> Recovered:
    keys = [np.zeros(0, RECORD)["key"]]
    slots, parents = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index, records in enumerate(live):
        base = tier.base(index)
        keys.append(records["key"])
        slots.append(records["slot"].astype(np.int64) + base)
        linked = records["parent"].astype(np.int64)
        parents.append(np.where(linked == NO_PARENT, -1, linked + base))
    return Recovered(np.concatenate(keys), np.concatenate(slots), np.concatenate(parents))
