"""Copies without our kernels: ``index_select`` per layer, one copy per chunk, CUDA's batched copy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from flexkv_sglang.triton_kernels.ops import PtrTable

CHUNKS_MAX = 16384
"""Each of these copies takes microseconds: this number is enough to know the rate."""
CHUNKS_MAX_CPU = 64
"""On a CPU only to show that it runs."""
STREAM_ORDER = 1
"""cudaMemcpySrcAccessOrderStream."""


class MissingBaseline(Exception):  # noqa: N818  a baseline that is not there is no error
    """A baseline that cannot run here; the message has the reason."""


def index_select(table: PtrTable, ids: torch.Tensor, blocks: torch.Tensor) -> Callable[[], None]:
    """A gather of rows per layer, then a copy to its place."""
    width = table.chunk_bytes
    pages = [table.pages(j) for j in range(table.buffer_count)]

    def run() -> None:
        for j, page in enumerate(pages):
            blocks[:, j * width : (j + 1) * width] = torch.index_select(page, 0, ids)

    return run


def chunk_copies(
    table: PtrTable, ids: torch.Tensor, blocks: torch.Tensor
) -> tuple[Callable[[], None], int]:
    """One ``copy_`` per chunk, for as many pages as ``CHUNKS_MAX`` allows; and the bytes that are moved."""
    pairs = _pairs(table, ids, blocks)

    def run() -> None:
        for source, target in pairs:
            target.copy_(source, non_blocking=True)

    return run, len(pairs) * table.chunk_bytes


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _Attributes(ctypes.Structure):
    """cudaMemcpyAttributes."""

    _fields_ = (
        ("order", ctypes.c_int),
        ("source", _Location),
        ("target", _Location),
        ("flags", ctypes.c_uint),
    )


def batched_copies(
    table: PtrTable, ids: torch.Tensor, blocks: torch.Tensor, stream: Any
) -> tuple[Callable[[], None], int]:
    """``cudaMemcpyBatchAsync`` of the same chunks (CUDA 12.8 and later; never on the default stream)."""
    if table.device.type != "cuda" or torch.version.cuda is None:
        raise MissingBaseline("no CUDA device")
    major = int(torch.version.cuda.split(".")[0])
    try:
        copy = ctypes.CDLL(f"libcudart.so.{major}").cudaMemcpyBatchAsync
    except (OSError, AttributeError) as error:
        raise MissingBaseline(str(error)) from error
    pairs = _pairs(table, ids, blocks)
    targets = np.array([target.data_ptr() for _, target in pairs], np.uint64)
    sources = np.array([source.data_ptr() for source, _ in pairs], np.uint64)
    sizes = np.full(len(pairs), table.chunk_bytes, np.uint64)
    attributes = _Attributes(order=STREAM_ORDER)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t(0)
    arguments: list[Any] = [
        *(ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
        ctypes.c_size_t(len(pairs)),
        ctypes.byref(attributes),
        ctypes.byref(first),
        ctypes.c_size_t(1),
        *([ctypes.byref(failed)] if major < 13 else []),  # CUDA 13 dropped it
        ctypes.c_void_p(stream.cuda_stream),
    ]

    def run() -> None:
        error = copy(*arguments)
        assert targets is not None  # the arrays live as long as this function
        assert sources is not None
        assert sizes is not None
        if error:
            raise MissingBaseline(f"cudaMemcpyBatchAsync: error {error}, copy {failed.value}")

    return run, len(pairs) * table.chunk_bytes


def _pairs(
    table: PtrTable, ids: torch.Tensor, blocks: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(chunk in the pool, its place in a block)"""
    width = table.chunk_bytes
    most = CHUNKS_MAX if table.device.type == "cuda" else CHUNKS_MAX_CPU
    count = max(1, min(len(ids), most // table.buffer_count))
    pages = [table.pages(j) for j in range(table.buffer_count)]
    return [
        (page[number], blocks[row, j * width : (j + 1) * width])
        for row, number in enumerate(ids[:count].tolist())
        for j, page in enumerate(pages)
    ]
