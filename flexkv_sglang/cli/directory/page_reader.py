"""Reads the pages of one owner from its slot file and verifies them. Read-only.

Slots are read in their order on disk, adjacent ones together, with O_DIRECT where that works, so that the medium is
verified and not the page cache.
"""

from __future__ import annotations

import errno
import os
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.checksum import ChecksumKind, page_checksum
from flexkv_sglang.backends.memory import AlignedMemory
from flexkv_sglang.backends.safe_files import open_own
from flexkv_sglang.backends.slots.records import Records, SlotClass
from flexkv_sglang.cli.output import ProgressLine
from flexkv_sglang.types import PageKey

_BUFFER_BYTES = 8 << 20


class Verdict(IntEnum):
    """The result of one page."""

    RIGHT = 0
    WRONG = 1  # length or checksum
    UNREADABLE = 2  # an I/O error, or beyond the end of the file
    UNPROVEN = 3  # written with ``verify: off``: there is no checksum


Verdicts = npt.NDArray[np.uint8]


class PageReader:
    """Verifies pages of one slot file. Raises ``OSError`` if it cannot be opened. Context manager."""

    def __init__(self, path: Path, slot_class: SlotClass, buffer_bytes: list[int]) -> None:
        self._class = slot_class
        whole = sum(buffer_bytes) == slot_class.payload_bytes
        self._parts = buffer_bytes if whole else [slot_class.payload_bytes]
        self._batch = max(1, _BUFFER_BYTES // slot_class.slot_bytes)
        self._memory = AlignedMemory(self._batch * slot_class.slot_bytes)
        self._view, self._address = self._memory.view, self._memory.address
        self._path = path
        self._fd = _open(path)

    def __enter__(self) -> PageReader:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def verify(self, records: Records, progress: ProgressLine | None = None) -> Verdicts:
        """One verdict per PUT record, uint8 ``[n]``."""
        verdicts = np.zeros(len(records), np.uint8)
        order = np.argsort(records["slot"], kind="stable")
        slots = records["slot"].astype(np.int64)[order]
        start = 0
        while start < len(order):
            stop = start + 1
            while (
                stop < len(order)
                and stop - start < self._batch
                and slots[stop] == slots[stop - 1] + 1
            ):
                stop += 1
            rows = order[start:stop]
            verdicts[rows] = self._run(records, rows, int(slots[start]))
            start = stop
            if progress is not None:
                progress.add(len(rows), len(rows) * self._class.payload_bytes)
        return verdicts

    def _run(self, records: Records, rows: npt.NDArray[np.intp], first: int) -> list[Verdict]:
        """Read adjacent slots at once; one by one if that fails, to find the bad one."""
        size = self._class.slot_bytes
        if self._read(first, len(rows)):
            return [
                self._judge(records[row], self._address + i * size)
                for i, row in enumerate(rows.tolist())
            ]
        if len(rows) == 1:
            return [Verdict.UNREADABLE]
        return [self._run(records, rows[i : i + 1], first + i)[0] for i in range(len(rows))]

    def _read(self, first: int, count: int) -> bool:
        size = self._class.slot_bytes
        view = self._view[: count * size]
        for _ in range(2):
            try:
                return os.preadv(self._fd, [view], first * size) == len(view)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    return False
                os.close(self._fd)  # O_DIRECT accepted at open, refused at read
                self._fd = open_own(self._path)
        return False

    def _judge(self, record: np.void, address: int) -> Verdict:
        kind = int(record["flags"]) & 0xFF
        if int(record["len"]) != self._class.payload_bytes or kind not in list(ChecksumKind):
            return Verdict.WRONG
        if kind == ChecksumKind.NONE:
            return Verdict.UNPROVEN
        key = PageKey(record["key"].tobytes())
        layouts = [self._parts]
        if kind == ChecksumKind.XXH3_64_SAMPLED:  # a bounced page was sampled as one buffer
            layouts.append([self._class.payload_bytes])
        for lengths in layouts:
            starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).tolist()
            parts = [(address + at, length) for at, length in zip(starts, lengths, strict=True)]
            if page_checksum(ChecksumKind(kind), key, parts) == int(record["sum"]):
                return Verdict.RIGHT
        return Verdict.WRONG


def _open(path: Path) -> int:
    try:
        return open_own(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return open_own(path)
