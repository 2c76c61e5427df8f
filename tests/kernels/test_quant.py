"""Quantised pages against the definition, in torch's own float8 and float64; and how far values come back off."""

from __future__ import annotations

import pytest
import torch

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.ops import PtrTable
from flexkv_sglang.triton_kernels.quant import dequant_scatter, gather_quant, quant_layout
from models.paged_pools import POISON, Shape, poisoned, random_buffers, same_bytes

LARGEST = {"e4m3": 448.0, "int8": 127.0}
CODES = pytest.mark.parametrize("code", ["e4m3", "int8"])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def pool(
    dtype: torch.dtype, device: torch.device, row: tuple[int, ...] = (2, 64)
) -> list[torch.Tensor]:
    maker = torch.Generator().manual_seed(7)
    return [
        (torch.randn(5 * 8, *row, generator=maker) * 10.0 ** (i - 2)).to(dtype).to(device)
        for i in range(4)
    ]


def by_definition(values: torch.Tensor, code: str, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a flat tensor. The quotient is rounded to float32, as the definition has it."""
    x = values.to(torch.float32).cpu().view(-1, group)
    size = torch.where(x.isfinite(), x.abs(), torch.zeros_like(x)).amax(1)
    scale = torch.maximum(size / LARGEST[code], torch.tensor(2.0**-100))
    y = x / scale[:, None]
    if code == "int8":
        codes = y.nan_to_num(0.0, 127.0, -127.0).double().round().clamp(-127, 127).to(torch.int8)
        return codes.view(torch.uint8).flatten(), scale
    codes = y.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(y.isnan(), 0x7F, codes).to(torch.uint8).flatten(), scale


@CODES
@DTYPES
@pytest.mark.parametrize("group", [16, 64])
def test_codes_and_scales_are_those_of_the_definition(
    code: str, dtype: torch.dtype, group: int, device: torch.device
) -> None:
    buffers = pool(dtype, device)
    table = PtrTable(buffers, 8)
    layout = quant_layout(table, group)
    blocks = poisoned(3, layout.block_bytes, device, -(-layout.block_bytes // 16) * 16 + 16)
    ids = [4, 0, 4]
    gather_quant(table, torch.tensor(ids), blocks, code=code, group=group, quota=3)
    for row, page in enumerate(ids):
        for j, buffer in enumerate(buffers):
            codes, scales = by_definition(buffer[page * 8 : page * 8 + 8].flatten(), code, group)
            at, scales_at = j * 1024, layout.scales_at + j * 4 * layout.chunk_groups
            assert torch.equal(blocks[row, at : at + 1024].cpu(), codes)
            got = blocks[row, scales_at : scales_at + 4 * layout.chunk_groups].contiguous()
            assert torch.equal(got.view(torch.float32).cpu(), scales)


@CODES
def test_every_finite_value_of_a_group_and_odd_ones(code: str, device: torch.device) -> None:
    """All bf16 patterns of one sign would be 32768; ties, steps, denormals, zeros, infinities and NaN are here."""
    f8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    f8 = f8[f8.isfinite()].sort().values
    ties = (f8[1:] + f8[:-1]) / 2
    odd = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, float("inf"), float("-inf"), float("nan")])
    data = torch.cat([f8, ties, ties * 1.01, odd])
    data = torch.cat([data, torch.zeros(-len(data) % 1024)]).to(torch.bfloat16)
    buffer = data.view(-1, 1024).to(device).contiguous()
    table = PtrTable([buffer], 1)
    layout = quant_layout(table, 16)
    blocks = poisoned(len(buffer), layout.block_bytes, device)
    gather_quant(table, torch.arange(len(buffer)), blocks, code=code, group=16)
    for row, values in enumerate(buffer):
        codes, _ = by_definition(values, code, 16)
        assert torch.equal(blocks[row, :1024].cpu(), codes)


@CODES
@DTYPES
def test_values_come_back_as_far_off_as_the_code_allows(
    code: str, dtype: torch.dtype, device: torch.device
) -> None:
    buffers = pool(dtype, device)
    table = PtrTable(buffers, 8)
    layout = quant_layout(table)
    blocks = poisoned(5, -(-layout.block_bytes // 16) * 16, device)
    gather_quant(table, torch.arange(5), blocks, code=code)
    others = [torch.zeros_like(buffer) for buffer in buffers]
    target = PtrTable(others, 8)
    for first in (0, 2):  # by ranges of buffers
        dequant_scatter(target, torch.arange(5), blocks, code=code, first=first, count=2)
    step = torch.finfo(dtype).eps / 2
    for got, want in zip(others, buffers, strict=True):
        most = want.float().view(-1, 64).abs().amax(1).repeat_interleave(64).view(want.shape)
        bound = (
            most / 127 / 2
            if code == "int8"
            else torch.maximum(want.float().abs() / 16, most / 448 * 2 ** (-10))
        )
        assert ((got.float() - want.float()).abs() <= bound * 1.01 + got.float().abs() * step).all()


@DTYPES
def test_every_e4m3_code_comes_back_as_torch_reads_it(
    dtype: torch.dtype, device: torch.device
) -> None:
    buffer = torch.zeros(2, 256, dtype=dtype, device=device)
    table = PtrTable([buffer], 1)
    layout = quant_layout(table, 256)
    block = torch.zeros(1, layout.block_bytes + 12, dtype=torch.uint8, device=device)
    block[0, :256] = torch.arange(256, dtype=torch.uint8)
    block[0, 256:260] = torch.tensor([0.75]).view(torch.uint8)
    dequant_scatter(table, torch.tensor([1]), block, code="e4m3", group=256)
    want = (torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * 0.75).to(dtype)
    got = buffer[1].cpu()
    assert torch.equal(got.isnan(), want.isnan())
    assert same_bytes([got[~got.isnan()]], [want[~want.isnan()]])
    assert not buffer[0].any()


@CODES
def test_scatter_touches_its_pages_only(code: str, device: torch.device) -> None:
    buffers = random_buffers(Shape(2, 6, 8, (2, 64)), device)
    before = [buffer.clone() for buffer in buffers]
    table = PtrTable(buffers, 8)
    blocks = torch.zeros(1, quant_layout(table).block_bytes, dtype=torch.uint8, device=device)
    dequant_scatter(table, torch.tensor([2]), blocks, code=code)
    assert all(not buffer[16:24].any() for buffer in buffers)
    for rows in (slice(0, 16), slice(24, 48)):
        assert same_bytes([b[rows] for b in buffers], [b[rows] for b in before])


def test_refusals(device: torch.device) -> None:
    table = PtrTable(pool(torch.bfloat16, device), 8)
    blocks = poisoned(2, quant_layout(table).block_bytes, device)
    ids = torch.tensor([1, 2])
    for function in (gather_quant, dequant_scatter):
        with pytest.raises(KernelArgumentError, match="must be one of"):
            function(table, ids, blocks, code="fp4")
        with pytest.raises(KernelArgumentError, match="power of two"):
            function(table, ids, blocks, code="int8", group=48)
        with pytest.raises(KernelArgumentError, match="are needed"):
            function(table, ids, blocks[:, 16:], code="int8")
        with pytest.raises(KernelArgumentError, match="not in"):
            function(table, ids + 4, blocks, code="int8")
    with pytest.raises(KernelArgumentError, match="distinct"):
        dequant_scatter(table, ids * 0, blocks, code="int8")
    with pytest.raises(KernelArgumentError, match="values are"):
        quant_layout(PtrTable(random_buffers(Shape(1, 4, 8, (64,), torch.uint8), device), 8))
    with pytest.raises(KernelArgumentError, match="does not divide"):
        quant_layout(PtrTable(pool(torch.bfloat16, device, (3, 24)), 8), 512)
    assert (blocks == POISON).all()
