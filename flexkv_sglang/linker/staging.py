"""Staging: pinned host memory that pages pass on their way between device pools and tiers.

To the stores it is one of SGLang's host pools in the layout ``page_first_direct``: same class name, dtype, shape and
byte order, so its pages have the identity of a HiCache replica's and are shared with it. What it holds is not a
cache but one block per row, in use only while a page moves. Rows are divided into *lanes*, one per thread that
moves pages; nobody else touches them.

Imports torch, not SGLang.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flexkv_sglang.types import SECTOR, round_up

LAYOUT = "page_first_direct"

LANE_BYTES: Mapping[str, int] = {"load": 64 << 20, "offload": 32 << 20, "promote": 32 << 20}
"""Bytes of staging per pool and lane; at least two rows. The promotion lane has no counterpart on the device."""

_ROWS_MAX = 256


@dataclass(frozen=True, slots=True)
class HostShape:
    """What SGLang's host pool of a device pool would be, as far as it decides the identity of its pages.

    ``stands_for``: its class. ``part_bytes``: bytes of a page's buffers in their order (K, V). ``fields``: its
    attributes that ``integration.pool_identity`` and ``pools.pool_rules`` read.
    """

    stands_for: str
    dtype: torch.dtype
    page_size: int
    part_bytes: tuple[int, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)


class StagingPool:
    """Rows of one block each. ``blocks``: uint8 ``[rows, stride]`` on the host, rows at multiples of 4096 bytes.

    ``device_blocks``: the same on ``device`` for all lanes but promotion; on a CPU it is the host memory itself.
    Pinned where ``device`` is CUDA. Threads: one per lane.
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
        self._lanes: dict[str, range] = {}
        for lane, byte_count in LANE_BYTES.items():
            start = max((rows.stop for rows in self._lanes.values()), default=0)
            rows = min(max(2, byte_count // self.stride // 2 * 2), _ROWS_MAX)
            self._lanes[lane] = range(start, start + rows)
        on_device = device.type != "cpu"
        count = self._lanes["promote"].stop
        self.kv_buffer = torch.empty(
            count * self.stride + SECTOR, dtype=torch.uint8, pin_memory=on_device
        )
        first = -self.kv_buffer.data_ptr() % SECTOR
        self.blocks = self.kv_buffer[first : first + count * self.stride].view(count, self.stride)
        self.device_blocks = self.blocks
        if on_device:
            shared = self._lanes["promote"].start
            self.device_blocks = torch.empty(
                (shared, self.stride), dtype=torch.uint8, device=device
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

    def lane(self, name: str) -> range:
        """Rows of a lane."""
        return self._lanes[name]

    def halves(self, lane: str) -> tuple[range, range]:
        """Rows of a lane in two: one is filled while the other is emptied."""
        rows = self._lanes[lane]
        middle = rows.start + len(rows) // 2
        return range(rows.start, middle), range(middle, rows.stop)

    def to_device(self, rows: range) -> torch.Tensor:
        """Begin to copy rows to the device, on the current stream; uint8 ``[len(rows), stride]`` there."""
        there, here = self._both(rows)
        if there.device != here.device:
            there.copy_(here, non_blocking=True)
        return there

    def device_rows(self, rows: range) -> torch.Tensor:
        """Rows on the device, uint8 ``[len(rows), stride]``: what ``to_device`` fills and ``to_host`` empties."""
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
    """``count`` pages through two halves in turn: (which pages, which rows, which half)."""
    start = number = 0
    while start < count:
        half = halves[number % 2]
        stop = min(count, start + len(half))
        yield slice(start, stop), range(half.start, half.start + stop - start), number % 2
        start, number = stop, number + 1
