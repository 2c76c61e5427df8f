"""Host memory that every contender of a benchmark uses, in this process and in others.

On a virtual machine the speed of a transfer depends on the physical place of its memory: the same read took 1.3 or
2.7 GB/s in different runs of fio, which takes fresh memory each time. So all contenders use the same physical pages:
a file in shared memory that each of them maps.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np

_SHARED_MEMORY = Path("/dev/shm")
_EXTRA = 4096  # fio maps a page more than its buffers, to align them


class HostMemory:
    """``pages`` pages of ``page_bytes`` bytes: random, mapped here as ``bytes`` (uint8) and lying in ``path``.

    ``OSError`` if there is too little shared memory. ``close`` removes the file; mappings stay valid.
    """

    def __init__(self, page_bytes: int, pages: int) -> None:
        self.page_bytes, self.pages = page_bytes, pages
        size = page_bytes * pages
        place = _SHARED_MEMORY if _SHARED_MEMORY.is_dir() else None
        fd, name = tempfile.mkstemp(prefix="flexkv-bench-", dir=place)
        self.path = Path(name)
        try:
            os.posix_fallocate(fd, 0, size + _EXTRA)
            self.bytes = np.frombuffer(mmap.mmap(fd, size), np.uint8)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(fd)
        block = np.frombuffer(np.random.default_rng(7).bytes(1 << 20), np.uint8)
        for start in range(0, size, len(block)):
            self.bytes[start : start + len(block)] = block[: size - start]
        stamps = self.bytes.reshape(-1, 4096)[:, :8].view(np.uint64)
        stamps[:, 0] = np.arange(len(stamps), dtype=np.uint64)  # no two blocks are equal

    def close(self) -> None:
        """Idempotent."""
        self.path.unlink(missing_ok=True)
