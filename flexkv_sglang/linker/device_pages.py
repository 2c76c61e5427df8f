"""Device pages: pools of KV cache on the device, and the blocks that hold one page each.

A block is a page's bytes in the order of SGLang's host layout ``page_first_direct`` (``triton_kernels.layout``). A
``DevicePool`` knows the addresses of its per-layer buffers (``PtrTable``), copies whole pages into blocks, and blocks
back into pages, all layers or one. ``device_models`` knows which pools a model has.

Imports torch, not SGLang. Copies run on the current stream of the calling thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from flexkv_sglang.errors import TierError
from flexkv_sglang.linker.staging import HostShape
from flexkv_sglang.prefix import ALL_PAGES
from flexkv_sglang.triton_kernels.layout import BlockLayout, Part
from flexkv_sglang.triton_kernels.ops import PtrTable, gather_pages, scatter_pages, warmup

QUOTA = 16
"""Programs (CTAs) of a copy kernel at a time: PCIe bounds the copies, and the forward pass keeps the other processors.

Computed, not measured yet.
"""


@dataclass(frozen=True, slots=True)
class DevicePool:
    """One pool. ``source``: the pool whose indices and keys it shares ("kv" for an indexer), else its own name.

    ``policy``: the pages of it that a prefix needs (``prefix``). ``page_size``: indices per page (1 for Mamba state).
    ``layers``: SGLang's transfer layer -> layer of this pool; other transfer layers have nothing to wait for.
    """

    name: str
    source: str
    policy: str
    page_size: int
    tables: tuple[PtrTable, ...]
    layout: BlockLayout
    layers: Mapping[int, int]
    shape: HostShape

    @property
    def device(self) -> torch.device:
        """The device of its buffers."""
        return self.tables[0].device

    @property
    def for_every_page(self) -> bool:
        """True when each page of a prefix needs it, not only the end."""
        return self.policy == ALL_PAGES

    def page_ids(self, indices: torch.Tensor) -> torch.Tensor:
        """Indices as SGLang gives them (int64 ``[pages * page_size]``, any device) -> int64 ``[pages]``.

        Computed where they are, without waiting: a page is one run of slots that begins at a multiple of its size.
        """
        if self.page_size == 1:
            return indices.to(torch.int64)
        return indices[:: self.page_size].to(torch.int64) // self.page_size

    def misfit(self, indices: torch.Tensor) -> torch.Tensor:
        """Are these indices (as for ``page_ids``) no whole pages of this pool? bool ``[]``, made like ``page_ids``."""
        rows = indices.to(torch.int64).view(-1, self.page_size)
        starts = rows[:, 0]
        offsets = torch.arange(self.page_size, device=rows.device)
        end = min(table.page_count for table in self.tables) * self.page_size
        outside = (starts < 0) | (starts >= end) | (starts % self.page_size != 0)
        return outside.any() | (rows != starts[:, None] + offsets).any()

    def gather(self, page_ids: torch.Tensor, blocks: torch.Tensor) -> None:
        """Pages to blocks: uint8 ``[len(page_ids), >= block_bytes]`` on the pool's device.

        Raises ``KernelArgumentError``.
        """
        self._copy(gather_pages, page_ids, blocks)

    def scatter(
        self, page_ids: torch.Tensor, blocks: torch.Tensor, layer: int | None = None
    ) -> None:
        """Blocks to pages, which are distinct: all layers, or one ``layer`` of this pool. As ``gather``."""
        layers = () if layer is None else (layer, layer + 1)
        self._copy(scatter_pages, page_ids, blocks, *layers)

    def _copy(
        self, copy: Callable[..., None], ids: torch.Tensor, blocks: torch.Tensor, *layers: int
    ) -> None:
        for run in self.layout.runs(*layers):
            copy(
                self.tables[run.table],
                ids,
                blocks,
                first=run.first,
                count=run.count,
                offset_bytes=run.offset_bytes,
                quota=QUOTA,
                trusted_ids=True,
            )

    def warm_up(self) -> None:
        """Compile its kernels, so that no request waits for the compiler."""
        warmup(*self.tables)


@dataclass(frozen=True, slots=True)
class DevicePages:
    """Pages of one pool that one request moves. ``texts``: their hashes, one chain.

    ``page_ids``: int64 ``[len(texts)]``, on the pool's device or on the CPU. ``misfit``: as the pool computes it.
    """

    pool: DevicePool
    texts: list[str]
    page_ids: torch.Tensor
    misfit: torch.Tensor

    def check(self) -> None:
        """Raises ``TierError`` if SGLang's indices were no pages of the pool. Waits for the current stream."""
        if bool(self.misfit):
            raise TierError(f"{self.pool.name}: device indices are no whole pages of the pool")


def tables_of(
    parts: Sequence[Sequence[torch.Tensor]], page_size: int, *, rows_are_pages: bool
) -> tuple[tuple[PtrTable, ...], BlockLayout]:
    """Pointer tables and block layout for ``parts`` in stored order (K of all layers, V of all layers).

    Parts whose chunks have one size share a table, as ``BlockLayout`` wants it. Raises ``KernelArgumentError`` for
    buffers that the kernels cannot address.
    """
    single = [PtrTable(part, page_size, rows_are_pages) for part in parts]
    layout = BlockLayout(tuple(Part(table.buffer_count, table.chunk_bytes) for table in single))
    if layout.table_count == len(single):
        return tuple(single), layout
    every = [buffer for part in parts for buffer in part]
    return (PtrTable(every, page_size, rows_are_pages),), layout
