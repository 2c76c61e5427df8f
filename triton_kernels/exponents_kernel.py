"""The kernels of ``exponents``. Two values at a time, as one 32-bit word: the first in its low half. Imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flexkv_sglang.triton_kernels import exponents
from flexkv_sglang.triton_kernels.copy import typed
from flexkv_sglang.triton_kernels.exponents import Plan
from flexkv_sglang.triton_kernels.launch import OPTIONS, on_device, programs_of

PAIRS = tl.constexpr(exponents.TILE // 2)
HEADER = tl.constexpr(exponents.HEADER)
ESCAPE = tl.constexpr(exponents.ESCAPE)
MODE_AT = tl.constexpr(exponents.MODE_AT)
NOT_SPECIALIZED = ("work", "tiles", "values_v", "block_stride_v", "packed_stride_v")


@triton.jit
def _exponent(value):
    return (value >> 7) & 0xFF


@triton.jit
def _rest(value):
    """Sign and mantissa in a byte."""
    return ((value >> 8) & 0x80) | (value & 0x7F)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def count_exponents(
    blocks, counts, work: tl.int32, tiles: tl.int32, values_v: tl.int32, block_stride_v: tl.int64
):
    """``counts[b][e] +=`` how often exponent ``e`` occurs. ``*_v``: units of 8 values."""
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        block = (step // tiles).to(tl.int64)
        pair = (step % tiles) * PAIRS + tl.arange(0, PAIRS)
        mask = pair < values_v * 4
        word = tl.load(
            typed(blocks, tl.int32, 16) + block * block_stride_v * 4 + pair, mask=mask, other=0
        )
        first = tl.histogram(_exponent(word & 0xFFFF), 256, mask=mask)
        second = tl.histogram(_exponent((word >> 16) & 0xFFFF), 256, mask=mask)
        bins = counts + block * 256 + tl.arange(0, 256)
        tl.atomic_add(bins, first + second, mask=(first + second) > 0, sem="relaxed")


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def count_escapes(
    blocks,
    code_of,
    found,
    work: tl.int32,
    tiles: tl.int32,
    values_v: tl.int32,
    block_stride_v: tl.int64,
):
    """``found[b][tile]`` = values of the tile whose exponent has no code."""
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        block = (step // tiles).to(tl.int64)
        pair = (step % tiles) * PAIRS + tl.arange(0, PAIRS)
        mask = pair < values_v * 4
        word = tl.load(
            typed(blocks, tl.int32, 16) + block * block_stride_v * 4 + pair, mask=mask, other=0
        )
        codes = code_of + block * 256
        first = tl.load(codes + _exponent(word & 0xFFFF), mask=mask, other=0)
        second = tl.load(codes + _exponent((word >> 16) & 0xFFFF), mask=mask, other=0)
        count = (first == ESCAPE).to(tl.int32) + (second == ESCAPE).to(tl.int32)
        tl.store(found + block * tiles + step % tiles, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def pack_tiles(
    blocks,
    packed,
    code_of,
    before,
    packs,
    work: tl.int32,
    tiles: tl.int32,
    values_v: tl.int32,
    block_stride_v: tl.int64,
    packed_stride_v: tl.int64,
):
    """All behind the header of each packed block, or the values as they are."""
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        block = (step // tiles).to(tl.int64)
        tile = step % tiles
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        mask = pair < values_v * 4
        word = tl.load(
            typed(blocks, tl.int32, 16) + block * block_stride_v * 4 + pair, mask=mask, other=0
        )
        out = tl.multiple_of(packed + block * packed_stride_v * 16, 16)
        if tl.load(packs + block) == 0:
            tl.store(typed(out + HEADER, tl.int32, 16) + pair, word, mask=mask)
        else:
            low, high = word & 0xFFFF, (word >> 16) & 0xFFFF
            rest = _rest(low) | (_rest(high) << 8)
            tl.store(typed(out + HEADER, tl.int16, 16) + pair, rest.to(tl.int16), mask=mask)
            codes = code_of + block * 256
            first = tl.load(codes + _exponent(low), mask=mask, other=0).to(tl.int32)
            second = tl.load(codes + _exponent(high), mask=mask, other=0).to(tl.int32)
            code_plane = out + HEADER + values_v.to(tl.int64) * 8
            tl.store(code_plane + pair, (first | (second << 4)).to(tl.uint8), mask=mask)
            start = tl.load(before + block * tiles + tile)
            table = code_plane + values_v.to(tl.int64) * 4
            tl.store(table.to(tl.pointer_type(tl.int32)) + tile, start)
            escapes = table + tiles.to(tl.int64) * 4 + start
            lone, both = (first == ESCAPE).to(tl.int32), (second == ESCAPE).to(tl.int32)
            position = tl.cumsum(lone + both, axis=0) - lone - both
            tl.store(escapes + position, _exponent(low).to(tl.uint8), mask=mask & (lone == 1))
            tl.store(
                escapes + position + lone, _exponent(high).to(tl.uint8), mask=mask & (both == 1)
            )


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def unpack_tiles(
    packed,
    blocks,
    work: tl.int32,
    tiles: tl.int32,
    values_v: tl.int32,
    block_stride_v: tl.int64,
    packed_stride_v: tl.int64,
):
    """The inverse. Places that come from the packed bytes are held within the block, whatever they say."""
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        block = (step // tiles).to(tl.int64)
        tile = step % tiles
        pair = tile * PAIRS + tl.arange(0, PAIRS)
        mask = pair < values_v * 4
        source = tl.multiple_of(packed + block * packed_stride_v * 16, 16)
        target = typed(blocks, tl.int32, 16) + block * block_stride_v * 4 + pair
        if tl.load(source + MODE_AT) == 0:
            plain = tl.load(typed(source + HEADER, tl.int32, 16) + pair, mask=mask, other=0)
            tl.store(target, plain, mask=mask)
        else:
            rest = tl.load(typed(source + HEADER, tl.int16, 16) + pair, mask=mask, other=0).to(
                tl.int32
            )
            code_plane = source + HEADER + values_v.to(tl.int64) * 8
            codes = tl.load(code_plane + pair, mask=mask, other=0).to(tl.int32)
            first, second = codes & 0xF, codes >> 4
            table = code_plane + values_v.to(tl.int64) * 4
            start = tl.load(table.to(tl.pointer_type(tl.int32)) + tile)
            escapes = table + tiles.to(tl.int64) * 4
            room = values_v * 4 - tiles * 4
            lone, both = (first == ESCAPE).to(tl.int32), (second == ESCAPE).to(tl.int32)
            position = start + tl.cumsum(lone + both, axis=0) - lone - both
            inside = mask & (position >= 0) & (position + lone < room)
            low = tl.load(source + first, mask=mask, other=0).to(tl.int32)
            high = tl.load(source + second, mask=mask, other=0).to(tl.int32)
            escaped = tl.load(escapes + position, mask=inside & (lone == 1), other=0).to(tl.int32)
            low = tl.where(lone == 1, escaped, low)
            escaped = tl.load(escapes + position + lone, mask=inside & (both == 1), other=0).to(
                tl.int32
            )
            high = tl.where(both == 1, escaped, high)
            low = ((rest & 0x80) << 8) | (low << 7) | (rest & 0x7F)
            high = (rest & 0x8000) | (high << 7) | ((rest >> 8) & 0x7F)
            tl.store(target, low | (high << 16), mask=mask)


def histogram(blocks: torch.Tensor, quota: int | None) -> torch.Tensor:
    """As the reference of this name, and so the others."""
    counts = torch.zeros((len(blocks), 256), dtype=torch.int32, device=blocks.device)
    work, sizes = _sizes(blocks)
    with on_device(blocks.device):
        count_exponents[(programs_of(work, quota),)](
            blocks, counts, work, *sizes, blocks.stride(0) // 16, **OPTIONS
        )
    return counts


def escapes_of_tiles(
    blocks: torch.Tensor, code_of: torch.Tensor, quota: int | None
) -> torch.Tensor:
    work, sizes = _sizes(blocks)
    found = torch.empty((len(blocks), sizes[0]), dtype=torch.int32, device=blocks.device)
    with on_device(blocks.device):
        count_escapes[(programs_of(work, quota),)](
            blocks, code_of, found, work, *sizes, blocks.stride(0) // 16, **OPTIONS
        )
    return found


def pack(blocks: torch.Tensor, packed: torch.Tensor, plan: Plan, quota: int | None) -> None:
    work, sizes = _sizes(blocks)
    with on_device(blocks.device):
        pack_tiles[(programs_of(work, quota),)](
            blocks,
            packed,
            plan.code_of,
            plan.before,
            plan.packed,
            work,
            *sizes,
            blocks.stride(0) // 16,
            packed.stride(0) // 16,
            **OPTIONS,
        )


def unpack(packed: torch.Tensor, blocks: torch.Tensor, quota: int | None) -> None:
    work, sizes = _sizes(blocks)
    with on_device(blocks.device):
        unpack_tiles[(programs_of(work, quota),)](
            packed, blocks, work, *sizes, blocks.stride(0) // 16, packed.stride(0) // 16, **OPTIONS
        )


def _sizes(blocks: torch.Tensor) -> tuple[int, tuple[int, int]]:
    """Steps of work; tiles of a block and its values in units of 8."""
    values = blocks.shape[1] // 2
    tiles = exponents.tiles_of(values)
    return tiles * len(blocks), (tiles, values // exponents.VALUES_STEP)
