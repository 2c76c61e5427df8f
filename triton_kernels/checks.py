"""Proves the arguments of a copy before anything is launched. Every error names the value and its limit.

Kernels get raw addresses: a wrong argument that is not refused here becomes an illegal access and ends the process.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.table import VECTOR_BYTES, PtrTable

Span = tuple[int, int | None, int, int | None]
"""First buffer, number of buffers (``None``: all that are left), offset in a block in bytes, quota of programs."""

ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class Copy:
    """A checked copy of whole pages between the buffers ``first`` to ``first + count - 1`` of ``table`` and ``blocks``.

    ``ids``: int64 ``[blocks]`` on the table's device. The page's bytes of buffer ``first + j`` lie in its block at
    ``offset_bytes + j * table.chunk_bytes``.
    """

    table: PtrTable
    ids: torch.Tensor
    blocks: torch.Tensor
    first: int
    count: int
    offset_bytes: int
    quota: int | None


def check_blocks(blocks: torch.Tensor, needed_bytes: int, align: int) -> None:
    """``blocks``: uint8 ``(n, >= needed_bytes)``, packed rows that do not overlap, aligned."""
    if blocks.dtype != torch.uint8 or blocks.dim() != 2:
        raise KernelArgumentError(
            f"blocks must be uint8 (n, bytes), not {blocks.dtype} {tuple(blocks.shape)}"
        )
    count, width = blocks.shape
    if width < needed_bytes:
        raise KernelArgumentError(f"blocks have {width} bytes, {needed_bytes} are needed")
    if count == 0:
        return
    if blocks.stride(1) != 1 or (count > 1 and blocks.stride(0) < needed_bytes):
        raise KernelArgumentError(
            f"rows of blocks must be packed and apart: strides {blocks.stride()}"
        )
    if blocks.data_ptr() % VECTOR_BYTES or (count > 1 and blocks.stride(0) % align):
        raise KernelArgumentError(
            f"blocks must begin at a multiple of {VECTOR_BYTES} and their rows be multiples of {align} bytes apart: "
            f"{blocks.data_ptr():#x}, {blocks.stride(0)}"
        )


def check_ids(
    ids: torch.Tensor,
    count: int,
    limit: int,
    device: torch.device,
    *,
    distinct: bool,
    trusted: bool,
) -> torch.Tensor:
    """``ids`` as int64 ``[count]`` on ``device``, each in ``[0, limit)``.

    Ids on the CPU are always looked at. Ids on a device are looked at unless ``trusted``: that waits for the
    current stream.
    """
    if ids.dtype not in ID_DTYPES or ids.dim() != 1 or len(ids) != count:
        raise KernelArgumentError(
            f"ids must be int32 or int64 ({count},), not {ids.dtype} {tuple(ids.shape)}"
        )
    if ids.device != device and ids.device.type != "cpu":
        raise KernelArgumentError(f"ids are on {ids.device}, the buffers on {device}")
    if count and (ids.device.type == "cpu" or not trusted):
        low, high = (int(value) for value in torch.aminmax(ids))
        if low < 0 or high >= limit:
            raise KernelArgumentError(f"ids from {low} to {high} are not in [0, {limit})")
        if distinct and len(torch.unique(ids)) != count:
            raise KernelArgumentError("ids must be distinct: two copies would race for one place")
    return ids.to(device=device, dtype=torch.int64, non_blocking=True).contiguous()


def checked_copy(
    table: PtrTable,
    ids: torch.Tensor,
    blocks: torch.Tensor,
    span: Span,
    *,
    distinct: bool,
    trusted: bool,
) -> Copy:
    """The copy of these pages, when every argument is right. Raises ``KernelArgumentError``."""
    first, count, offset_bytes, quota = span
    count = check_range(table, first, count)
    check_quota(quota)
    if offset_bytes < 0 or offset_bytes % table.align:
        raise KernelArgumentError(
            f"offset_bytes is {offset_bytes}, must be a multiple of {table.align} and not negative"
        )
    check_blocks(blocks, offset_bytes + count * table.chunk_bytes, table.align)
    check_place(table, blocks)
    checked = check_ids(
        ids, len(blocks), table.page_count, table.device, distinct=distinct, trusted=trusted
    )
    return Copy(table, checked, blocks, first, count, offset_bytes, quota)


def check_quota(quota: int | None) -> None:
    """``None`` or a number of programs."""
    if quota is not None and quota < 1:
        raise KernelArgumentError(f"quota is {quota}, must be at least 1 or None")


def check_range(table: PtrTable, first: int, count: int | None) -> int:
    """The number of buffers from ``first`` on: ``count``, or all that are left."""
    wanted = table.buffer_count - first if count is None else count
    if first < 0 or wanted < 1 or first + wanted > table.buffer_count:
        raise KernelArgumentError(
            f"buffers [{first}, {first + wanted}) are not in [0, {table.buffer_count})"
        )
    return wanted


def check_place(table: PtrTable, blocks: torch.Tensor) -> None:
    """``blocks``: on the table's device, and in none of its buffers."""
    if blocks.device != table.device:
        raise KernelArgumentError(f"blocks are on {blocks.device}, the buffers on {table.device}")
    count, width = blocks.shape
    start = blocks.data_ptr()
    if count and table.overlaps(start, start + (count - 1) * blocks.stride(0) + width):
        raise KernelArgumentError("blocks lie in one of the buffers")
