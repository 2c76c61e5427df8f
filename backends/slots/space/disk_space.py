"""How much a disk has left, and how much of that is not ours to take."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FLOOR_MAX = 1 << 30


def free_bytes(directory: Path) -> int:
    """What an unprivileged user can still allocate on the file system of ``directory``."""
    stat = os.statvfs(directory)
    return stat.f_bavail * stat.f_frsize


def unallocated_bytes(directory: Path) -> int:
    """As ``free_bytes``, with what is reserved for root: it shows what was freed also while root's part is in use."""
    stat = os.statvfs(directory)
    return stat.f_bfree * stat.f_frsize


def total_bytes(directory: Path) -> int:
    """Size of the file system of ``directory``."""
    stat = os.statvfs(directory)
    return stat.f_blocks * stat.f_frsize


def floor_bytes(directory: Path, wanted: int | None) -> int:
    """Free space that is left to others: ``wanted``, or 2 % of the file system and at most 1 GiB."""
    if wanted is not None:
        return wanted
    return min(_FLOOR_MAX, total_bytes(directory) // 50)


def is_no_space(exc: OSError) -> bool:
    """True for the errors that mean a full disk or quota."""
    return exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
