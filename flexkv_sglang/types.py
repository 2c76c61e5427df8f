"""Names that all folders share. Imports nothing of ours.

A *page* is SGLang's unit of KV cache (``page_size`` tokens, all layers). It is found by its
``PageKey`` and stored in one *slot* of a slot file: the payload of the page, then padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

import numpy as np
import numpy.typing as npt

PageKey = NewType("PageKey", bytes)
"""32 bytes: SGLang's SHA-256 page hash. It chains over the prefix, so a key stands for its whole prefix."""

SlotId = NewType("SlotId", int)

FREE, WRITING, READY, DOOMED, SUSPENDED, RETIRED = range(6)
"""States of a slot; see ``TierIndex``."""

NO_SLOT = -1
"""In place of a slot number: there is none."""

U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]
F64 = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
BoolArray = npt.NDArray[np.bool_]
KeyArray = npt.NDArray[np.void]
"""Page keys as V32, as ``frombuffer`` reads joined keys."""

SECTOR = 4096
"""Offsets, lengths and slot sizes on the medium are multiples of this (4Kn disks)."""

MEMORY_ALIGN = 512
"""Memory addresses handed to O_DIRECT must be multiples of this (``statx(STATX_DIOALIGN)``)."""


def round_up(value: int, step: int) -> int:
    """``value`` rounded up to a multiple of ``step``."""
    return -(-value // step) * step


@dataclass(frozen=True, slots=True)
class PageBuffers:
    """Where ``n`` pages lie in memory: ``b`` buffers each, in the order they are stored.

    ``addresses``: uint64 ``[n, b]``; ``lengths``: uint64 ``[b]`` in bytes, the same for every page.
    It has addresses only: the caller keeps the memory mapped until the call that uses them returns.
    """

    addresses: U64
    lengths: U64

    def __post_init__(self) -> None:
        assert self.addresses.ndim == 2, self.addresses.shape
        assert self.addresses.dtype == np.uint64
        assert self.lengths.dtype == np.uint64
        assert self.addresses.shape[1] == len(self.lengths), (self.addresses.shape, self.lengths)

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def payload_bytes(self) -> int:
        """Bytes of one page."""
        return int(self.lengths.sum())

    def take(self, rows: npt.NDArray[np.intp] | list[int] | slice) -> PageBuffers:
        """The same for some of the pages."""
        return PageBuffers(self.addresses[rows], self.lengths)


@dataclass(frozen=True, slots=True)
class Reserved:
    """Answer of ``reserve``. ``granted``: (position in the batch, slot). ``victims``: (key, slot) to tombstone.

    ``refused``: positions for which no slot could be freed. ``declined``: positions that the policy values less than
    the cached pages. Pages at other positions were present already.
    """

    granted: list[tuple[int, SlotId]]
    victims: list[tuple[PageKey, SlotId]]
    refused: list[int]
    declined: list[int]
