"""The kernel of ``checksum.block_checksum``. Imports triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flexkv_sglang.triton_kernels import checksum
from flexkv_sglang.triton_kernels.copy import typed
from flexkv_sglang.triton_kernels.launch import OPTIONS, on_device, programs_of

TILE_WORDS = 2048
GOLDEN = tl.constexpr(checksum.signed(checksum.GOLDEN))
FIRST_FACTOR = tl.constexpr(checksum.signed(checksum.FIRST_FACTOR))
SECOND_FACTOR = tl.constexpr(checksum.signed(checksum.SECOND_FACTOR))


@triton.jit
def _shifted(x, BY: tl.constexpr):
    return (x >> BY) & ((1 << (64 - BY)) - 1)


@triton.jit
def _mix(x):
    x = (x ^ _shifted(x, 30)) * FIRST_FACTOR
    x = (x ^ _shifted(x, 27)) * SECOND_FACTOR
    return x ^ _shifted(x, 31)


@triton.jit(do_not_specialize=("work", "tiles", "words_v", "stride_v"))
def add_word_sums(
    blocks,
    sums,
    work: tl.int32,
    tiles: tl.int32,
    words_v: tl.int32,
    stride_v: tl.int64,
    VEC: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``sums[b] += sum of mix(word ^ position)`` over the words of block ``b``; ``*_v`` count ``ALIGN`` bytes."""
    data = typed(blocks, tl.int64, ALIGN)
    for step in range(tl.program_id(0), work, tl.num_programs(0)):
        block = (step // tiles).to(tl.int64)
        word = (step % tiles) * BLOCK + tl.arange(0, BLOCK)
        mask = word < words_v * VEC
        value = tl.load(data + block * stride_v * VEC + word, mask=mask, other=0)
        value = _mix(value ^ ((word.to(tl.int64) + 1) * GOLDEN))
        total = tl.sum(tl.where(mask, value, 0), axis=0)
        tl.atomic_add(sums + block, total, sem="relaxed")


def add_sums(blocks: torch.Tensor, length: int, sums: torch.Tensor, quota: int | None) -> None:
    """Launch it on the current stream of the blocks' device."""
    words = length // checksum.WORD
    align = 16 if blocks.stride(0) % 16 == 0 and words % 2 == 0 else 8
    tiles = -(-words // TILE_WORDS)
    steps = tiles * len(blocks)
    with on_device(blocks.device):
        add_word_sums[(programs_of(steps, quota),)](
            blocks,
            sums,
            steps,
            tiles,
            words * checksum.WORD // align,
            blocks.stride(0) // align,
            VEC=align // checksum.WORD,
            ALIGN=align,
            BLOCK=TILE_WORDS,
            **OPTIONS,
        )
