"""Which I/O works in a directory, found out by a real 4 KiB write and read, never by ``open`` alone.

Several file systems accept O_DIRECT in ``open`` and refuse the first write; a store that trusts the
open loses every page in silence.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io.posix_io import PosixIo
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.ring import Ring
from flexkv_sglang.backends.io.transfer import IoEngine, PageTransfer
from flexkv_sglang.backends.io.transfer import IoMode as IoMode  # what a probe answers
from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.types import MEMORY_ALIGN, SECTOR, PageBuffers

LADDER = ("io_uring", "threads", "buffered")
"""io_uring with O_DIRECT; threads with O_DIRECT; threads through the page cache."""

_PROBE_TIMEOUT_S = 10.0
_MOUNTS = Path("/proc/self/mountinfo")  # format: proc_pid_mountinfo(5)


def probe_directory(directory: str, wanted: str = "auto") -> IoMode:
    """The best rung that really moves bytes in ``directory``; ``wanted`` names one rung or "auto".

    Raises ``TierUnavailableError`` with every rung's error when none works, ``OSError`` when no file can
    be made in the directory at all.
    """
    reasons: list[str] = []
    ladder = LADDER if wanted == "auto" else (wanted,)
    if wanted == "auto" and in_memory(directory):
        ladder, reasons = ("buffered",), ["the file system is memory"]
    for engine in ladder:
        direct = engine != "buffered"
        try:
            align = _try(directory, engine, direct)
        except OSError as exc:
            if exc.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOENT, errno.EDQUOT):
                raise
            reasons.append(f"{engine}: {exc.strerror or exc}")
            continue
        return IoMode(engine, direct, align, "; ".join(reasons))
    raise TierUnavailableError(f"no I/O works in {directory}: {'; '.join(reasons)}")


def can_read(fd: int, mode: IoMode) -> bool:
    """Can the first 4 KiB of a file be read, on a disk that takes no writes? ``fd``: opened as ``mode`` says."""
    try:
        io = make_engine(mode.engine)
        try:
            memory = mmap.mmap(-1, SECTOR)
            return _move_sector(io, fd, np.frombuffer(memory, np.uint8), 1) == SECTOR
        finally:
            io.close()
    except OSError:
        return False


def in_memory(directory: str) -> bool:
    """True on tmpfs: plain copies by several threads beat a ring there, and O_DIRECT means nothing."""
    return file_system(directory) in ("tmpfs", "ramfs")


def file_system(directory: str, mounts: Path = _MOUNTS) -> str:
    """Its type as the kernel names it, such as "ext4"; "" if that cannot be told. ``mounts``: what is read."""
    device = os.stat(directory).st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return ""
    for left, right in (line.split(" - ", 1) for line in lines):
        if left.split()[2] == wanted:
            return right.split()[0]
    return ""


def make_engine(kind: str, traffic: ReadPriority | None = None) -> IoEngine:
    """A fresh engine for a probed mode. ``traffic``: shared by the engines whose writes give way to reads."""
    return Ring(traffic=traffic) if kind == "io_uring" else PosixIo(kind=kind, traffic=traffic)


def _try(directory: str, engine: str, direct: bool) -> int:
    """Write 4 KiB, read it back, compare; then the same in 512-byte pieces. Returns the segment alignment."""
    io = make_engine(engine)
    try:
        fd, path = tempfile.mkstemp(prefix=".flexkv-probe-", dir=directory)
        os.close(fd)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
        finally:
            os.unlink(
                path
            )  # before the I/O: a kill during it, or a disk that hangs, leaves no file
        try:
            _round_trip(io, fd, pieces=1)
            return _segment_align(io, fd) if direct else 1
        finally:
            os.close(fd)
    finally:
        io.close()


def _segment_align(io: IoEngine, fd: int) -> int:
    try:
        _round_trip(io, fd, pieces=SECTOR // MEMORY_ALIGN)
    except OSError:
        return SECTOR
    return MEMORY_ALIGN


def _round_trip(io: IoEngine, fd: int, pieces: int) -> None:
    memory = mmap.mmap(-1, 4 * SECTOR)
    array = np.frombuffer(memory, np.uint8)
    source, target = array[:SECTOR], array[2 * SECTOR : 3 * SECTOR]
    source[:] = np.frombuffer(os.urandom(SECTOR), np.uint8)
    for part in (source, target):
        moved = _move_sector(io, fd, part, pieces, writing=part is source)
        if moved != SECTOR:
            raise OSError(-moved if moved < 0 else errno.EIO, f"moved {moved} of {SECTOR} bytes")
    if not np.array_equal(source, target):
        raise OSError(errno.EIO, "read back other bytes than were written")


def _move_sector(
    io: IoEngine, fd: int, memory: npt.NDArray[np.uint8], pieces: int, *, writing: bool = False
) -> int:
    """The first sector of a file, in ``pieces`` buffers of one operation: bytes moved or -errno."""
    piece = SECTOR // pieces
    steps = np.arange(pieces, dtype=np.uint64) * np.uint64(piece)
    transfer = PageTransfer(
        np.array([fd], np.int32),
        np.zeros(1, np.uint64),
        (),
        PageBuffers(
            (np.uint64(memory.ctypes.data) + steps)[None, :], np.full(pieces, piece, np.uint64)
        ),
        time.monotonic() + _PROBE_TIMEOUT_S,
        writing=writing,
    )
    io.move(transfer)
    return int(transfer.moved[0])
