"""Packing of exponents: every bit comes back, whatever the values are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.exponents import (
    HEADER,
    TILE,
    escapes_at,
    pack_exponents,
    packed_bound,
    unpack_exponents,
)
from models.paged_pools import POISON, poisoned, random_bytes


def normal(count: int, values: int, spread: float = 1.0) -> torch.Tensor:
    maker = torch.Generator().manual_seed(values)
    return (
        (torch.randn(count, values, generator=maker) * spread).to(torch.bfloat16).view(torch.uint8)
    )


def special() -> torch.Tensor:
    """All 65536 bit patterns are too many for the interpreter; every exponent with both signs is not."""
    exponent = torch.arange(256, dtype=torch.int32).repeat(8)
    rest = torch.randint(
        0, 256, (2048,), generator=torch.Generator().manual_seed(1), dtype=torch.int32
    )
    word = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    return word.to(torch.int16).view(torch.uint8)[None]


CASES = {
    "a tile": normal(2, TILE),
    "less than a tile": normal(3, 576),
    "tiles and a bit": normal(2, 2 * TILE + 8),
    "zeros": torch.zeros(1, 4096, dtype=torch.uint8),
    "one exponent": torch.full((1, 8192), 0x3F, dtype=torch.uint8),
    "every exponent": special(),
    "any bits": random_bytes(2, 8192),
    "8 values": normal(2, 8),
    "a quarter escapes": torch.cat([normal(1, 3 * TILE), random_bytes(1, 2 * TILE)], 1),
}


def packed_and_back(
    blocks: torch.Tensor, quota: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    width = -(-packed_bound(blocks.shape[1]) // 16) * 16
    whole = poisoned(len(blocks), width + 16, blocks.device)
    sizes = pack_exponents(blocks, whole[:, :width], quota=quota)
    assert (whole[:, width:] == POISON).all()
    for row, size in enumerate(sizes.tolist()):  # only these bytes are stored
        whole[row, size:] = POISON
    back = poisoned(len(blocks), blocks.shape[1], blocks.device, blocks.shape[1] + 32)
    unpack_exponents(whole[:, :width], back, quota=quota)
    assert torch.equal(back, blocks)
    return whole, sizes


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("quota", [None, 1])
def test_round_trip(name: str, quota: int | None, device: torch.device) -> None:
    packed_and_back(CASES[name].to(device), quota)


@settings(suppress_health_check=list(HealthCheck))  # the fixture says only where to run
@given(
    st.lists(st.sampled_from([*range(256)]), min_size=1, max_size=24, unique=True),
    st.integers(1, 600),
    st.integers(0, 1 << 30),
)
def test_any_mix_of_exponents_comes_back(
    device: torch.device, used: list[int], eights: int, seed: int
) -> None:
    """From one exponent to more than have codes, alike or not in number, in whole and broken tiles."""
    maker = torch.Generator().manual_seed(seed)
    weights = torch.rand(len(used), generator=maker) ** 4 + 1e-6
    picked = torch.multinomial(weights, eights * 8, replacement=True, generator=maker)
    rest = torch.randint(0, 256, (eights * 8,), generator=maker, dtype=torch.int32)
    exponent = torch.tensor(used, dtype=torch.int32)[picked]
    word = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    packed_and_back(word.to(torch.int16).view(torch.uint8)[None].to(device))


def test_the_bytes_are_those_of_the_table_in_the_docs(device: torch.device) -> None:
    """Byte by byte, as the module's docstring says, in Python's integers."""
    blocks = CASES["a quarter escapes"].to(device)
    packed, sizes = packed_and_back(blocks)
    out, values = packed[0].tolist(), blocks.shape[1] // 2
    words = blocks[0].view(torch.int16).tolist()
    exponents = [(word >> 7) & 0xFF for word in words]
    often = sorted(range(256), key=lambda e: (-exponents.count(e), e))[:15]
    code = [often.index(e) if e in often else 15 for e in exponents]
    escapes = [e for e, c in zip(exponents, code, strict=True) if c == 15]
    assert out[:16] == [*often, 1]
    numbers = torch.tensor(out[16:HEADER], dtype=torch.uint8).view(torch.int32).tolist()
    assert numbers == [values, len(escapes), 0, 0]
    assert out[HEADER : HEADER + values] == [((w >> 8) & 0x80) | (w & 0x7F) for w in words]
    pairs = [a | b << 4 for a, b in zip(code[::2], code[1::2], strict=True)]
    assert out[HEADER + values : HEADER + values * 3 // 2] == pairs
    before = [code[: i * TILE].count(15) for i in range(-(-values // TILE))]
    table = torch.tensor(out[HEADER + values * 3 // 2 : escapes_at(values)], dtype=torch.uint8)
    assert table.view(torch.int32).tolist() == before
    assert out[escapes_at(values) :][: len(escapes)] == escapes
    assert sizes.tolist() == [escapes_at(values) + len(escapes)]


def test_normal_values_shrink_and_random_bits_do_not_grow_beyond_the_bound(
    device: torch.device,
) -> None:
    _, sizes = packed_and_back(normal(2, 2 * TILE).to(device))
    assert (sizes < 0.76 * 4 * TILE).all()
    _, sizes = packed_and_back(CASES["any bits"].to(device))
    assert (sizes == HEADER + 8192).all()


def test_damaged_headers_are_refused(device: torch.device) -> None:
    blocks = normal(2, TILE).to(device)
    good, _ = packed_and_back(blocks)
    for at, value in ((15, 2), (16, 1), (19, 0x80), (23, 0x7F), (22, 0xFF)):
        packed = good.clone()
        packed[1, at] = value
        out = poisoned(2, blocks.shape[1], device)
        with pytest.raises(KernelArgumentError, match="packed block 1 says"):
            unpack_exponents(packed, out)
        assert (out == POISON).all()


def test_refusals(device: torch.device) -> None:
    blocks = normal(2, 64).to(device)
    room = poisoned(2, packed_bound(128), device)
    for wrong, target, message in (
        (blocks[:, :120], room, "multiple of 16 bytes"),
        (blocks, room[:1], "does not go with"),
        (blocks, room[:, :128], "are needed"),
        (blocks.view(torch.int8), room, "must be uint8"),
        (room[:, :128], room, "lie in each other"),
    ):
        with pytest.raises(KernelArgumentError, match=message):
            pack_exponents(wrong, target)
    assert len(pack_exponents(blocks[:0], room[:0])) == 0
    unpack_exponents(room[:0], blocks[:0])
