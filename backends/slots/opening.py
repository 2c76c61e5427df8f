"""Opens the local tier of one namespace: directories, adoption of dead owners, new slot files.

Start-up is the one place where a wrong size or an unusable directory is an error the user sees:
``ConfigError`` names the key, the value and what is valid.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.io.probe import IoMode, probe_directory
from flexkv_sglang.backends.safe_files import ForeignFileError, own_folder
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.disk_space import floor_bytes, free_bytes, is_no_space
from flexkv_sglang.backends.slots.journal import generations
from flexkv_sglang.backends.slots.manifest import MANIFEST, write_manifest
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.backends.slots.records import NO_PARENT, RECORD, SLOTS_MAX, Records, SlotClass
from flexkv_sglang.backends.slots.slot_file import OwnedStore, SlotFileTier
from flexkv_sglang.errors import ConfigError, JournalError, TierUnavailableError
from flexkv_sglang.types import I64, SECTOR, KeyArray, round_up

logger = logging.getLogger(__name__)

AUTO_SIZE_MAX = 64 * 10**9
"""Without a configured size: a quarter of the free space, at most this."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """The pages of the adopted owners, as ``TierIndex.load`` takes them: in parallel, oldest first.

    All ``[n]``; ``parents``: slots or -1.
    """

    keys: KeyArray
    slots: I64
    parents: I64


@dataclass(frozen=True, slots=True)
class Place:
    """One configured directory: its namespace folder, how I/O works there, and its health.

    ``min_free``: bytes left to others on the disk (default: see ``floor_bytes``). ``durable``: flush at
    every commit.
    """

    directory: Path
    mode: IoMode
    breaker: Breaker = field(default_factory=Breaker)
    min_free: int | None = None
    durable: bool = False


def prepare_directory(path: str, io_engine: str) -> IoMode:
    """Make the directory if needed and prove that pages can be written and read there.

    Raises ``ConfigError`` naming the directory and the reason.
    """
    try:
        directory = Path(path).expanduser()
    except RuntimeError as exc:
        raise ConfigError(f"path: {path!r}: {exc} Valid: an absolute path") from exc
    try:
        directory.mkdir(parents=True, exist_ok=True)
        mode = probe_directory(str(directory), io_engine)
    except OSError as exc:
        raise ConfigError(
            f"path: cannot use {str(directory)!r}: {exc.strerror or exc}. "
            "Valid: a directory this user can write to, on a disk with free space"
        ) from exc
    except TierUnavailableError as exc:
        raise ConfigError(
            f"path, io_engine={io_engine!r}: {exc}. Valid: io_engine 'auto' takes what works"
        ) from exc
    logger.info(
        "flexkv: %s: io_engine=%s o_direct=%s segment_align=%d%s",
        directory,
        mode.engine,
        str(mode.o_direct).lower(),
        mode.segment_align,
        f" (not better because {mode.reason})" if mode.reason else "",
    )
    return mode


def open_places(
    paths: Mapping[str, IoMode],
    namespace: str,
    fields: Mapping[str, object],
    *,
    min_free: int | None = None,
    durable: bool = False,
) -> list[Place]:
    """The namespace folder in each directory, with a NAMESPACE.json that describes it."""
    places = []
    for path, mode in paths.items():
        try:
            directory = own_folder(Path(path).expanduser() / namespace)
            if not (directory / MANIFEST).exists():
                write_manifest(directory, {"namespace": namespace, **fields})
        except ForeignFileError as exc:
            raise ConfigError(
                f"path: {exc.filename} {exc.strerror}. KV cache is read from files of this user only. "
                "Valid: another path for each user, or remove that folder"
            ) from exc
        except OSError as exc:
            raise ConfigError(
                f"path: cannot use {str(Path(path) / namespace)!r}: {exc.strerror or exc}. "
                "Valid: a directory this user can write to"
            ) from exc
        places.append(Place(directory, mode, Breaker(), min_free, durable))
    return places


def open_tier(
    places: Sequence[Place],
    namespace: str,
    payload_bytes: int,
    share_bytes: int | None,
    *,
    accepted: frozenset[ChecksumKind],
    key_name: str = "size",
    auto_part: float = 1.0,
) -> tuple[SlotFileTier, Recovered]:
    """Adopt dead owners, then preallocate what is missing to this process's share.

    ``share_bytes``: bytes this process may take over all directories; 0: it only reads its neighbours;
    None: what was left here by an earlier run, else this namespace's part (``auto_part``) of a quarter of the
    free space. Raises ``ConfigError`` when a share is too small for one page or larger than the free
    space; of several directories those that cannot be used are left out, as long as one can.
    """
    if share_bytes == 0:
        return SlotFileTier([]), _recovered(SlotFileTier([]), [])
    slot_bytes = round_up(payload_bytes, SECTOR)
    if share_bytes is not None and share_bytes // len(places) < slot_bytes:
        raise ConfigError(
            f"{key_name}: this process's share in each of {len(places)} directories is "
            f"{share_bytes // len(places)} bytes, less than one page ({slot_bytes} bytes). "
            f"Valid: at least {slot_bytes * len(places)} bytes per rank process"
        )
    asked = _Asked(
        namespace,
        SlotClass(slot_bytes, payload_bytes, 0),
        None if share_bytes is None else share_bytes // len(places),
        accepted,
        key_name,
        auto_part,
    )
    stores: list[OwnedStore] = []
    live: list[Records] = []
    problems: list[ConfigError] = []
    try:
        for place in places:
            try:
                opened = _open_directory(place, asked)
            except ConfigError as exc:
                problems.append(exc)
                continue
            for store, records in opened:
                store.breaker, store.durable = place.breaker, place.durable
                stores.append(store)
                live.append(records)
    except BaseException:
        for store in stores:
            store.close()
        raise
    if problems and not stores:
        raise problems[0]
    for problem in problems:
        logger.error("flexkv: a directory is left out: %s", problem)
    tier = SlotFileTier(stores)
    return tier, _recovered(tier, live)


@dataclass(frozen=True, slots=True)
class _Asked:
    """Arguments that are the same for every directory. ``share``: bytes per directory, or None."""

    namespace: str
    slot_class: SlotClass
    share: int | None
    accepted: frozenset[ChecksumKind]
    key_name: str
    auto_part: float


def _open_directory(place: Place, asked: _Asked) -> list[tuple[OwnedStore, Records]]:
    slot_bytes, share = asked.slot_class.slot_bytes, asked.share
    slots_max = SLOTS_MAX if share is None else min(share // slot_bytes, SLOTS_MAX)
    opened = _adopt_all(place, asked, slots_max)
    have = sum(store.slots.slot_class.slot_count for store, _ in opened)
    if share is None:
        free = free_bytes(place.directory)
        spare = free - floor_bytes(place.directory, place.min_free)
        auto = int(min(free // 4, spare, AUTO_SIZE_MAX) * asked.auto_part) // slot_bytes
        slots_max = have or max(1, auto)
    missing = slots_max - have
    try:
        if missing > 0:
            opened.append((_create(place, asked, missing), np.zeros(0, RECORD)))
    except BaseException:
        for store, _ in opened:
            store.close()
        raise
    return opened


def _create(place: Place, asked: _Asked, slot_count: int) -> OwnedStore:
    slot_class = replace(asked.slot_class, slot_count=slot_count)
    needed = slot_class.slot_bytes * slot_count
    free = free_bytes(place.directory)
    floor = floor_bytes(place.directory, place.min_free)
    if needed > free - floor:
        raise ConfigError(
            f"{asked.key_name}: {needed} more bytes are needed in {place.directory}, but only {free} are "
            f"free, of which min_free={floor} are left to others. Valid: a size that fits, or free space"
        )
    try:
        return OwnedStore.create(place.directory, asked.namespace, slot_class, place.mode)
    except OSError as exc:
        if is_no_space(exc):
            raise ConfigError(
                f"{asked.key_name}: {needed} bytes do not fit into {place.directory}: {exc.strerror}"
            ) from exc
        raise ConfigError(
            f"path: cannot create files in {place.directory}: {exc.strerror or exc}"
        ) from exc


def _adopt_all(place: Place, asked: _Asked, slots_max: int) -> list[tuple[OwnedStore, Records]]:
    """Dead owners of this namespace, the largest first, until ``slots_max`` slots are ours."""
    adopted: list[tuple[OwnedStore, Records]] = []
    left = slots_max
    for owner in _by_size(place.directory):
        enough = left < 1 or (asked.share is None and bool(adopted))
        if enough and generations(place.directory, owner):
            continue
        lock = _dead_owner(place.directory, owner)
        if lock is None:
            continue
        try:
            store, records = OwnedStore.adopt(
                lock,
                asked.namespace,
                asked.slot_class.payload_bytes,
                place.mode,
                slots_max=left,
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


def _by_size(directory: Path) -> list[str]:
    sizes = dict.fromkeys(owners(directory), 0)
    for name in os.listdir(directory):
        owner = name.partition(".")[0]
        if name.endswith(".slots") and owner in sizes:
            try:
                sizes[owner] += (directory / name).lstat().st_size
            except OSError:
                continue
    return sorted(sizes, key=lambda owner: (-sizes[owner], owner))


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
