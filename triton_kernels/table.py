"""The addresses of a pool's per-layer buffers, proven once, so that kernels may trust them.

Invariant: every chunk of a table lies inside a live buffer, and addresses, strides and lengths are multiples of
``align``. The kernels rely on that to load 16 bytes at a time; a violation is an illegal access.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from flexkv_sglang.errors import KernelArgumentError

VECTOR_BYTES = 16
"""Bytes that one thread loads at once. Buffers and blocks must begin at a multiple of it."""

BUFFERS_MAX = 65535
DEVICE_TYPES = ("cpu", "cuda")
"""HIP devices call themselves ``cuda`` in torch."""


class PtrTable:
    """Base addresses of equally shaped buffers, on their device, in the order they have in a block.

    ``buffers``: one tensor per layer (K and V: all K, then all V), all of one shape ``(rows, ...)``, dtype, stride
    and device. A row is a token, its elements are packed; a page is ``page_size`` rows that follow each other
    without a gap. ``rows_are_pages``: a row is a whole page (indexer pools) or a state slot (Mamba). Rows with
    gaps between them are possible where a page is one row.

    Attributes, read-only: ``row_bytes``, ``row_stride_bytes``, ``row_count``; ``page_size``; ``chunk_bytes``
    (bytes of a page in one buffer), ``page_stride_bytes``, ``page_count``; ``buffer_count``; ``device``;
    ``align`` (bytes: 16, or less where rows are no multiple of 16); ``address`` of the first buffer; ``ptrs`` (uint64
    ``[buffer_count]`` on the device); ``spacing_bytes`` (distance of one buffer from the next when they are evenly
    spaced views of one allocation, else ``None``).

    Keeps the tensors alive. Not valid any more once their memory is remapped (``release_memory_occupation``):
    build it again. Threads: immutable, share it freely. Raises ``KernelArgumentError``.
    """

    def __init__(
        self, buffers: Sequence[torch.Tensor], page_size: int, rows_are_pages: bool = False
    ) -> None:
        self.buffers = tuple(buffers)
        first = _checked_alike(self.buffers)
        if page_size < 1:
            raise KernelArgumentError(f"page_size is {page_size}, must be at least 1")
        itemsize = first.element_size()
        rows_per_page = 1 if rows_are_pages else page_size
        self.page_size = rows_per_page
        self.row_bytes = math.prod(first.shape[1:]) * itemsize
        self.row_stride_bytes = first.stride(0) * itemsize
        self.row_count = first.shape[0]
        self.chunk_bytes = self.row_bytes * rows_per_page
        self.page_stride_bytes = self.row_stride_bytes * rows_per_page
        self.page_count = self.row_count // rows_per_page
        self.buffer_count = len(self.buffers)
        self.device = first.device
        self._check_rows(first)
        self.align = math.gcd(VECTOR_BYTES, self.row_bytes, self.row_stride_bytes)
        addresses = [buffer.data_ptr() for buffer in self.buffers]
        if any(address % VECTOR_BYTES for address in addresses):
            raise KernelArgumentError(
                f"buffers must begin at multiples of {VECTOR_BYTES} bytes: {[hex(a) for a in addresses]}"
            )
        self.address = addresses[0]
        self.spacing_bytes = _spacing(self.buffers, addresses)
        extent = (self.row_count - 1) * self.row_stride_bytes + self.row_bytes
        self._extents = [(address, address + extent) for address in sorted(addresses)]
        self._end = self._extents[-1][1]
        # uint64 tensors have few operations: built once, never computed with.
        self.ptrs = torch.tensor(addresses, dtype=torch.uint64, device=self.device)

    def _check_rows(self, first: torch.Tensor) -> None:
        if self.row_bytes == 0 or self.page_count == 0:
            raise KernelArgumentError(
                f"no whole page of {self.page_size} rows in a buffer of shape {tuple(first.shape)}"
            )
        if not first[0].is_contiguous():
            raise KernelArgumentError(
                f"the elements of a row must be packed: strides {first.stride()}"
            )
        if self.row_stride_bytes < self.row_bytes and self.row_count > 1:
            raise KernelArgumentError(f"rows overlap: strides {first.stride()}")
        if self.page_size > 1 and self.row_stride_bytes != self.row_bytes:
            raise KernelArgumentError(
                f"rows of a page must follow each other: {self.row_stride_bytes} bytes apart, {self.row_bytes} long"
            )

    def overlaps(self, start: int, end: int) -> bool:
        """True if a byte of ``[start, end)`` belongs to one of the buffers."""
        if end <= self._extents[0][0] or start >= self._end:
            return False
        return any(start < last and first < end for first, last in self._extents)

    def pages(self, buffer: int) -> torch.Tensor:
        """Buffer number ``buffer`` as bytes: a uint8 view ``[page_count, chunk_bytes]``."""
        return _bytes_of(
            self.buffers[buffer], self.page_count, self.chunk_bytes, self.page_stride_bytes
        )


def _checked_alike(buffers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The first buffer, when all others are like it."""
    if not 0 < len(buffers) <= BUFFERS_MAX:
        raise KernelArgumentError(f"a table has 1 to {BUFFERS_MAX} buffers, not {len(buffers)}")
    first = buffers[0]
    if first.device.type not in DEVICE_TYPES:
        raise KernelArgumentError(f"no kernels for device {first.device}: {DEVICE_TYPES} only")
    if first.dim() < 2:
        raise KernelArgumentError(f"a buffer is (rows, ...), not {tuple(first.shape)}")
    for number, buffer in enumerate(buffers):
        for what in ("shape", "dtype", "device"):
            if getattr(buffer, what) != getattr(first, what):
                raise KernelArgumentError(
                    f"buffer {number} has {what} {getattr(buffer, what)}, buffer 0 {getattr(first, what)}"
                )
        if buffer.stride() != first.stride():
            raise KernelArgumentError(
                f"buffer {number} has strides {buffer.stride()}, buffer 0 {first.stride()}"
            )
    return first


def _spacing(buffers: tuple[torch.Tensor, ...], addresses: list[int]) -> int | None:
    """The distance between buffers that lie evenly spaced in one allocation."""
    storages = {buffer.untyped_storage().data_ptr() for buffer in buffers}
    steps = {later - earlier for earlier, later in itertools.pairwise(addresses)}
    if len(storages) != 1 or len(steps) > 1:
        return None
    step = steps.pop() if steps else 0
    return step if step >= 0 else None


def _bytes_of(buffer: torch.Tensor, count: int, length: int, stride: int) -> torch.Tensor:
    offset = buffer.storage_offset() * buffer.element_size()
    view = torch.empty(0, dtype=torch.uint8, device=buffer.device)
    return view.set_(buffer.untyped_storage(), offset, (count, length), (stride, 1))
