"""The kernel of ``heads.relayout_heads``: pieces of rows from block to block. Imports triton."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from flexkv_sglang.triton_kernels.copy import typed
from flexkv_sglang.triton_kernels.heads import RowCopy
from flexkv_sglang.triton_kernels.launch import (
    OPTIONS,
    WORD_BYTES,
    WORDS,
    on_device,
    programs_of,
    tile_shape,
)
from flexkv_sglang.triton_kernels.table import VECTOR_BYTES

NOT_SPECIALIZED = (
    "work",
    "tiles",
    "piece_count",
    "rows_per_block",
    "piece_v",
    "source_block_v",
    "source_row_v",
    "source_v",
    "target_block_v",
    "target_row_v",
    "target_v",
)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def copy_row_pieces(
    source,
    target,
    work: tl.int32,
    tiles: tl.int32,
    piece_count: tl.int32,
    rows_per_block: tl.int32,
    piece_v: tl.int32,
    source_block_v: tl.int64,
    source_row_v: tl.int64,
    source_v: tl.int64,
    target_block_v: tl.int64,
    target_row_v: tl.int64,
    target_v: tl.int64,
    WORD: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Piece ``r`` of block ``b`` from ``b*source_block + source + r*source_row`` to the same of the target.

    ``*_v`` count ``VEC`` words (``ALIGN`` bytes). Steps of work as in ``copy.copy_pieces``.
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        piece = (step // tiles) * ROWS + row
        block = (piece // rows_per_block).to(tl.int64)
        line = (piece % rows_per_block).to(tl.int64)
        from_v = block * source_block_v + source_v + line * source_row_v
        to_v = block * target_block_v + target_v + line * target_row_v
        word = (step % tiles) * BLOCK + column
        mask = (piece < piece_count)[:, None] & (word < piece_v * VEC)[None, :]
        read = typed(source, WORD, ALIGN) + (from_v * VEC)[:, None] + word[None, :]
        write = typed(target, WORD, ALIGN) + (to_v * VEC)[:, None] + word[None, :]
        tl.store(write, tl.load(read, mask=mask), mask=mask)


def copy_rows(copy: RowCopy, quota: int | None) -> None:
    """Launch it on the current stream of the blocks' device."""
    source_block, target_block = copy.source.stride(0), copy.target.stride(0)
    if len(copy.source) == 1:  # the stride of a single row means nothing and may be odd
        source_block = target_block = 0
    numbers = (
        copy.piece_bytes,
        source_block,
        copy.source_stride,
        copy.source_offset,
        target_block,
        copy.target_stride,
        copy.target_offset,
    )
    align = math.gcd(VECTOR_BYTES, *numbers)
    rows, block = tile_shape(copy.piece_bytes // WORD_BYTES[align])
    tiles = -(-copy.piece_bytes // (block * WORD_BYTES[align]))
    pieces = len(copy.source) * copy.rows
    steps = tiles * -(-pieces // rows)
    with on_device(copy.target.device):
        copy_row_pieces[(programs_of(steps, quota),)](
            copy.source,
            copy.target,
            steps,
            tiles,
            pieces,
            copy.rows,
            *(number // align for number in numbers),
            WORD=WORDS[align],
            VEC=align // WORD_BYTES[align],
            ALIGN=align,
            ROWS=rows,
            BLOCK=block,
            **OPTIONS,
        )
