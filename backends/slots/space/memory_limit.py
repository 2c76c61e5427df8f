"""What may still be taken of memory: slot files on a memory file system count for the container's limit.

The free space of a tmpfs is not free memory. Beyond the limit of a memory cgroup the kernel kills a process, without
a word in its log. Both versions of cgroups count; the limits of all ancestors hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
_RESERVE_PART = 16  # of the limit, for what the process takes later
_PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class Mount:
    """``point``: where it is mounted. ``kind``: type of the file system. ``root``: which part of it is mounted."""

    point: Path
    kind: str
    root: str = "/"
    options: str = ""


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """``place``: the file with the limit. Bytes; ``left`` may be negative. ``reserve`` is for the process itself."""

    place: str
    limit: int
    left: int
    reserve: int


def mounts(proc: Path = _PROC) -> list[Mount]:
    """The mounts that this process sees. Empty if that cannot be read."""
    found = []
    try:
        lines = (proc / "self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return []
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        if len(fields) >= 5 and kind:
            found.append(Mount(Path(_plain(fields[4])), kind[0], _plain(fields[3]), right))
    return found


def mount_of(path: Path) -> Mount | None:
    """The mount that a path lies on, or would lie on if it were made now."""
    resolved = path.resolve()
    best = None
    for mount in mounts():  # of several at one point, the last is on top
        inside = resolved == mount.point or mount.point in resolved.parents
        if inside and (best is None or len(mount.point.parts) >= len(best.point.parts)):
            best = mount
    return best


def is_memory(path: Path) -> bool:
    """Do files there lie in memory?"""
    mount = mount_of(path)
    return mount is not None and mount.kind in _MEMORY_FILE_SYSTEMS


def tightest(proc: Path = _PROC) -> MemoryLimit | None:
    """The limit that leaves the least: of the process's cgroups, their ancestors, and the machine."""
    limits = [*_cgroup_limits(proc), *_machine(proc)]
    return min(limits, key=lambda limit: limit.left - limit.reserve, default=None)


def _cgroup_limits(proc: Path) -> Iterator[MemoryLimit]:
    try:
        lines = (proc / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    every = mounts(proc)
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "":
            mounted = [m for m in every if m.kind == "cgroup2"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            mounted = [m for m in every if m.kind == "cgroup" and "memory" in m.options.split()[-1]]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for mount in mounted[:1]:
            for folder in _lineage(mount, group):
                limit = _limit(folder, *names)
                if limit is not None:
                    yield limit


def _lineage(mount: Mount, group: str) -> list[Path]:
    """The folders of a cgroup and its ancestors, as far as they are mounted here."""
    inside = group
    if mount.root != "/" and (group == mount.root or group.startswith(mount.root + "/")):
        inside = group[len(mount.root) :]
    folder = mount.point / inside.strip("/") if ".." not in inside.split("/") else mount.point
    if not folder.is_dir():  # a container that sees its own group as the root
        folder = mount.point
    return [folder, *(p for p in folder.parents if p == mount.point or mount.point in p.parents)]


def _limit(folder: Path, limit: str, used: str, reclaimable: str) -> MemoryLimit | None:
    allowed, taken = _number(folder / limit), _number(folder / used)
    if allowed is None or taken is None or allowed >= _whole_memory():
        return None
    spare = 0
    try:
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == reclaimable:
                spare = int(value)
    except (OSError, ValueError):
        spare = 0
    left = allowed - max(0, taken - spare)
    return MemoryLimit(str(folder / limit), allowed, left, allowed // _RESERVE_PART)


def _number(path: Path) -> int | None:
    """None: unreadable, or "max"."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _whole_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _machine(proc: Path) -> Iterator[MemoryLimit]:
    try:
        for line in (proc / "meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                whole = _whole_memory()
                yield MemoryLimit("MemAvailable", whole, int(value.split()[0]) * 1024, 0)
    except (OSError, ValueError, IndexError):
        return


def _plain(text: str) -> str:
    """Undo the escapes of mountinfo."""
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text
