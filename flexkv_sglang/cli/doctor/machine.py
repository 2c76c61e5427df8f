"""Facts about the machine: file system, space, working I/O, huge pages, locked memory."""

from __future__ import annotations

import os
import re
import resource
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.backends.io.probe import IoMode, file_system, in_memory, probe_directory
from flexkv_sglang.backends.slots.space.disk_space import floor_bytes, free_bytes, total_bytes
from flexkv_sglang.errors import TierUnavailableError

NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ceph", "9p", "afs", "lustre", "gpfs", "beegfs"),
        *("glusterfs", "fuse.glusterfs", "fuse.sshfs", "fuse.s3fs", "fuse.juicefs", "fuse.ceph"),
    }
)
"""File systems of other machines: clients do not share one page cache, nor always ``flock``."""


@dataclass(frozen=True, slots=True)
class Disk:
    """``mode``: I/O that a real 4 KiB write and read proved; None with the reason in ``trouble``."""

    file_system: str
    free_bytes: int
    total_bytes: int
    floor_bytes: int
    mode: IoMode | None
    trouble: str = ""
    memory: bool = False


@dataclass(frozen=True, slots=True)
class Machine:
    """``memlock``: bytes that may be locked, None without a limit; ``of``: the process or shell with this limit."""

    huge_pages: int
    huge_pages_free: int
    transparent: str
    memlock: int | None
    of: str


def look_at_disk(directory: Path, min_free: int | None, io_engine: str = "auto") -> Disk:
    """Writes and removes a file of 4 KiB there. Raises ``OSError`` if the directory cannot be read."""
    mode, trouble = None, ""
    try:
        mode = probe_directory(str(directory), io_engine)
    except OSError as exc:
        trouble = exc.strerror or str(exc)
    except TierUnavailableError as exc:
        trouble = str(exc)
    return Disk(
        file_system(str(directory)),
        free_bytes(directory),
        total_bytes(directory),
        floor_bytes(directory, min_free),
        mode,
        trouble,
        in_memory(str(directory)),
    )


def look_at_machine(pid: int | None) -> Machine:
    """``pid``: a server whose limits count, if it is on this machine and readable."""
    memory = _read(Path("/proc/meminfo"))
    limits = _read(Path(f"/proc/{pid}/limits")) if pid else ""
    locked = re.search(r"Max locked memory\s+(\S+)", limits)
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if locked:
        limit = None if locked[1] == "unlimited" else int(locked[1])
    else:
        limit = None if soft == resource.RLIM_INFINITY else soft
    transparent = re.search(
        r"\[(\w+)\]", _read(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    )
    return Machine(
        _number(memory, "HugePages_Total"),
        _number(memory, "HugePages_Free"),
        transparent[1] if transparent else "unknown",
        limit,
        f"process {pid}" if locked else f"this shell (user {os.geteuid()})",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(text: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+)", text, re.MULTILINE)
    return int(match[1]) if match else 0
