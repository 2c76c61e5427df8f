"""Allocation of slot files: preallocation in pieces, and the holes of a sparse copy."""

from __future__ import annotations

import ctypes
import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

_PIECE = 16 << 20
"""Allocated at once. btrfs frees an extent with its last byte only, so a file is made of pieces of this size."""

_SAY_S = 10.0
_HOLES_MIN = 1 << 20


def preallocate(fd: int, path: Path, byte_count: int) -> None:
    """Allocate all blocks of a new file. Raises ``OSError`` (ENOSPC).

    A file system without fallocate (ext3, NFS 3) gets every block written, which takes long: that is logged.
    """
    written, said_at = not _fallocate(fd, 0, min(_PIECE, byte_count)), time.monotonic()
    if written:
        text = "flexkv: %s: this file system cannot preallocate: %d bytes are written, which takes a while"
        logger.warning(text, path, byte_count)
    for start in range(0, byte_count, _PIECE):
        os.posix_fallocate(fd, start, min(_PIECE, byte_count - start))
        now = time.monotonic()
        if now - said_at >= _SAY_S:
            said_at = now
            logger.info("flexkv: %s: %d of %d bytes are allocated", path, start, byte_count)


def holes(path: Path) -> int:
    """Bytes of a file that have no blocks yet: a copy that skips zeros makes a sparse file. Raises ``OSError``."""
    status = path.stat()
    missing = status.st_size - status.st_blocks * 512
    return missing if missing >= _HOLES_MIN else 0


def fill_holes(path: Path) -> bool:
    """Give every byte of a file its block; what it holds stays. False if the file system has no fallocate.

    Raises ``OSError`` (ENOSPC).
    """
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        return all(
            _fallocate(fd, start, min(_PIECE, size - start)) for start in range(0, size, _PIECE)
        )
    finally:
        os.close(fd)


def _fallocate(fd: int, start: int, byte_count: int) -> bool:
    """fallocate(2), without glibc's way of writing every block. False: the file system has none, or it failed."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
    if call is None or byte_count <= 0:
        return False
    result = call(
        ctypes.c_int(fd), ctypes.c_int(0), ctypes.c_int64(start), ctypes.c_int64(byte_count)
    )
    return bool(result == 0)


def commit_freed(directory: Path) -> None:
    """Make freed blocks count as free: btrfs and others count them with the next commit, up to 30 s later."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        ctypes.CDLL(None).syncfs(fd)
    finally:
        os.close(fd)
