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
  an id outside of the pool is skipped by the kernels (nothing is read or written for it), and equal ids in a
  scatter are the caller's mistake. Ids on the CPU are always looked at, and copied over.

``quota``: at most so many programs (CTAs) run, so that the forward pass keeps its multiprocessors; ``None``: as
many as there is work for. The torch reference ignores it.
"""

from __future__ import annotations

import torch

from flexkv_sglang.triton_kernels import checks, dispatch, reference
from flexkv_sglang.triton_kernels.table import PtrTable

__all__ = [
    "PtrTable",
    "gather_pages",
    "gather_tokens",
    "scatter_pages",
    "scatter_tokens",
    "warmup",
]


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
    copy = checks.pages(table, page_ids, blocks, span, distinct=False, trusted=trusted_ids)
    if len(blocks):
        (dispatch.kernels(table.device, "launch") or reference).gather(copy)


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
    copy = checks.pages(table, page_ids, blocks, span, distinct=True, trusted=trusted_ids)
    if len(blocks):
        (dispatch.kernels(table.device, "launch") or reference).scatter(copy)


def gather_tokens(
    table: PtrTable,
    slot_ids: torch.Tensor,
    blocks: torch.Tensor,
    *,
    first: int = 0,
    count: int | None = None,
    offset_bytes: int = 0,
    quota: int | None = None,
    trusted_ids: bool = False,
) -> None:
    """``gather_pages`` with tokens anywhere: token ``t`` of block ``b`` is row ``slot_ids[b*page_size + t]``.

    ``slot_ids``: int32 or int64 ``(n * page_size,)``, in ``[0, table.row_count)``, equal ones allowed. The bytes of
    the blocks are those that ``gather_pages`` makes of a page with these tokens.
    """
    span = (first, count, offset_bytes, quota)
    copy = checks.tokens(table, slot_ids, blocks, span, distinct=False, trusted=trusted_ids)
    if len(blocks):
        (dispatch.kernels(table.device, "launch") or reference).gather(copy)


def scatter_tokens(
    table: PtrTable,
    slot_ids: torch.Tensor,
    blocks: torch.Tensor,
    *,
    first: int = 0,
    count: int | None = None,
    offset_bytes: int = 0,
    quota: int | None = None,
    trusted_ids: bool = False,
) -> None:
    """The inverse of ``gather_tokens``. Slot ids must be distinct; other rows are untouched."""
    span = (first, count, offset_bytes, quota)
    copy = checks.tokens(table, slot_ids, blocks, span, distinct=True, trusted=trusted_ids)
    if len(blocks):
        (dispatch.kernels(table.device, "launch") or reference).scatter(copy)


def warmup(*tables: PtrTable) -> None:
    """Compile every copy kernel these tables can need, for their device, without running one.

    Call it at start-up: otherwise the first request waits for the compiler (seconds without a cache). Nothing to
    do where torch serves.
    """
    for table in tables:
        (dispatch.kernels(table.device, "launch") or reference).prepare(table)
