"""The kernels of ``quant``. Codes are made and read with integers: fp8 casts do not exist on sm_80, and are wrong in
Triton's interpreter. Imports triton.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from flexkv_sglang.triton_kernels import quant
from flexkv_sglang.triton_kernels.checks import Copy
from flexkv_sglang.triton_kernels.copy import typed
from flexkv_sglang.triton_kernels.launch import OPTIONS, on_device, programs_of
from flexkv_sglang.triton_kernels.quant import QuantLayout

TILE_VALUES = 4096
SCALE_MIN = tl.constexpr(quant.SCALE_MIN)
NOT_SPECIALIZED = (
    "table",
    "ids",
    "work",
    "tiles",
    "buffer_count",
    "limit",
    "first",
    "chunk_v",
    "stride_v",
    "block_stride_v",
    "scales_v",
)


@triton.jit
def e4m3_of(x):
    """float32 to e4m3fn codes: round to even, saturating, NaN to 0x7f."""
    u = x.to(tl.int32, bitcast=True)
    sign = (u >> 24) & 0x80
    a = u & 0x7FFFFFFF
    nan = a > 0x7F800000
    a = tl.minimum(a, 0x43E00000)  # 448
    normal = ((a + 0x7FFFF + ((a >> 20) & 1)) >> 20) - 960  # (127 - 7) << 3
    # At 2**14 a float32 counts in steps of 2**-9, which is the step of e4m3's smallest values.
    small = (a.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(nan, 0x7F, tl.where(a < 0x3C800000, small, normal) | sign)  # 2**-6


@triton.jit
def of_e4m3(code):
    """e4m3fn codes (int32) to float32."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + 0x3C000000).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, bits) | ((code & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def int8_of(x):
    """float32 to int8 codes: round to even, saturating, NaN to 0. At 1.5 * 2**23 a float32 counts in ones."""
    bits = x.to(tl.int32, bitcast=True)
    x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0.0, x)
    x = tl.minimum(tl.maximum(x, -127.0), 127.0)
    return ((x + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000) & 0xFF


@triton.jit
def of_int8(code):
    """int8 codes (int32, 0 to 255) to float32."""
    return ((code ^ 0x80) - 0x80).to(tl.float32)


@triton.jit
def bf16_bits_of(x):
    """float32 to the bits of bf16, round to even."""
    u = x.to(tl.int32, bitcast=True)
    nan = (u & 0x7FFFFFFF) > 0x7F800000
    rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
    return tl.where(nan, (u >> 16) | 0x40, rounded)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def quantise(
    table,
    ids,
    blocks,
    work: tl.int32,
    tiles: tl.int32,
    buffer_count: tl.int32,
    limit: tl.int64,
    first: tl.int32,
    chunk_v: tl.int32,
    stride_v: tl.int64,
    block_stride_v: tl.int64,
    scales_v: tl.int64,
    DECODE: tl.constexpr,
    E4M3: tl.constexpr,
    BF16: tl.constexpr,
    LARGEST: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Pages to codes and scales, or back. A step is ``GROUPS`` groups of one buffer of one page.

    ``chunk_v``: values of a chunk in units of 16; ``stride_v``, ``block_stride_v``, ``scales_v``: units of 16 bytes.
    """
    row, column = tl.arange(0, GROUPS), tl.arange(0, GROUP)
    values = chunk_v * 16
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        rest = step // tiles
        buffer = first + rest % buffer_count
        block = (rest // buffer_count).to(tl.int64)
        place = tl.load(ids + block).to(tl.int64)
        places = place + row * 0  # a tensor: masks of scalars are no masks in the interpreter
        there = (places >= 0) & (places < limit)
        address = tl.load(table + buffer).to(tl.int64)
        in_pool = typed(address, tl.int16, 16) + place * stride_v * 8
        in_block = tl.multiple_of(blocks + block * block_stride_v * 16, 16)
        group = (step % tiles) * GROUPS + row
        value = group[:, None] * GROUP + column[None, :]
        mask = there[:, None] & (value < values)
        codes = in_block + buffer.to(tl.int64) * values + value
        scales = typed(in_block + scales_v * 16, tl.float32, 16) + buffer.to(tl.int64) * (
            values // GROUP
        )
        known = there & (group < values // GROUP)
        if DECODE:
            scale = tl.load(scales + group, mask=known, other=0.0)
            code = tl.load(codes, mask=mask, other=0).to(tl.int32)
            x = (of_e4m3(code) if E4M3 else of_int8(code)) * scale[:, None]
            if BF16:
                tl.store(in_pool + value, bf16_bits_of(x).to(tl.int16), mask=mask)
            else:
                tl.store(in_pool + value, x.to(tl.float16).to(tl.int16, bitcast=True), mask=mask)
        else:
            bits = tl.load(in_pool + value, mask=mask, other=0)
            if BF16:
                x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
            else:
                x = bits.to(tl.float16, bitcast=True).to(tl.float32)
            size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            size = tl.where(
                size < 0x7F800000, size, 0
            )  # bits of positive numbers are in their order
            most = tl.max(size, axis=1).to(tl.float32, bitcast=True)
            scale = tl.maximum(tl.math.div_rn(most, LARGEST), SCALE_MIN)
            x = tl.math.div_rn(x, tl.broadcast_to(scale[:, None], (GROUPS, GROUP)))
            code = e4m3_of(x) if E4M3 else int8_of(x)
            tl.store(codes, code.to(tl.uint8), mask=mask)
            tl.store(scales + group, scale, mask=known)


def encode(copy: Copy, layout: QuantLayout, code: str) -> None:
    """As the reference of this name."""
    _launch(copy, layout, code, decode=False)


def decode(copy: Copy, layout: QuantLayout, code: str) -> None:
    """As the reference of this name."""
    _launch(copy, layout, code, decode=True)


def _launch(copy: Copy, layout: QuantLayout, code: str, *, decode: bool) -> None:
    table = copy.table
    groups = TILE_VALUES // layout.group
    tiles = -(-layout.chunk_groups // groups)
    steps = tiles * copy.count * len(copy.ids)
    constants: dict[str, Any] = {
        "DECODE": decode,
        "E4M3": code == "e4m3",
        "BF16": table.dtype == torch.bfloat16,
        "LARGEST": quant.LARGEST[code],
        "GROUPS": groups,
        "GROUP": layout.group,
    }
    with on_device(table.device):
        quantise[(programs_of(steps, copy.quota),)](
            table.ptrs,
            copy.ids,
            copy.blocks,
            steps,
            tiles,
            copy.count,
            copy.limit,
            copy.first,
            layout.chunk_values // 16,
            copy.stride_bytes // 16,
            copy.blocks.stride(0) // 16,
            layout.scales_at // 16,
            **constants,
            **OPTIONS,
        )
