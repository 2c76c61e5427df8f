"""What lies in a directory: namespaces, owners, their files, and what is neither. Reads names only."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.sharing.run_dir import IN_DATA_DIRECTORY

_OWNED = re.compile(
    r"^(?P<owner>[0-9a-f]{12})\."
    r"(?:lock|stats\.json|\d+\.slots|(?P<generation>\d+)\.(?:journal|snap))$"
)
_TEMPORARY = re.compile(r"^(?:(?P<owner>[0-9a-f]{12})|NAMESPACE\.json)\..*\.tmp$")


@dataclass(frozen=True, slots=True)
class Owner:
    """One owner's files. ``locked``: it has a lock file; ``alive``: a process held it a moment ago."""

    directory: Path
    name: str
    locked: bool
    alive: bool
    files: tuple[Path, ...]
    temporary: tuple[Path, ...]

    def generation_files(self, generation: int) -> tuple[list[Path], list[Path]]:
        """(journal and snapshot of ``generation``, those of other generations)."""
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
            _stat(path).st_blocks * 512 for path in self.files + self.temporary if path.exists()
        )

    def touched_at(self) -> float:
        """When any of the files was last written, as ``time.time()``."""
        return max((_stat(path).st_mtime for path in self.files if path.exists()), default=0.0)


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


def namespaces(root: Path) -> list[Namespace]:
    """Namespaces under ``root``, or ``root`` itself if it is one."""
    if _is_namespace(root):
        return [_survey(root)]
    return [
        _survey(path) for path in sorted(root.iterdir()) if path.is_dir() and _is_namespace(path)
    ]


def strangers(root: Path) -> list[str]:
    """Entries of ``root`` that are no namespaces, and not what sharing between machines keeps there."""
    if _is_namespace(root):
        return []
    return sorted(
        path.name
        for path in root.iterdir()
        if path.name not in IN_DATA_DIRECTORY and not (path.is_dir() and _is_namespace(path))
    )


def is_alive(directory: Path, owner: str) -> bool:
    """Does a process hold the lock? Takes it for some microseconds: a server that starts at that very
    moment does not adopt this owner."""
    lock = OwnerLock.try_take(directory, owner)
    if lock is None:
        return True
    lock.close()
    return False


def _is_namespace(directory: Path) -> bool:
    names = os.listdir(directory)
    return "NAMESPACE.json" in names or any(_OWNED.match(name) for name in names)


def _survey(directory: Path) -> Namespace:
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


def _stat(path: Path) -> os.stat_result:
    return path.stat()
