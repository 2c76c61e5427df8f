"""The owners below a configured directory: what each takes on the disk, whether it lives, and room from dead ones.

``size`` is what one server takes in the directory, whatever namespaces lie there. So the dead owners of namespaces
that this server does not use give way to its files, the oldest first: when the disk has too little room, and after
``UNUSED_S`` also where they exceed ``size``. Never touched: an owner that lives (its lock
tells), files of another user, files of an unknown format, and whatever is not ours by name.
"""

from __future__ import annotations

import json
import logging
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexkv_sglang.backends.file_lock import FileLock
from flexkv_sglang.backends.slots.manifest import MANIFEST
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.backends.slots.records import HEADER_BYTES, JOURNAL_MAGIC, Header
from flexkv_sglang.errors import JournalError
from flexkv_sglang.identity.siblings import are_siblings

logger = logging.getLogger(__name__)

_FILE = re.compile(r"^([0-9a-f]{12})\.")
_MANIFEST_MAX = 1 << 16
UNUSED_S = 7 * 86400.0
"""Files of another model that somebody may come back to are kept this long, if there is room."""

_NAMED = 3  # files that a message names


@dataclass(slots=True)
class Holding:
    """The files of one owner. ``byte_count``: blocks on the disk. ``touched``: last change, seconds since 1970.

    ``related``: its namespace is one that the asking server uses. ``ours``: the files are this user's, in a folder of
    this user.
    """

    folder: Path
    owner: str
    related: bool
    ours: bool
    byte_count: int = 0
    touched: float = 0.0
    alive: bool = False
    names: list[str] = field(default_factory=list)

    @property
    def may_go(self) -> bool:
        """May it be removed to make room?"""
        return self.ours and not (self.related or self.alive)


def survey(root: Path, own: Path, fields: Mapping[str, object]) -> list[Holding]:
    """All owners below ``root`` on the file system of the namespace folder ``own``, the longest untouched first.

    ``fields``: the meaning of the own namespace. One listing per folder, one descriptor at a time. What cannot be read
    is left out. Raises ``OSError``.
    """
    found = _holdings(own, related=True)
    for folder in _folders(root, own.stat().st_dev):
        if folder.name == own.name:
            continue
        try:
            found += _holdings(folder, related=are_siblings(fields, _manifest(folder)))
        except OSError as exc:
            logger.debug("flexkv: %s is not looked at: %s", folder, exc)
    return sorted(found, key=lambda holding: holding.touched)


def _folders(root: Path, device: int) -> Iterator[Path]:
    with os.scandir(root) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
                yield Path(entry.path)


def _manifest(folder: Path) -> Mapping[str, object]:
    try:
        fd = os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return {}
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return {}
        try:
            fields = json.loads(file.read(_MANIFEST_MAX))
        except ValueError:
            return {}
    return fields if isinstance(fields, dict) else {}


def _holdings(folder: Path, *, related: bool) -> list[Holding]:
    mine = folder.stat().st_uid == os.geteuid()
    by_owner: dict[str, Holding] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if (match := _FILE.match(entry.name)) is None:
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            one = by_owner.setdefault(match[1], Holding(folder, match[1], related, mine))
            one.names.append(entry.name)
            one.ours &= stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            one.byte_count += status.st_blocks * 512
            one.touched = max(one.touched, status.st_mtime)
    for one in by_owner.values():
        one.alive = _lives(one)
    return list(by_owner.values())


def _lives(holding: Holding) -> bool:
    """Does a process hold the lock? True as well if that cannot be found out."""
    name = f"{holding.owner}.lock"
    if name not in holding.names:
        return False
    if not holding.ours:
        return True
    try:
        return FileLock.is_held(holding.folder / name)
    except OSError:
        return True


def make_room(holdings: Sequence[Holding], *, short: int, beyond: int) -> list[Holding]:
    """Remove dead owners that are not related, the oldest first, until ``short`` bytes are freed.

    If all together take more than ``beyond`` bytes (-1: no bound), those go as well that nobody has used for
    ``UNUSED_S``. Returns those removed.
    """
    unused = time.time() - UNUSED_S
    dead = [holding for holding in holdings if holding.may_go]
    left = sum(holding.byte_count for holding in dead)
    freed, removed = 0, []
    for holding in dead:
        if freed >= short and (beyond < 0 or left <= beyond or holding.touched > unused):
            break
        if not _remove(holding):
            continue
        freed, left = freed + holding.byte_count, left - holding.byte_count
        removed.append(holding)
        logger.warning(
            "flexkv: removed %s in %s to make room: %d bytes of a namespace that no server uses",
            holding.owner,
            holding.folder,
            holding.byte_count,
        )
    for folder in {holding.folder for holding in removed}:
        _remove_empty(folder)
    return removed


def _remove(holding: Holding) -> bool:
    """Remove its files under its lock. False: it lives by now, or its format is not known."""
    if f"{holding.owner}.lock" not in holding.names:
        return False
    try:
        lock = OwnerLock.try_take(holding.folder, holding.owner)
        if lock is None:
            return False
        with lock:
            if not _is_known(holding):
                return False
            lock.remove_files()
    except OSError as exc:
        logger.warning("flexkv: %s in %s stays: %s", holding.owner, holding.folder, exc)
        return False
    return True


def _is_known(holding: Holding) -> bool:
    """Is there no journal of another format? One without a journal died while it was being made."""
    for name in holding.names:
        if name.endswith(".journal"):
            try:
                with open(holding.folder / name, "rb") as file:
                    Header.unpack(file.read(HEADER_BYTES), JOURNAL_MAGIC)
            except (OSError, JournalError):
                return False
    return True


def _remove_empty(folder: Path) -> None:
    """Remove a folder in which only its description is left."""
    try:
        if os.listdir(folder) == [MANIFEST]:
            (folder / MANIFEST).unlink()
            folder.rmdir()
    except OSError as exc:
        logger.debug("flexkv: %s stays: %s", folder, exc)


def describe_takers(root: Path, holdings: Sequence[Holding]) -> str:
    """For a message: which files take the space, and the command that frees it."""
    others = sorted((h for h in holdings if h.byte_count), key=lambda h: -h.byte_count)
    if not others:
        return f"No other files of FlexKV lie in {root}"
    named = ", ".join(
        f"{h.folder / h.owner}.* ({h.byte_count} bytes, {_kind(h)})" for h in others[:_NAMED]
    )
    more = f" and {len(others) - _NAMED} more owners" if len(others) > _NAMED else ""
    total = sum(h.byte_count for h in others)
    return (
        f"Other files of FlexKV in {root} take {total} bytes: {named}{more}. 'flexkv gc {root} --older-than 0s' "
        "removes those that no process uses"
    )


def _kind(holding: Holding) -> str:
    if not holding.ours:
        return "of another user"
    return "in use by a running server" if holding.alive else "no process uses it"


def largest_first(directory: Path) -> list[str]:
    """The owners of a namespace folder by the size of their slot files."""
    sizes = dict.fromkeys(owners(directory), 0)
    for name in os.listdir(directory):
        owner = name.partition(".")[0]
        if name.endswith(".slots") and owner in sizes:
            try:
                sizes[owner] += (directory / name).lstat().st_size
            except OSError:
                continue
    return sorted(sizes, key=lambda owner: (-sizes[owner], owner))


def with_journals(directory: Path) -> frozenset[str]:
    """Owners in a namespace folder that have a journal; the others died while they were being made. One listing."""
    found = (_FILE.match(name) for name in os.listdir(directory) if name.endswith(".journal"))
    return frozenset(match[1] for match in found if match)
