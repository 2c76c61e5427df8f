"""Blocks cut by heads for one tensor-parallel size, put together for another.

A block of the layout ``page_first_direct`` is, part by part, rows of heads: K is ``[layers * page_size][heads][bytes of
a head]``. So a rank that has twice the heads takes each row from two blocks, one with half takes half of each row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels import checks, dispatch
from flexkv_sglang.triton_kernels.table import VECTOR_BYTES


@dataclass(frozen=True, slots=True)
class HeadPart:
    """K or V in a block: ``rows`` (layers x page_size) of heads with ``head_bytes`` (head_dim x itemsize) each."""

    rows: int
    head_bytes: int


@dataclass(frozen=True, slots=True)
class RowCopy:
    """``rows`` pieces of ``piece_bytes`` in each block; offsets and strides in bytes within a block."""

    source: torch.Tensor
    target: torch.Tensor
    rows: int
    piece_bytes: int
    source_offset: int
    source_stride: int
    target_offset: int
    target_stride: int


def relayout_heads(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    parts: Sequence[HeadPart],
    *,
    source_heads: int,
    target_heads: int,
    first_source_head: int = 0,
    first_target_head: int = 0,
    quota: int | None = None,
) -> None:
    """Fill ``targets`` with the heads they stand for, from ``sources``.

    ``sources[i]``: uint8 ``(n, >= block bytes)`` with the heads ``first_source_head + i*source_heads`` and the
    ``source_heads - 1`` after it, ``targets`` alike; heads are numbered over the whole model, so a rank passes only
    the shards it needs. Every head of a target must be in a source. ``parts``: K and V in their order in a block. All
    tensors on one device, beginning at multiples of 16 bytes; the current stream is used, nothing is waited for.
    """
    checks.check_quota(quota)
    _check(sources, targets, parts, source_heads, target_heads)
    wanted = range(first_target_head, first_target_head + len(targets) * target_heads)
    held = range(first_source_head, first_source_head + len(sources) * source_heads)
    if first_source_head < 0 or wanted.start < held.start or wanted.stop > held.stop:
        raise KernelArgumentError(f"heads {wanted} are asked for, the sources hold {held}")
    kernel = dispatch.kernels(targets[0].device, "heads_kernel")
    for i, source in enumerate(sources):
        for j, target in enumerate(targets):
            source_start, target_start = (
                held.start + i * source_heads,
                wanted.start + j * target_heads,
            )
            first = max(source_start, target_start)
            last = min(source_start + source_heads, target_start + target_heads)
            if first >= last or len(target) == 0:
                continue
            places = (first - source_start, first - target_start, last - first)
            for copy in _row_copies(source, target, parts, (source_heads, target_heads), places):
                if kernel is None:
                    copy_rows(copy)
                else:
                    kernel.copy_rows(copy, quota)


def copy_rows(copy: RowCopy) -> None:
    """The reference: one strided copy."""
    shape = (len(copy.source), copy.rows, copy.piece_bytes)
    ends = (
        (copy.source, copy.source_offset, copy.source_stride),
        (copy.target, copy.target_offset, copy.target_stride),
    )
    source, target = (
        blocks.as_strided(shape, (blocks.stride(0), stride, 1), blocks.storage_offset() + offset)
        for blocks, offset, stride in ends
    )
    target.copy_(source)


def _row_copies(
    source: torch.Tensor,
    target: torch.Tensor,
    parts: Sequence[HeadPart],
    heads: tuple[int, int],
    places: tuple[int, int, int],
) -> Iterator[RowCopy]:
    """``heads`` in a row of source and target; ``places``: first head in the source, in the target, how many."""
    starts = [0, 0]
    for part in parts:
        strides = [count * part.head_bytes for count in heads]
        yield RowCopy(
            source,
            target,
            part.rows,
            places[2] * part.head_bytes,
            starts[0] + places[0] * part.head_bytes,
            strides[0],
            starts[1] + places[1] * part.head_bytes,
            strides[1],
        )
        starts = [start + part.rows * stride for start, stride in zip(starts, strides, strict=True)]


def _check(
    sources: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    parts: Sequence[HeadPart],
    source_heads: int,
    target_heads: int,
) -> None:
    if not sources or not targets or not parts or min(source_heads, target_heads) < 1:
        raise KernelArgumentError("sources, targets, parts and heads must not be empty")
    if any(part.rows < 1 or part.head_bytes < 1 for part in parts):
        raise KernelArgumentError(f"parts need rows and bytes: {parts}")
    align = math.gcd(VECTOR_BYTES, *(part.head_bytes for part in parts))
    for group, heads in ((sources, source_heads), (targets, target_heads)):
        needed = sum(part.rows * heads * part.head_bytes for part in parts)
        for blocks in group:
            if blocks.device != targets[0].device or len(blocks) != len(targets[0]):
                raise KernelArgumentError(
                    "sources and targets must be as many blocks on one device"
                )
            checks.check_blocks(blocks, needed, align)
    for number, target in enumerate(targets):
        if any(checks.overlap(target, other) for other in (*sources, *targets[:number])):
            raise KernelArgumentError("a target lies in another tensor of the call")
