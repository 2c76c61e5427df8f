"""Lossless packing of bf16 blocks: most values of KV cache share a handful of exponents.

A packed block (little-endian; N values, N a multiple of 8, in tiles of ``TILE`` values):

| bytes | what |
|---|---|
| 15 | codebook: the exponents that occur most, the most frequent first |
| 1 | 1: packed, 0: the values follow as they are, because packing would not save anything |
| 4, 4 | N; number of escapes |
| 8 | zero |
| N | sign and mantissa of each value: bit 7 the sign, bits 0-6 the mantissa |
| N / 2 | 4 bits per value, the first of two in the low half: number in the codebook, or 15: an escape |
| 4 per tile | escapes before the tile |
| 1 per escape | its exponent, in the order of the values |

Whatever the values are, NaN and denormal ones included, ``unpack_exponents`` gives back every bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels import checks, dispatch

TILE = 2048
HEADER = 32
CODES = 15
"""Exponents with a code of their own; code 15 is the escape."""
ESCAPE = CODES
MODE_AT, COUNT_AT, ESCAPES_AT = 15, 16, 20
VALUES_STEP = 8
VALUES_MAX = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """How each block is packed. ``codebook``: uint8 ``[n, 16]``; ``code_of``: uint8 ``[n, 256]``, exponent to code;
    ``escapes``, ``packed``: int32 ``[n]``; ``before``: int32 ``[n, tiles]``, escapes before each tile."""

    codebook: torch.Tensor
    code_of: torch.Tensor
    escapes: torch.Tensor
    packed: torch.Tensor
    before: torch.Tensor


def packed_bound(block_bytes: int) -> int:
    """Bytes that a packed block of ``block_bytes`` can take at most."""
    return HEADER + block_bytes


def tiles_of(values: int) -> int:
    """Tiles of a block."""
    return -(-values // TILE)


def escapes_at(values: int) -> int:
    """Where a packed block's escapes begin."""
    return HEADER + values + values // 2 + 4 * tiles_of(values)


def pack_exponents(
    blocks: torch.Tensor, packed: torch.Tensor, *, quota: int | None = None
) -> torch.Tensor:
    """Pack ``blocks`` into ``packed`` and return the bytes each one takes, int64 ``(n,)`` on their device.

    ``blocks``: uint8 ``(n, bytes)``, bf16 values, ``bytes`` a multiple of 16. ``packed``: uint8
    ``(n, >= packed_bound(bytes))`` elsewhere on the same device. Both begin at multiples of 16 bytes, rows too. What
    lies behind the bytes a block takes is undefined. Runs on the current stream and does not wait for it.
    """
    checks.check_quota(quota)
    values = _check(blocks, packed)
    kernel = dispatch.kernels(blocks.device, "exponents_kernel")
    if len(blocks) == 0:
        return torch.zeros(0, dtype=torch.int64, device=blocks.device)
    counts = histogram(blocks) if kernel is None else kernel.histogram(blocks, quota)
    codebook, code_of, escapes = _codes(counts)
    worth_it = escapes_at(values) + escapes.to(torch.int64) < HEADER + 2 * values
    per_tile = (
        escapes_of_tiles(blocks, code_of)
        if kernel is None
        else kernel.escapes_of_tiles(blocks, code_of, quota)
    )
    before = (per_tile.cumsum(1) - per_tile).to(torch.int32)
    escapes = torch.where(worth_it, escapes, torch.zeros_like(escapes))
    plan = Plan(codebook, code_of, escapes, worth_it.to(torch.int32), before)
    _write_headers(packed, plan, values)
    if kernel is None:
        pack(blocks, packed, plan)
    else:
        kernel.pack(blocks, packed, plan, quota)
    taken = escapes_at(values) + escapes.to(torch.int64)
    return torch.where(worth_it, taken, torch.full_like(taken, HEADER + 2 * values))


def unpack_exponents(
    packed: torch.Tensor, blocks: torch.Tensor, *, quota: int | None = None, trusted: bool = False
) -> None:
    """The inverse. ``blocks``: uint8 ``(n, bytes)`` of the size that was packed; ``packed``: as it was packed.

    The headers are looked at, which waits for the current stream; not with ``trusted``. Then damaged bytes give wrong
    values, but nothing outside of the two tensors is read or written.
    """
    checks.check_quota(quota)
    values = _check(blocks, packed)
    if len(blocks) == 0:
        return
    if not trusted:
        _check_headers(packed, values)
    kernel = dispatch.kernels(blocks.device, "exponents_kernel")
    if kernel is None:
        unpack(packed, blocks)
    else:
        kernel.unpack(packed, blocks, quota)


def histogram(blocks: torch.Tensor) -> torch.Tensor:
    """Reference: how often each exponent occurs, int32 ``[n, 256]``."""
    return torch.stack(
        [torch.bincount(_exponents(block).to(torch.int64), minlength=256) for block in blocks]
    ).to(torch.int32)


def escapes_of_tiles(blocks: torch.Tensor, code_of: torch.Tensor) -> torch.Tensor:
    """Reference: values without a code in each tile, int32 ``[n, tiles]``."""
    values = blocks.shape[1] // 2
    padded = torch.zeros(
        (len(blocks), tiles_of(values) * TILE), dtype=torch.int32, device=blocks.device
    )
    for row, block in enumerate(blocks):
        padded[row, :values] = code_of[row][_exponents(block).to(torch.int64)] == ESCAPE
    return padded.view(len(blocks), -1, TILE).sum(2, dtype=torch.int32)


def pack(blocks: torch.Tensor, packed: torch.Tensor, plan: Plan) -> None:
    """Reference: everything behind the headers."""
    values = blocks.shape[1] // 2
    for row, block in enumerate(blocks):
        out = packed[row]
        if not plan.packed[row]:
            out[HEADER : HEADER + 2 * values] = block
            continue
        exponents = _exponents(block)
        word = block.view(torch.int16).to(torch.int32)
        codes = plan.code_of[row][exponents.to(torch.int64)]
        out[HEADER : HEADER + values] = (((word >> 8) & 0x80) | (word & 0x7F)).to(torch.uint8)
        end = HEADER + values + values // 2
        out[HEADER + values : end] = codes[0::2] | (codes[1::2] << 4)
        out[end : escapes_at(values)] = plan.before[row].view(torch.uint8)
        found = exponents[codes == ESCAPE]
        out[escapes_at(values) : escapes_at(values) + len(found)] = found


def unpack(packed: torch.Tensor, blocks: torch.Tensor) -> None:
    """Reference."""
    values = blocks.shape[1] // 2
    for row, source in enumerate(packed):
        if not source[MODE_AT]:
            blocks[row] = source[HEADER : HEADER + 2 * values]
            continue
        pairs = source[HEADER + values : HEADER + values + values // 2]
        codes = torch.stack([pairs & 0xF, pairs >> 4], 1).flatten().to(torch.int64)
        exponents = source[: CODES + 1][codes].to(torch.int32)
        escaped = codes == ESCAPE
        start = escapes_at(values)
        exponents[escaped] = source[start : start + int(escaped.sum())].to(torch.int32)
        rest = source[HEADER : HEADER + values].to(torch.int32)
        word = ((rest & 0x80) << 8) | (exponents << 7) | (rest & 0x7F)
        blocks[row] = word.to(torch.int16).view(torch.uint8)


def _exponents(block: torch.Tensor) -> torch.Tensor:
    return ((block.view(torch.int16).to(torch.int32) >> 7) & 0xFF).to(torch.uint8)


def _codes(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codebook, code of each exponent, number of escapes; ties go to the smaller exponent."""
    number = torch.arange(256, device=counts.device)
    rank = counts.to(torch.int64) * 256 + (255 - number)
    best = rank.topk(CODES, dim=1).indices
    codebook = torch.zeros((len(counts), CODES + 1), dtype=torch.uint8, device=counts.device)
    codebook[:, :CODES] = best.to(torch.uint8)
    code_of = torch.full_like(counts, ESCAPE, dtype=torch.uint8)
    codes = torch.arange(CODES, dtype=torch.uint8, device=counts.device).expand(len(counts), -1)
    code_of.scatter_(1, best, codes)
    escapes = counts.sum(1) - counts.gather(1, best).sum(1)
    return codebook, code_of, escapes.to(torch.int32)


def _write_headers(packed: torch.Tensor, plan: Plan, values: int) -> None:
    head = packed[:, :HEADER]
    head.zero_()
    head[:, : CODES + 1] = plan.codebook
    head[:, MODE_AT] = plan.packed.to(torch.uint8)
    numbers = torch.stack([torch.full_like(plan.escapes, values), plan.escapes], 1)
    head[:, COUNT_AT : COUNT_AT + 8] = numbers.contiguous().view(torch.uint8)


def _check_headers(packed: torch.Tensor, values: int) -> None:
    head = packed[:, :HEADER].cpu().contiguous()
    count, escapes = head[:, COUNT_AT : COUNT_AT + 8].contiguous().view(torch.int32).unbind(1)
    most = HEADER + 2 * values - escapes_at(values)
    good = (count == values) & (head[:, MODE_AT] <= 1) & (escapes >= 0) & (escapes <= max(0, most))
    if not bool(good.all()):
        row = int((~good).nonzero()[0])
        raise KernelArgumentError(
            f"packed block {row} says mode {int(head[row, MODE_AT])}, {int(count[row])} values, "
            f"{int(escapes[row])} escapes; {values} values are wanted"
        )


def _check(blocks: torch.Tensor, packed: torch.Tensor) -> int:
    """The number of values in a block."""
    if blocks.dim() != 2 or blocks.shape[1] % (2 * VALUES_STEP) or blocks.shape[1] == 0:
        raise KernelArgumentError(
            f"blocks must be (n, a multiple of {2 * VALUES_STEP} bytes), not {tuple(blocks.shape)}"
        )
    values: int = blocks.shape[1] // 2
    if values > VALUES_MAX or len(packed) != len(blocks) or packed.device != blocks.device:
        raise KernelArgumentError(
            f"{tuple(blocks.shape)} on {blocks.device} does not go with {tuple(packed.shape)} on {packed.device}"
        )
    checks.check_blocks(blocks, blocks.shape[1], 16)
    checks.check_blocks(packed, packed_bound(blocks.shape[1]), 16)
    checks.check_apart(blocks, packed)
    return values
