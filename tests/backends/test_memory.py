"""AlignedMemory: aligned, writable to its last byte, and not there in a forked child."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.memory import HUGE_PAGE, AlignedMemory


@pytest.mark.parametrize(("huge_pages", "align"), [(False, 4096), (True, HUGE_PAGE)])
def test_address_and_size_are_aligned_and_the_view_is_that_memory(
    huge_pages: bool, align: int
) -> None:
    memories = [AlignedMemory(5000, huge_pages=huge_pages) for _ in range(3)]
    for number, memory in enumerate(memories):
        assert memory.address % align == 0
        assert memory.byte_count == align * -(-5000 // align)
        assert len(memory.view) == memory.byte_count
        ctypes.memset(memory.address, number + 1, memory.byte_count)
    for number, memory in enumerate(memories):
        assert memory.view[0] == memory.view[-1] == number + 1
        assert bytes(memory.view) == bytes([number + 1]) * memory.byte_count


def test_rows_lie_one_after_the_other() -> None:
    memory = AlignedMemory(3 * 8192)
    rows = memory.rows(8192, 3)
    assert rows.dtype == np.uint64
    assert (rows - np.uint64(memory.address)).tolist() == [0, 8192, 16384]
    with pytest.raises(AssertionError):
        memory.rows(8192, 4)


def test_a_forked_child_does_not_get_it() -> None:
    memory = AlignedMemory(64 << 10, huge_pages=True)
    ctypes.memset(memory.address, 1, memory.byte_count)
    flags = _flags_at(memory.address)
    assert "dc" in flags, "MADV_DONTFORK"
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()


def _flags_at(address: int) -> list[str]:
    """The kernel's flags of the mapping that holds ``address`` (proc(5), smaps)."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(" ", 1)[0]
        if "-" in head and ":" not in head:
            start, end = (int(part, 16) for part in head.split("-"))
            inside = start <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(hex(address))
