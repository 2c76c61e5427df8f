"""The copy kernels. Only ``launch`` calls them; the arguments were proven by ``checks`` and ``table``.

Lengths and strides come in units of ``align`` bytes (16 unless rows are odd) and pointers carry that alignment as a
hint: so 16-byte loads and stores come out whatever the run-time values are, with one binary per shape of tile.
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
    "piece_count",
    "limit",
    "first",
    "pieces_per_block",
    "piece_v",
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
def copy_pieces(
    table,
    base_address: tl.int64,
    ids,
    blocks,
    work: tl.int32,
    tiles: tl.int32,
    buffer_count: tl.int32,
    piece_count: tl.int32,
    limit: tl.int64,
    first: tl.int32,
    pieces_per_block: tl.int32,
    piece_v: tl.int32,
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
    """Copy pieces between buffers and blocks; a piece is a page's or a token's bytes in one buffer.

    A step of work is ``ROWS`` pieces of one buffer, ``BLOCK`` words of each; ``tiles`` steps make whole pieces. Any
    grid will do: program ``i`` takes the steps ``i``, ``i + grid``, ... ``*_v`` count ``VEC`` words (``ALIGN`` bytes).
    """
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    out = typed(blocks, WORD, ALIGN)
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        tile = step % tiles
        rest = step // tiles
        j = rest % buffer_count
        piece = (rest // buffer_count) * ROWS + row
        there = piece < piece_count
        place = tl.load(ids + piece, mask=there, other=-1).to(tl.int64)
        # Unchecked ids: one outside of the pool moves nothing.
        there = there & (place >= 0) & (place < limit)
        if STRIDED:
            address = base_address + (first + j).to(tl.int64) * spacing_v * ALIGN
        else:
            address = tl.load(table + first + j).to(tl.int64)
        in_pool = typed(address, WORD, ALIGN) + place[:, None] * (stride_v * VEC)
        block = (piece // pieces_per_block).to(tl.int64)
        before = (piece % pieces_per_block).to(tl.int64) + j.to(tl.int64) * pieces_per_block
        start = block * block_stride_v + offset_v + before * piece_v
        in_block = out + (start * VEC)[:, None]
        word = tile * BLOCK + column
        mask = there[:, None] & (word < piece_v * VEC)[None, :]
        if SCATTER:
            value = tl.load(in_block + word[None, :], mask=mask)
            tl.store(in_pool + word[None, :], value, mask=mask)
        else:
            value = tl.load(in_pool + word[None, :], mask=mask)
            tl.store(in_block + word[None, :], value, mask=mask)
