"""Staging: pinned host memory that pages pass on their way between device pools and tiers.

To the stores it is one of SGLang's host pools in the layout ``page_first_direct``: same class name, dtype, shape and
byte order, so its pages have the identity of a HiCache replica's and are shared with it. It is no cache: a row holds
one block, only while a page moves. Each thread that moves pages has rows of its own, named as in ``STAGING_BYTES``.

Imports torch, not SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flexkv_sglang.types import SECTOR, round_up

LAYOUT = "page_first_direct"

STAGING_BYTES: Mapping[str, int] = {"load": 64 << 20, "offload": 32 << 20, "backfill": 32 << 20}
"""Bytes of staging per pool and thread; at least two rows. The rows of backfill have no counterpart on the device."""

_ROWS_MAX = 256


@dataclass(frozen=True, slots=True)
class HostShape:
    """The traits of SGLang's host pool for a device pool that decide the identity of its pages.

    ``stands_for``: its class. ``part_bytes``: bytes of a page's buffers in their order (K, V). ``fields``: its
    attributes that ``integration.pool_identity`` and ``pools.pool_rules`` read.
    """

    stands_for: str
    dtype: torch.dtype
    page_size: int
    part_bytes: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


class StagingRows:
    """Rows of one block each. ``blocks``: uint8 ``[rows, stride]`` on the host, rows at multiples of 4096 bytes.

    ``device_blocks``: the same on ``device``, without the rows of backfill; on a CPU it is the host memory.
    Pinned where ``device`` is CUDA. Threads: one per name in ``STAGING_BYTES``.
    """

    layout = LAYOUT

    def __init__(self, shape: HostShape, device: torch.device) -> None:
        self.stands_for = shape.stands_for
        self.dtype = shape.dtype
        self.page_size = shape.page_size
        for name, value in shape.fields.items():
            setattr(self, name, value)
        self._lengths = shape.part_bytes
        payload = sum(shape.part_bytes)
        self.stride = round_up(payload, SECTOR)
        self._rows: dict[str, range] = {}
        count = 0
        for thread, byte_count in STAGING_BYTES.items():
            start = count
            count += min(max(2, byte_count // self.stride // 2 * 2), _ROWS_MAX)
            self._rows[thread] = range(start, count)
        on_device = device.type != "cpu"
        self.kv_buffer = torch.empty(
            count * self.stride + SECTOR, dtype=torch.uint8, pin_memory=on_device
        )
        first = -self.kv_buffer.data_ptr() % SECTOR
        self.blocks = self.kv_buffer[first : first + count * self.stride].view(count, self.stride)
        self.device_blocks = self.blocks
        if on_device:
            on_both = self._rows["backfill"].start
            self.device_blocks = torch.empty(
                (on_both, self.stride), dtype=torch.uint8, device=device
            )

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """As SGLang's host pools: addresses and lengths of all buffers, page after page; one index per token."""
        base, addresses = self.blocks.data_ptr(), []
        for token in indices[:: self.page_size].tolist():
            start = base + token // self.page_size * self.stride
            for length in self._lengths:
                addresses.append(start)
                start += length
        return addresses, list(self._lengths) * (len(indices) // self.page_size)

    def tokens(self, rows: range) -> torch.Tensor:
        """Token indices of these rows: int64 ``[len(rows) * page_size]``."""
        return torch.arange(rows.start * self.page_size, rows.stop * self.page_size)

    def halves(self, thread: str) -> tuple[range, range]:
        """The rows of a thread in two halves: one is filled while the other is emptied."""
        rows = self._rows[thread]
        middle = rows.start + len(rows) // 2
        return range(rows.start, middle), range(middle, rows.stop)

    def to_device(self, rows: range) -> torch.Tensor:
        """Begin to copy rows to the device, on the current stream; uint8 ``[len(rows), stride]`` there."""
        there, here = self._both(rows)
        if there.device != here.device:
            there.copy_(here, non_blocking=True)
        return there

    def device_rows(self, rows: range) -> torch.Tensor:
        """Rows on the device, uint8 ``[len(rows), stride]``: ``to_device`` fills them, ``to_host`` empties them."""
        return self._both(rows)[0]

    def to_host(self, rows: range) -> None:
        """Begin to copy rows from the device, on the current stream."""
        there, here = self._both(rows)
        if there.device != here.device:
            here.copy_(there, non_blocking=True)

    def _both(self, rows: range) -> tuple[torch.Tensor, torch.Tensor]:
        part = slice(rows.start, rows.stop)
        return self.device_blocks[part], self.blocks[part]


def chunks(count: int, halves: tuple[range, range]) -> Iterator[tuple[slice, range, int]]:
    """``count`` pages through two halves in turn: (pages, rows, number of the half)."""
    start = number = 0
    while start < count:
        half = halves[number % 2]
        stop = min(count, start + len(half))
        yield slice(start, stop), range(half.start, half.start + stop - start), number % 2
        start, number = stop, number + 1
