"""Pages between device pools and blocks. On CUDA and HIP the Triton kernels run, elsewhere the same in torch.

    table = PtrTable([*k_buffers, *v_buffers], page_size)
    gather_pages(table, page_ids, blocks)        # pool -> blocks
    scatter_pages(table, page_ids, blocks)       # blocks -> pool

All functions
* check their arguments first and raise ``KernelArgumentError`` before anything is launched;
* work on the current stream of the calling thread, on the device of the table, and return without waiting for
  it. A worker thread starts on device 0 and the default stream: enter ``torch.cuda.stream(side)`` first. The caller
  keeps blocks, and ids that are in pinned memory, alive and unwritten until an event it records afterwards;
* look at ids that are on the device, which waits for the stream once; ``trusted_ids=True`` leaves that out. Then
  the kernels skip an id outside of the pool (nothing is read or written for it), and equal ids in a scatter are
  the caller's mistake. Ids on the CPU are always looked at, and copied over.

``quota``: at most this number of programs (CTAs) run, so that the forward pass keeps its multiprocessors; ``None``: as
many as there is work for. The torch reference ignores it.
"""

from __future__ import annotations

import torch

from flexkv_sglang.triton_kernels import dispatch
from flexkv_sglang.triton_kernels.checks import checked_copy
from flexkv_sglang.triton_kernels.table import PtrTable

__all__ = ["PtrTable", "gather_pages", "scatter_pages", "warmup"]


def gather_pages(
    table: PtrTable,
    page_ids: torch.Tensor,
    blocks: torch.Tensor,
    *,
    first: int = 0,
    count: int | None = None,
    offset_bytes: int = 0,
    quota: int | None = None,
    trusted_ids: bool = False,
) -> None:
    """Pool to blocks: ``blocks[b, offset_bytes + j*chunk :][:chunk]`` = page ``page_ids[b]`` of buffer ``first + j``.

    ``page_ids``: int32 or int64 ``(n,)``, in ``[0, table.page_count)``, equal ones allowed. ``blocks``: uint8
    ``(n, >= offset_bytes + count*chunk_bytes)`` on the table's device, beginning at a multiple of 16 bytes. ``count``
    buffers from ``first`` on, all that are left by default. Bytes of blocks beyond them stay as they are.
    """
    span = (first, count, offset_bytes, quota)
    copy = checked_copy(table, page_ids, blocks, span, distinct=False, trusted=trusted_ids)
    if len(blocks):
        dispatch.copies(table.device).gather(copy)


def scatter_pages(
    table: PtrTable,
    page_ids: torch.Tensor,
    blocks: torch.Tensor,
    *,
    first: int = 0,
    count: int | None = None,
    offset_bytes: int = 0,
    quota: int | None = None,
    trusted_ids: bool = False,
) -> None:
    """The inverse of ``gather_pages``: blocks into pages. Page ids must be distinct; other pages are untouched."""
    span = (first, count, offset_bytes, quota)
    copy = checked_copy(table, page_ids, blocks, span, distinct=True, trusted=trusted_ids)
    if len(blocks):
        dispatch.copies(table.device).scatter(copy)


def warmup(*tables: PtrTable) -> None:
    """Compile every copy kernel that these tables can need, for their device, without running one.

    Call it at start-up: otherwise the first request waits for the compiler (seconds without a cache). Nothing is
    done where torch serves.
    """
    for table in tables:
        dispatch.copies(table.device).prepare(table)
