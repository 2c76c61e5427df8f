"""Gather and scatter against plain slicing: they write every right byte and no other."""

from __future__ import annotations

import pytest
import torch

from flexkv_sglang.triton_kernels.ops import PtrTable, gather_pages, scatter_pages, warmup
from models.paged_pools import (
    POISON,
    Shape,
    block_of,
    layout_of,
    poisoned,
    random_buffers,
    random_bytes,
    same_bytes,
)

F8 = torch.float8_e4m3fn
CASES = {
    "mha-16": Shape(6, 9, 16, (2, 64)),
    "mha-64-wide": Shape(4, 5, 64, (1, 256)),
    "mha-1": Shape(6, 40, 1, (2, 64)),
    "mla-16": Shape(3, 9, 16, (1, 576)),
    "mla-1-stacked": Shape(3, 30, 1, (1, 576), stack=True),
    "dsa-656": Shape(3, 6, 16, (656,), torch.uint8),
    "fp8-32": Shape(4, 6, 32, (2, 64), F8, stack=True),
    "fp32-one-buffer": Shape(1, 7, 4, (8,), torch.float32),
    "rows-of-8-bytes": Shape(3, 11, 3, (4,), torch.float16),
    "rows-of-4-bytes": Shape(3, 11, 3, (2,), torch.float16),
    "rows-of-6-bytes": Shape(2, 11, 5, (3,), torch.int16),
    "rows-of-5-bytes": Shape(2, 11, 3, (5,), torch.uint8),
    "gaps-between-rows": Shape(3, 20, 1, (2, 16), gap=2),
}
IDS = (7, 3, 5, 1, 3)  # with a page twice: only a gather may do that
each_case = pytest.mark.parametrize("shape", CASES.values(), ids=CASES.keys())


def expected(buffers: list[torch.Tensor], shape: Shape, pages: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([block_of(buffers, shape.page_size, page) for page in pages])


@each_case
@pytest.mark.parametrize("quota", [None, 3])
def test_gather_makes_the_blocks_and_nothing_else(
    shape: Shape, quota: int | None, device: torch.device
) -> None:
    ids = tuple(i % shape.pages for i in IDS)
    buffers = random_buffers(shape, device)
    table = PtrTable(buffers, shape.page_size)
    whole = poisoned(len(ids), shape.block_bytes + 48, device)
    blocks = whole[:, : shape.block_bytes + 16]
    gather_pages(table, torch.tensor(ids, device=device), blocks, quota=quota)
    assert torch.equal(blocks[:, : shape.block_bytes], expected(buffers, shape, ids))
    assert (whole[:, shape.block_bytes :] == POISON).all()


@each_case
def test_scatter_writes_its_pages_and_no_other_byte(shape: Shape, device: torch.device) -> None:
    ids = tuple(dict.fromkeys(i % shape.pages for i in IDS))
    buffers = random_buffers(shape, device)
    before = [buffer.clone() for buffer in buffers]
    blocks = random_bytes(len(ids), shape.block_bytes, seed=9, device=device)
    scatter_pages(PtrTable(buffers, shape.page_size), torch.tensor(ids, dtype=torch.int32), blocks)
    assert torch.equal(expected(buffers, shape, ids), blocks)
    others = tuple(set(range(shape.pages)) - set(ids))
    assert torch.equal(expected(buffers, shape, others), expected(before, shape, others))


def test_scatter_leaves_the_gaps_between_rows(device: torch.device) -> None:
    whole = random_bytes(20, 96, seed=1, device=device)
    before = whole.clone()
    rows = whole[:, :64].view(torch.bfloat16)
    blocks = random_bytes(3, 64, seed=2, device=device)
    scatter_pages(PtrTable([rows], 1), torch.tensor([4, 0, 19]), blocks)
    before[[4, 0, 19], :64] = blocks
    assert torch.equal(whole, before)


@pytest.mark.parametrize("v_dim", [64, 32], ids=["symmetric", "asymmetric"])
def test_layer_by_layer_is_the_whole_page(v_dim: int, device: torch.device) -> None:
    layers, page_size = 3, 8
    k = random_buffers(Shape(layers, 6, page_size, (2, 64)), device)
    v = random_buffers(Shape(layers, 6, page_size, (2, v_dim)), device, seed=20)
    layout = layout_of(layers, page_size, 2 * 64 * 2, 2 * v_dim * 2)
    pools = [[*k, *v]] if layout.table_count == 1 else [k, v]
    tables = [PtrTable(buffers, page_size) for buffers in pools]
    ids = torch.tensor([5, 2])
    blocks = poisoned(2, layout.block_bytes, device)
    for run in layout.runs():
        gather_pages(
            tables[run.table],
            ids,
            blocks,
            first=run.first,
            count=run.count,
            offset_bytes=run.offset_bytes,
        )
    want = torch.stack([block_of([*k, *v], page_size, page) for page in ids.tolist()])
    assert torch.equal(blocks, want)
    for pool in (*k, *v):
        pool.zero_()
    for layer in range(layers):
        for run in layout.runs(layer, layer + 1):
            scatter_pages(
                tables[run.table],
                ids,
                blocks,
                first=run.first,
                count=run.count,
                offset_bytes=run.offset_bytes,
            )
        done = [*k[: layer + 1], *v[: layer + 1]]
        assert all(pool.view(torch.uint8)[2 * page_size : 3 * page_size].any() for pool in done)
        assert not any(pool.view(torch.uint8).any() for pool in (*k[layer + 1 :], *v[layer + 1 :]))
    assert torch.equal(
        torch.stack([block_of([*k, *v], page_size, page) for page in ids.tolist()]), want
    )


def test_rows_that_are_pages(device: torch.device) -> None:
    buffers = random_buffers(Shape(3, 8, 1, (132, 16), torch.uint8), device)
    table = PtrTable(buffers, 64, rows_are_pages=True)
    assert (table.page_count, table.chunk_bytes) == (8, 132 * 16)
    blocks = poisoned(2, 3 * 132 * 16, device)
    gather_pages(table, torch.tensor([6, 1]), blocks)
    assert torch.equal(blocks, torch.stack([block_of(buffers, 1, page) for page in (6, 1)]))


def test_nothing_to_do(device: torch.device) -> None:
    shape = CASES["mha-16"]
    table = PtrTable(random_buffers(shape, device), shape.page_size)
    none = torch.zeros(0, dtype=torch.int64)
    for function in (gather_pages, scatter_pages):
        function(table, none, poisoned(0, shape.block_bytes, device))


def test_a_pool_beyond_eight_gigabytes(device: torch.device) -> None:
    """Offsets of more than 32 bits, in elements too. On the CPU the memory is never touched but for two pages."""
    pages, page_size, row = 10_000_000, 1, 480
    buffer = torch.empty((pages * page_size, row), dtype=torch.bfloat16, device=device)
    assert buffer.numel() * 2 > 8 << 30
    ids = torch.tensor([pages - 1, 4_473_925])  # 4473925 * 960 B is just above 2**32
    data = random_bytes(2, row * 2, seed=3, device=device)
    table = PtrTable([buffer], page_size)
    scatter_pages(table, ids, data)
    assert torch.equal(buffer[ids.to(device)].view(torch.uint8), data)
    blocks = poisoned(2, row * 2, device)
    gather_pages(table, ids, blocks)
    assert torch.equal(blocks, data)


def test_warmup_touches_no_pool(device: torch.device) -> None:
    buffers = random_buffers(CASES["mla-16"], device)
    before = [buffer.clone() for buffer in buffers]
    warmup(PtrTable(buffers, 16))
    assert same_bytes(buffers, before)
