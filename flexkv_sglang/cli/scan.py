"""Scans a directory: namespaces, owners, their files and figures, and unknown entries. Changes nothing."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from flexkv_sglang.backends.slots.journal import journal_path, recover, stats_path
from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.errors import JournalError
from flexkv_sglang.sharing.run_dir import IN_DATA_DIRECTORY

_OWNED = re.compile(
    r"^(?P<owner>[0-9a-f]{12})\."
    r"(?:lock|stats\.json|\d+\.slots|(?P<generation>\d+)\.(?:journal|snap))$"
)
_TEMPORARY = re.compile(r"^(?:(?P<owner>[0-9a-f]{12})|NAMESPACE\.json)\..*\.tmp$")


@dataclass(frozen=True, slots=True)
class Owner:
    """The files of one owner. ``locked``: it has a lock file; ``alive``: a process held it during the scan."""

    directory: Path
    name: str
    locked: bool
    alive: bool
    files: tuple[Path, ...]
    temporary: tuple[Path, ...]

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
        return sum(
            path.stat().st_blocks * 512 for path in self.files + self.temporary if path.exists()
        )

    def touched_at(self) -> float:
        """Time of the last write to any of the files, as ``time.time()``."""
        return max((path.stat().st_mtime for path in self.files if path.exists()), default=0.0)


@dataclass(frozen=True, slots=True)
class Namespace:
    """One namespace folder. ``fields``: NAMESPACE.json, empty if there is none or it cannot be read."""

    directory: Path
    fields: dict[str, Any]
    owners: tuple[Owner, ...]
    unknown: tuple[str, ...]

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.name

    @property
    def buffer_bytes(self) -> list[int]:
        """Sizes of a page's buffers in stored order, or [] if unknown."""
        return [int(size) for size in self.fields.get("buffer_bytes") or []]


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


def namespaces(root: Path) -> list[Namespace]:
    """Namespaces under ``root``, or ``root`` itself if it is one."""
    if _is_namespace(root):
        return [_scan(root)]
    return [_scan(path) for path in sorted(root.iterdir()) if path.is_dir() and _is_namespace(path)]


def unknown_entries(root: Path) -> list[str]:
    """Entries of ``root`` that are neither namespaces nor files of sharing between machines."""
    if _is_namespace(root):
        return []
    return sorted(
        path.name
        for path in root.iterdir()
        if path.name not in IN_DATA_DIRECTORY and not (path.is_dir() and _is_namespace(path))
    )


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
    """Read its journal and its stats file. Never raises for their contents: see ``trouble``."""
    stats = OwnerStats(owner, live=_live(owner))
    try:
        state = recover(owner.directory, owner.name, namespace.name)
        path = journal_path(owner.directory, owner.name, state.header.generation)
        stats.journal_bytes = path.stat().st_size
        stats.pages = len(state.records)
        kinds, counts = np.unique(state.records["flags"] & 0xFF, return_counts=True)
        stats.checksums = dict(zip(kinds.tolist(), counts.tolist(), strict=True))
        stats.slots = sum(item.slot_count for item in state.header.files)
        stats.payload_bytes = state.header.files[0].payload_bytes
    except (JournalError, OSError) as exc:
        stats.trouble = str(exc)
    return stats


def is_alive(directory: Path, owner: str) -> bool:
    """True if a process holds the lock. Takes it for some microseconds: a server that starts in that time does not
    adopt this owner."""
    lock = OwnerLock.try_take(directory, owner)
    if lock is None:
        return True
    lock.close()
    return False


def _is_namespace(directory: Path) -> bool:
    names = os.listdir(directory)
    return "NAMESPACE.json" in names or any(_OWNED.match(name) for name in names)


def _scan(directory: Path) -> Namespace:
    files: dict[str, list[Path]] = {}
    temporary: dict[str, list[Path]] = {}
    unknown: list[str] = []
    for name in sorted(os.listdir(directory)):
        owned, unfinished = _OWNED.match(name), _TEMPORARY.match(name)
        if owned:
            files.setdefault(owned["owner"], []).append(directory / name)
        elif unfinished and unfinished["owner"]:
            temporary.setdefault(unfinished["owner"], []).append(directory / name)
        elif name != "NAMESPACE.json":
            unknown.append(name)
    owners = tuple(
        _owner(directory, name, files.get(name, []), temporary.get(name, []))
        for name in sorted({*files, *temporary})
    )
    return Namespace(directory, _fields(directory / "NAMESPACE.json"), owners, tuple(unknown))


def _owner(directory: Path, name: str, files: list[Path], temporary: list[Path]) -> Owner:
    locked = directory / f"{name}.lock" in files
    alive = locked and is_alive(directory, name)
    return Owner(directory, name, locked, alive, tuple(files), tuple(temporary))


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _live(owner: Owner) -> dict[str, Any]:
    try:
        fields = json.loads(stats_path(owner.directory, owner.name).read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(fields, dict) and fields.keys() >= {"process", "counters", "written_at"}
    return fields if whole else {}
