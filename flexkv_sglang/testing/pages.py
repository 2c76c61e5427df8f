"""Pages for tests of tiers: keys, deadlines, and memory that is poisoned or filled at random."""

from __future__ import annotations

import hashlib
import mmap
import time

import numpy as np
import numpy.typing as npt

from flexkv_sglang.types import PageBuffers, PageKey

POISON = 0xA5
"""Every byte of a target before a read."""

Bytes = npt.NDArray[np.uint8]


def page_memory(
    count: int, payload_bytes: int, buffers: int = 1, *, shift: int = 0, seed: int | None = None
) -> tuple[Bytes, PageBuffers]:
    """``count`` pages in page-aligned memory (moved by ``shift`` bytes), each in ``buffers`` equal parts.

    Random bytes if ``seed`` is given, else ``POISON``. Returns uint8 ``[count, payload_bytes]`` and its
    addresses; the array keeps the memory alive.
    """
    memory = mmap.mmap(-1, count * payload_bytes + shift + 1)
    flat = np.frombuffer(memory, np.uint8)[shift : shift + count * payload_bytes]
    pages = flat.reshape(count, payload_bytes)
    if seed is None:
        pages[:] = POISON
    else:
        pages[:] = np.random.default_rng(seed).integers(0, 256, pages.shape, dtype=np.uint8)
    assert payload_bytes % buffers == 0
    part = payload_bytes // buffers
    starts = np.arange(count, dtype=np.uint64)[:, None] * np.uint64(payload_bytes)
    steps = np.arange(buffers, dtype=np.uint64)[None, :] * np.uint64(part)
    addresses = np.uint64(flat.ctypes.data) + starts + steps
    return pages, PageBuffers(addresses, np.full(buffers, part, np.uint64))


def keys(count: int, seed: int = 0) -> list[PageKey]:
    """``count`` page keys."""
    return [PageKey(hashlib.sha256(f"{seed}:{i}".encode()).digest()) for i in range(count)]


def soon(seconds: float = 20.0) -> float:
    """A deadline that no healthy call reaches."""
    return time.monotonic() + seconds
