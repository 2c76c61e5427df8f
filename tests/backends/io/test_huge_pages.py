"""What the kernel's map of this process says of an address."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.io import pinned_memory as module
from flexkv_sglang.backends.io.pinned_memory import huge_pages

MAPS = """\
7f0000000000-7f0000400000 rw-p 00000000 00:11 167301                     /anon_hugepage (deleted)
7f0000400000-7f0000800000 rw-p 00000000 00:00 0
7f0000800000-7f0000c00000 rw-s 00000000 00:01 2051                       /dev/zero (deleted)
7f0000c00000-7f0000d00000 r--p 00000000 fe:00 77                         /usr/lib/libc.so.6
"""


@pytest.mark.parametrize("mode", ["always [madvise] never", "always madvise [never]"])
def test_the_map_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    (tmp_path / "maps").write_text(MAPS)
    (tmp_path / "enabled").write_text(mode + "\n")
    monkeypatch.setattr(module, "_MAPS", tmp_path / "maps")
    monkeypatch.setattr(module, "_TRANSPARENT", tmp_path / "enabled")
    given = "none" if "[never]" in mode else "transparent"
    found = [huge_pages(0x7F0000000000 + step) for step in range(0, 5 << 22, 1 << 22)]
    assert found == ["reserved", given, "none", "none", "unknown"]


def test_shared_memory_of_this_process_has_none() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 1 << 22), np.uint8)
    assert huge_pages(memory.ctypes.data) == "none"


def test_no_map_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAPS", tmp_path / "nothing")
    assert huge_pages(0) == "unknown"
