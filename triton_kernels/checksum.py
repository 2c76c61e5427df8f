"""A 64-bit sum per block that any number of programs can add up in any order.

The block is read as little-endian 64-bit words ``w[i]``; the sum is ``mix(seed) + sum of mix(w[i] ^ (i + 1) * GOLDEN)``
modulo 2**64, with the finaliser of splitmix64 as ``mix``. ``mix`` is one to one: a change within one word is always
seen, any other with a chance of 2**-64 to miss. It is no protection against an adversary. It is another sum than
that of stored pages (xxh3), so a page checked with it needs a namespace of its own.
"""

from __future__ import annotations

import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels import checks, dispatch

WORD = 8
GOLDEN, FIRST_FACTOR, SECOND_FACTOR = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def block_checksum(
    blocks: torch.Tensor,
    *,
    length: int | None = None,
    seeds: torch.Tensor | None = None,
    quota: int | None = None,
) -> torch.Tensor:
    """The sums of ``blocks``, int64 ``(n,)`` on their device (the bits of an unsigned number).

    ``blocks``: uint8 ``(n, >= length)``, beginning at a multiple of 16 bytes; ``length``: bytes that count, a
    multiple of 8, all by default. ``seeds``: int64 ``(n,)``, e.g. of the pages' keys; 0 by default. Runs on the current
    stream and does not wait for it.
    """
    checks.check_quota(quota)
    if blocks.dim() != 2:
        raise KernelArgumentError(f"blocks must be (n, bytes), not {tuple(blocks.shape)}")
    counted = blocks.shape[1] if length is None else length
    if counted < WORD or counted % WORD:
        raise KernelArgumentError(f"length is {counted}, must be a multiple of {WORD} and not 0")
    checks.check_blocks(blocks, counted, WORD)
    start = torch.zeros(len(blocks), dtype=torch.int64, device=blocks.device)
    if seeds is not None:
        if seeds.dtype != torch.int64 or seeds.shape != start.shape or seeds.device != start.device:
            raise KernelArgumentError(
                f"seeds must be int64 {tuple(start.shape)} on {start.device}, "
                f"not {seeds.dtype} {tuple(seeds.shape)} on {seeds.device}"
            )
        start = seeds
    sums = mix(start)
    kernel = dispatch.kernels(blocks.device, "checksum_kernel")
    if len(blocks) == 0:
        return sums
    if kernel is None:
        add_sums(blocks, counted, sums)
    else:
        kernel.add_sums(blocks, counted, sums, quota)
    return sums


def add_sums(blocks: torch.Tensor, length: int, sums: torch.Tensor) -> None:
    """The reference. One block at a time: it needs some copies of the words."""
    count = length // WORD
    position = (torch.arange(count, device=blocks.device) + 1) * signed(GOLDEN)
    for number, block in enumerate(blocks):
        words = block[:length].view(torch.int64)
        sums[number] += mix(words ^ position).sum()


def mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser; int64 holds the bits, products wrap."""
    x = (x ^ _shifted(x, 30)) * signed(FIRST_FACTOR)
    x = (x ^ _shifted(x, 27)) * signed(SECOND_FACTOR)
    return x ^ _shifted(x, 31)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """A logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def signed(value: int) -> int:
    """The int64 with these bits."""
    return value - (1 << 64) if value >> 63 else value
