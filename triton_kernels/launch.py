"""Starts the kernels: the same functions as ``reference``, for tensors on a GPU. Imports triton."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.checks import Copy
from flexkv_sglang.triton_kernels.copy import copy_pages
from flexkv_sglang.triton_kernels.table import PtrTable

TILE_WORDS = 4096
"""Words per step of work: 16 KiB with 16-byte vectors, 64 bytes per thread of 8 warps."""
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
STEPS_MAX = 2**31 - 1
WORDS = {16: tl.int32, 8: tl.int32, 4: tl.int32, 2: tl.int16, 1: tl.int8}
WORD_BYTES = {16: 4, 8: 4, 4: 4, 2: 2, 1: 1}


def gather(copy: Copy) -> None:
    """Pool to blocks."""
    _launch(copy, scatter=False)


def scatter(copy: Copy) -> None:
    """Blocks to pool."""
    _launch(copy, scatter=True)


def prepare(table: PtrTable) -> None:
    """Compile the kernels of this table: both directions."""
    ids = torch.zeros(1, dtype=torch.int64, device=table.device)
    block = torch.zeros((1, 16), dtype=torch.uint8, device=table.device)
    copy = Copy(table, ids, block, 0, 1, 0, None)
    for scatters in (False, True):
        arguments, constants, _ = _arguments(copy, scatters)
        with on_device(table.device):
            copy_pages.warmup(*arguments, grid=(1,), **OPTIONS, **constants)


def tile_shape(words: int) -> tuple[int, int]:
    """(pages, words of each) in one step: the widest power of two that wastes at most an eighth of its lanes."""
    block = min(TILE_WORDS, triton.next_power_of_2(words))
    while block > 32 and -(-words // block) * block > words * 9 // 8:
        block //= 2
    return TILE_WORDS // block, block


def programs_of(steps: int, quota: int | None) -> int:
    """The size of the grid."""
    if steps > STEPS_MAX:
        raise KernelArgumentError(f"too much for one launch: {steps} steps")
    return steps if quota is None else min(quota, steps)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device; the current stream is that of the calling thread."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _launch(copy: Copy, *, scatter: bool) -> None:
    arguments, constants, steps = _arguments(copy, scatter)
    programs = programs_of(steps, copy.quota)
    with on_device(copy.table.device):
        copy_pages[(programs,)](*arguments, **OPTIONS, **constants)


def _arguments(copy: Copy, scatter: bool) -> tuple[list[Any], dict[str, Any], int]:
    table, align = copy.table, copy.table.align
    word_bytes = WORD_BYTES[align]
    words = table.chunk_bytes // word_bytes
    rows, block = tile_shape(words)
    tiles = -(-words // block)
    page_count = len(copy.ids)
    steps = tiles * copy.count * -(-page_count // rows)
    if page_count > STEPS_MAX - rows or table.chunk_bytes > STEPS_MAX:
        raise KernelArgumentError(f"too much for one launch: {page_count} x {table.chunk_bytes} B")
    strided = table.spacing_bytes is not None and table.spacing_bytes % align == 0
    arguments = [
        table.ptrs,
        table.address,
        copy.ids,
        copy.blocks,
        steps,
        tiles,
        copy.count,
        page_count,
        table.page_count,
        copy.first,
        table.chunk_bytes // align,
        table.page_stride_bytes // align,
        (table.spacing_bytes or 0) // align,
        copy.blocks.stride(0) // align,
        copy.offset_bytes // align,
    ]
    constants = {
        "SCATTER": scatter,
        "STRIDED": strided,
        "WORD": WORDS[align],
        "VEC": align // word_bytes,
        "ALIGN": align,
        "ROWS": rows,
        "BLOCK": block,
    }
    return arguments, constants, steps
