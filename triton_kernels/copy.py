"""The copy kernel. Only ``launch`` calls it; ``checks`` and ``table`` have proven the arguments.

Lengths and strides come in units of ``align`` bytes (16 unless rows are odd) and pointers carry that alignment as a
hint: this gives 16-byte loads and stores for all run-time values, with one binary per shape of tile.
Offsets are 64 bits wide before the first multiplication: pools have more than 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOT_SPECIALIZED = (
    "table",
    "base_address",
    "ids",
    "work",
    "tiles",
    "buffer_count",
    "page_count",
    "limit",
    "first",
    "chunk_v",
    "stride_v",
    "spacing_v",
    "block_stride_v",
    "offset_v",
)


@triton.jit
def typed(pointer, WORD: tl.constexpr, ALIGN: tl.constexpr):
    """An address or a byte pointer as a pointer to words, with its alignment."""
    return tl.multiple_of(pointer.to(tl.pointer_type(WORD)), ALIGN)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def copy_pages(
    table,
    base_address: tl.int64,
    ids,
    blocks,
    work: tl.int32,
    tiles: tl.int32,
    buffer_count: tl.int32,
    page_count: tl.int32,
    limit: tl.int64,
    first: tl.int32,
    chunk_v: tl.int32,
    stride_v: tl.int64,
    spacing_v: tl.int64,
    block_stride_v: tl.int64,
    offset_v: tl.int64,
    SCATTER: tl.constexpr,
    STRIDED: tl.constexpr,
    WORD: tl.constexpr,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copy pages between buffers and blocks: ``chunk_v`` units of each buffer per page.

    A step of work is ``ROWS`` pages of one buffer, ``BLOCK`` words of each; ``tiles`` steps make whole chunks. The
    grid may have any size: program ``i`` takes the steps ``i``, ``i + grid``, ... ``*_v`` count ``VEC`` words
    (``ALIGN`` bytes).
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    out = typed(blocks, WORD, ALIGN)
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        tile = step % tiles
        rest = step // tiles
        j = rest % buffer_count
        block = (rest // buffer_count) * ROWS + row
        there = block < page_count
        page = tl.load(ids + block, mask=there, other=-1).to(tl.int64)
        # Ids may be unchecked: one outside of the pool moves nothing.
        there = there & (page >= 0) & (page < limit)
        if STRIDED:
            address = base_address + (first + j).to(tl.int64) * spacing_v * ALIGN
        else:
            address = tl.load(table + first + j).to(tl.int64)
        in_pool = typed(address, WORD, ALIGN) + page[:, None] * (stride_v * VEC)
        start = block.to(tl.int64) * block_stride_v + offset_v + j.to(tl.int64) * chunk_v
        in_block = out + (start * VEC)[:, None]
        word = tile * BLOCK + column
        mask = there[:, None] & (word < chunk_v * VEC)[None, :]
        if SCATTER:
            value = tl.load(in_block + word[None, :], mask=mask)
            tl.store(in_pool + word[None, :], value, mask=mask)
        else:
            value = tl.load(in_pool + word[None, :], mask=mask)
            tl.store(in_block + word[None, :], value, mask=mask)
