"""Refuses journals whose header asks for more than the owner's files can hold, before anything is allocated for them.

A header with a right CRC may still hold any number: a command must survive one that was made on purpose.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from flexkv_sglang.backends.slots.journal import (
    LiveState,
    generations,
    journal_path,
    recover,
    slots_path,
    snapshot_path,
)
from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    JOURNAL_MAGIC,
    RECORD_BYTES,
    Header,
    SlotClass,
)
from flexkv_sglang.cli.directory.trusted_files import READ
from flexkv_sglang.errors import JournalError

_SLOT_BYTES_MAX = 1 << 32
_SLOTS_MAX = 0xFFFFFFFD
_SLOTS_WITHOUT_FILE = 1 << 20  # a slot file may have been cut
_FILES_MAX = 16
_JOURNAL_BYTES_MIN = 64 << 20
_JOURNAL_PER_SLOT = 8 * RECORD_BYTES  # it is rotated at 2


def recover_plausible(directory: Path, owner: str, namespace: str) -> LiveState:
    """As ``recover``. Raises ``JournalError`` also for a header with impossible figures or a journal without end."""
    for generation in generations(directory, owner):
        _refuse_implausible(directory, owner, generation)
    return recover(directory, owner, namespace)


def _refuse_implausible(directory: Path, owner: str, generation: int) -> None:
    name = f"generation {generation}"
    head, size = _head(journal_path(directory, owner, generation))
    try:
        header = Header.unpack(head, JOURNAL_MAGIC)
    except JournalError:
        return  # refused there too, and an older generation may be valid
    except Exception as exc:
        raise JournalError(f"{name}: header fields make no sense: {type(exc).__name__}") from exc
    numbers: tuple[Any, ...] = (header.generation, header.base_seq, header.record_count)
    if not all(map(_is_number, (*numbers, header.crc_seed, header.body_crc))):
        raise JournalError(f"{name}: header numbers are not whole numbers from 0 to 2^63")
    if not 1 <= len(header.files) <= _FILES_MAX:
        raise JournalError(f"{name}: {len(header.files)} slot files, not 1 to {_FILES_MAX}")
    slots = sum(_slots(directory, owner, item) for item in header.files)
    if 8 * slots > os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2:
        raise JournalError(f"{name}: {slots} slots need more memory than there is")
    longest = max(_JOURNAL_BYTES_MIN, _JOURNAL_PER_SLOT * slots + HEADER_BYTES)
    for length in (size, _size(snapshot_path(directory, owner, generation))):
        if length > longest:
            raise JournalError(f"{name}: {length} bytes of journal or snapshot for {slots} slots")


def _slots(directory: Path, owner: str, item: SlotClass) -> int:
    """Their number. Raises ``JournalError``."""
    fields: tuple[Any, ...] = (item.slot_bytes, item.payload_bytes, item.slot_count)
    if not all(map(_is_number, fields)) or not (
        0 < item.payload_bytes <= item.slot_bytes <= _SLOT_BYTES_MAX
        and item.slot_bytes % 4096 == 0
        and 1 <= item.slot_count <= _SLOTS_MAX
    ):
        raise JournalError(f"its header has impossible slots: {item}")
    there = _size(slots_path(directory, owner, item.slot_bytes)) // item.slot_bytes
    if item.slot_count > max(there, _SLOTS_WITHOUT_FILE):
        raise JournalError(f"its header has {item.slot_count} slots, its slot file {there}")
    return item.slot_count


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _head(path: Path) -> tuple[bytes, int]:
    """First bytes and size of a regular file. Raises ``OSError``, ``JournalError``."""
    fd = os.open(path, READ)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise JournalError(f"{path.name} is no regular file")
        return os.pread(fd, HEADER_BYTES, 0), found.st_size
    finally:
        os.close(fd)


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:
        return 0
