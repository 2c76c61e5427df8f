"""The sum against its definition in Python's integers, and what it notices."""

from __future__ import annotations

import pytest
import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.checksum import block_checksum
from models.paged_pools import poisoned, random_bytes

MASK = (1 << 64) - 1


def mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def by_definition(data: bytes, seed: int) -> int:
    total = mix(seed & MASK)
    for i in range(0, len(data), 8):
        place = ((i // 8 + 1) * 0x9E3779B97F4A7C15) & MASK
        total += mix(int.from_bytes(data[i : i + 8], "little") ^ place)
    return total & MASK


@pytest.mark.parametrize("length", [8, 24, 656, 16384, 16384 + 8, 40000])
def test_it_is_what_its_definition_says(length: int, device: torch.device) -> None:
    blocks = poisoned(3, length, device, length + 24)
    blocks[:] = random_bytes(3, length, device=device)
    seeds = torch.tensor([0, -5, 1 << 62], device=device)
    sums = block_checksum(blocks, seeds=seeds, quota=2)
    want = [
        by_definition(bytes(block.tolist()), seed)
        for block, seed in zip(blocks, seeds.tolist(), strict=True)
    ]
    assert [value & MASK for value in sums.tolist()] == want
    assert seeds.tolist() == [0, -5, 1 << 62]


def test_every_flipped_bit_and_every_exchange_is_noticed(device: torch.device) -> None:
    block = random_bytes(1, 64, seed=4)
    changed = block.repeat(64 * 8 + 7, 1)
    for bit in range(64 * 8):
        changed[bit, bit // 8] ^= 1 << (bit % 8)
    for word in range(7):  # two adjacent words change places
        begin = 512 + word
        first = block[0, word * 8 : word * 8 + 8]
        changed[begin, word * 8 : word * 8 + 8] = block[0, word * 8 + 8 : word * 8 + 16]
        changed[begin, word * 8 + 8 : word * 8 + 16] = first
    sums = block_checksum(torch.cat([block, changed]).to(device)).tolist()
    assert len(set(sums)) == 1 + len(changed)


def test_bytes_behind_the_length_do_not_count(device: torch.device) -> None:
    blocks = random_bytes(2, 640, device=device)
    sums = block_checksum(blocks, length=320)
    blocks[:, 320:] = 0
    assert torch.equal(block_checksum(blocks, length=320), sums)
    assert torch.equal(block_checksum(blocks[:, :320].contiguous()), sums)
    assert block_checksum(blocks[:0]).shape == (0,)


def test_refusals(device: torch.device) -> None:
    blocks = random_bytes(2, 64, device=device)
    for length in (0, 12, 72):
        with pytest.raises(KernelArgumentError):
            block_checksum(blocks, length=length)
    with pytest.raises(KernelArgumentError, match="seeds must be int64"):
        block_checksum(blocks, seeds=torch.zeros(3, dtype=torch.int64, device=device))
    with pytest.raises(KernelArgumentError, match="multiple of 16"):
        block_checksum(random_bytes(2, 64, device=device)[:, 8:])
