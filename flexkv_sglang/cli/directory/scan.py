"""Scans a directory: namespaces, owners, their files and figures, and unknown entries. Changes nothing."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_sglang.backends.slots.journal import journal_path, recover, stats_path
from flexkv_sglang.cli.directory.acting import acting_as, refusal
from flexkv_sglang.cli.directory.trusted_files import (
    distrust,
    is_being_written,
    is_locked,
    manifest_of,
    read_object,
    stats_of,
)
from flexkv_sglang.errors import JournalError
from flexkv_sglang.sharing.run_dir import IN_DATA_DIRECTORY

_MANIFEST = "NAMESPACE.json"
_NAMES_MAX = 100_000
_OWNED = re.compile(
    r"^(?P<owner>[0-9a-f]{12})\."
    r"(?:lock|stats\.json|\d+\.slots|(?P<generation>\d+)\.(?:journal|snap))$"
)
_TEMPORARY = re.compile(r"^(?:(?P<owner>[0-9a-f]{12})|NAMESPACE\.json)\..*\.tmp$")


@dataclass(frozen=True, slots=True)
class RefusedFolder:
    """A folder that is not looked at. ``ours``: it is of a user whose files this process may touch."""

    path: Path
    reason: str
    ours: bool


@dataclass(frozen=True, slots=True)
class Owner:
    """The files of one owner. ``locked``: it has a lock file; ``alive``: a process held it during the scan.

    Without a lock file ``alive`` says that a process has its files open to write, or that this cannot be found out.
    ``foreign``: reasons why its files are not all ours; then nothing of it is opened. ``files`` and ``temporary`` are
    those that are ours.
    """

    directory: Path
    name: str
    locked: bool
    alive: bool
    files: tuple[Path, ...]
    temporary: tuple[Path, ...]
    foreign: tuple[str, ...] = ()

    def generation_files(self, generation: int) -> tuple[list[Path], list[Path]]:
        """(journal and snapshot of ``generation``, journals and snapshots of other generations)."""
        those: list[Path] = []
        others: list[Path] = []
        for path in self.files:
            match = _OWNED.match(path.name)
            if match is not None and match["generation"] is not None:
                (those if int(match["generation"]) == generation else others).append(path)
        return those, others

    def disk_bytes(self) -> int:
        """Bytes allocated on disk."""
        return sum(found.st_blocks * 512 for found in _stats(self.files + self.temporary))

    def touched_at(self) -> float:
        """Time of the last write to any of the files, as ``time.time()``."""
        return max((found.st_mtime for found in _stats(self.files)), default=0.0)


@dataclass(frozen=True, slots=True)
class Namespace:
    """One namespace folder of user ``uid`` and group ``gid``. ``fields``: NAMESPACE.json, {} if it cannot be read."""

    directory: Path
    fields: dict[str, Any]
    owners: tuple[Owner, ...]
    unknown: tuple[str, ...]
    uid: int = 0
    gid: int = 0
    shared: bool = False

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.name

    @property
    def buffer_bytes(self) -> list[int]:
        """Sizes of a page's buffers in stored order, or [] if unknown."""
        return list(self.fields.get("buffer_bytes") or [])

    def acting(self) -> AbstractContextManager[None]:
        """Root works here as the folder's owner."""
        return acting_as(self.uid, self.gid)

    @property
    def remedy(self) -> str:
        """The command that makes files of other users ours; "" without any."""
        if not any("belongs to" in reason for owner in self.owners for reason in owner.foreign):
            return ""
        return (
            f"chown -R {self.uid}:{self.gid} {self.directory} gives the files of other users to the folder's owner, "
            "if you know where they come from"
        )

    @property
    def not_to_change(self) -> str:
        """The reason why commands write nothing here; "" if they may."""
        if self.uid == 0 and any(owner.foreign for owner in self.owners):
            return "the folder is root's, and not every file in it: root changes nothing there"
        return "the file system is read-only" if is_read_only(self.directory) else ""


@dataclass(frozen=True, slots=True)
class Scan:
    """All that lies in a directory. ``unknown``: neither namespaces nor files of sharing between machines."""

    namespaces: tuple[Namespace, ...]
    refused: tuple[RefusedFolder, ...] = ()
    unknown: tuple[str, ...] = ()


@dataclass(slots=True)
class OwnerStats:
    """Figures of one owner's journal, and the last ``<owner>.stats.json`` of its process (``live``, {} if none)."""

    owner: Owner
    pages: int = 0
    slots: int = 0
    payload_bytes: int = 0
    journal_bytes: int = 0
    checksums: dict[int, int] = field(default_factory=dict)  # ``ChecksumKind`` -> pages
    trouble: str = ""
    live: dict[str, Any] = field(default_factory=dict)

    def fields(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "owner": self.owner.name,
            "alive": self.owner.alive,
            "pages": self.pages,
            "slots": self.slots,
            "page_bytes": self.payload_bytes,
            "disk_bytes": self.owner.disk_bytes(),
            "journal_bytes": self.journal_bytes,
            "touched_at": self.owner.touched_at(),
            "trouble": self.trouble,
            "stats": self.live,
        }


def scan(root: Path) -> Scan:
    """Look at ``root``, or at the namespace that it is. Raises ``OSError`` if ``root`` itself cannot be read."""
    if _is_namespace(root):
        found = _look(root, resolved=True)
        return Scan((found,)) if isinstance(found, Namespace) else Scan((), (found,))
    namespaces: list[Namespace] = []
    refused: list[RefusedFolder] = []
    unknown: list[str] = []
    for name in sorted(_names(root)):
        path = root / name
        if name in IN_DATA_DIRECTORY:
            continue
        found = _look(path)
        if isinstance(found, Namespace):
            namespaces.append(found)
        elif found is not None:
            refused.append(found)
        else:
            unknown.append(name)
    return Scan(tuple(namespaces), tuple(refused), tuple(unknown))


def counters_of(owners: list[OwnerStats]) -> dict[str, int]:
    """Counters summed over processes: all owners of a process have the same counters."""
    total: Counter[str] = Counter()
    for live in {item.live["process"]: item.live for item in owners if item.live}.values():
        total.update(live["counters"])
    return dict(total)


def hit_rate(counters: dict[str, int]) -> float | None:
    """Pages found per page asked for; None before the first question."""
    asked = counters.get("asked_pages", 0)
    return counters.get("found_pages", 0) / asked if asked else None


def owner_stats(namespace: Namespace, owner: Owner) -> OwnerStats:
    """Read its journal and its stats file. Never raises: see ``trouble``."""
    stats = OwnerStats(owner, trouble="; ".join(owner.foreign))
    if owner.foreign:
        return stats
    try:
        with namespace.acting():
            stats.live = _live(owner)
            _count_pages(stats, namespace)
    except Exception as exc:  # noqa: BLE001 - one damaged owner must not hide the others
        stats.trouble = said(exc)
    return stats


def said(exc: Exception) -> str:
    """Text of an error about one owner."""
    if isinstance(exc, JournalError):
        return str(exc)
    if isinstance(exc, OSError):
        return f"{exc.filename or 'a file'}: {exc.strerror or exc}"
    return f"its files make no sense: {type(exc).__name__}: {exc}"


def _count_pages(stats: OwnerStats, namespace: Namespace) -> None:
    owner = stats.owner
    state = recover(owner.directory, owner.name, namespace.name)
    stats.journal_bytes = (
        journal_path(owner.directory, owner.name, state.header.generation).stat().st_size
    )
    stats.pages = len(state.records)
    kinds, counts = np.unique(state.records["flags"] & 0xFF, return_counts=True)
    stats.checksums = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
    stats.slots = sum(item.slot_count for item in state.header.files)
    stats.payload_bytes = state.header.files[0].payload_bytes


def is_read_only(directory: Path) -> bool:
    """True on media that cannot be written: commands look there without asking for more."""
    try:
        return bool(os.statvfs(directory).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _look(path: Path, *, resolved: bool = False) -> Any:
    """A ``Namespace``, a ``RefusedFolder``, or None for what is no namespace. ``resolved``: the user named it."""
    try:
        found = path.stat() if resolved else path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            linked = stat.S_ISLNK(found.st_mode) and path.is_dir()
            return (
                RefusedFolder(path, "is a link to a folder: not followed", ours=False)
                if linked
                else None
            )
        if reason := refusal(found.st_uid):
            return RefusedFolder(path, reason, ours=False) if _may_be_namespace(path) else None
        with acting_as(found.st_uid, found.st_gid):
            return _namespace(path, found) if _is_namespace(path) else None
    except OSError as exc:
        return RefusedFolder(path, f"cannot be read: {exc.strerror or exc}", ours=True)


def _names(directory: Path) -> list[str]:
    """At most ``_NAMES_MAX`` names. Raises ``OSError``."""
    with os.scandir(directory) as entries:
        found = [entry.name for entry in islice(entries, _NAMES_MAX + 1)]
    if len(found) > _NAMES_MAX:
        raise OSError(0, f"holds more than {_NAMES_MAX} files")
    return found


def _is_namespace(directory: Path) -> bool:
    return any(name == _MANIFEST or _OWNED.match(name) for name in _names(directory))


def _may_be_namespace(directory: Path) -> bool:
    """Of a folder that may be unreadable."""
    try:
        return _is_namespace(directory)
    except OSError:
        return True


def _namespace(directory: Path, folder: os.stat_result) -> Namespace:
    files: dict[str, list[Path]] = {}
    temporary: dict[str, list[Path]] = {}
    foreign: dict[str, list[str]] = {}
    unknown: list[str] = []
    for name in sorted(_names(directory)):
        owned, unfinished = _OWNED.match(name), _TEMPORARY.match(name)
        match = owned or unfinished
        if match is None or not match["owner"]:
            if name != _MANIFEST and match is None:
                unknown.append(name)
            continue
        try:
            reason = distrust((directory / name).lstat(), folder.st_uid)
        except FileNotFoundError:
            continue
        if reason:
            foreign.setdefault(match["owner"], []).append(f"{name} {reason}")
        else:
            (files if owned else temporary).setdefault(match["owner"], []).append(directory / name)
    owners = tuple(
        _owner(directory, name, files.get(name, []), temporary.get(name, []), foreign.get(name, []))
        for name in sorted({*files, *temporary, *foreign})
    )
    fields = manifest_of(read_object(directory / _MANIFEST))
    shared = bool(folder.st_mode & 0o022)
    return Namespace(
        directory, fields, owners, tuple(unknown), folder.st_uid, folder.st_gid, shared
    )


def _owner(
    directory: Path, name: str, files: list[Path], temporary: list[Path], foreign: list[str]
) -> Owner:
    lock = directory / f"{name}.lock"
    locked = lock in files
    alive = False
    try:
        if locked:
            alive = is_locked(lock)
        elif not any(reason.startswith(lock.name) for reason in foreign):
            alive = any(is_being_written(path) is not False for path in files)
    except OSError as exc:
        foreign = [*foreign, f"{lock.name} cannot be opened: {exc.strerror or exc}"]
    return Owner(directory, name, locked, alive, tuple(files), tuple(temporary), tuple(foreign))


def _stats(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        with suppress(OSError):
            yield path.lstat()


def _live(owner: Owner) -> dict[str, Any]:
    path = stats_path(owner.directory, owner.name)
    return stats_of(read_object(path)) if path in owner.files else {}
