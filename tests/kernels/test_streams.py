"""Tests that need a GPU: order on streams, no hidden waiting, no compiling while serving."""

from __future__ import annotations

import pytest
import torch

from flexkv_sglang.triton_kernels.ops import PtrTable, gather_pages, scatter_pages, warmup
from models.paged_pools import Shape, block_of, poisoned, random_buffers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
SHAPE = Shape(64, 300, 16, (8, 128))
CYCLES = 200_000_000  # about a tenth of a second


@pytest.fixture
def pools() -> list[torch.Tensor]:
    return random_buffers(SHAPE, torch.device("cuda", 0))


def test_copies_run_on_the_current_stream_in_its_order(pools: list[torch.Tensor]) -> None:
    """A delayed change comes before the gather behind it, and a consumer that waits for the event sees all of it."""
    table = PtrTable(pools, SHAPE.page_size)
    blocks = poisoned(100, SHAPE.block_bytes, table.device)
    ids = torch.randperm(SHAPE.pages, device=table.device)[:100]
    side = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        for pool in pools:
            pool.view(torch.uint8).fill_(7)
        gather_pages(table, ids, blocks, quota=16, trusted_ids=True)
        done = torch.cuda.Event()
        done.record()
    assert not done.query(), "the call waited for the stream"
    torch.cuda.current_stream().wait_event(done)
    assert (blocks == 7).all()


def test_a_delayed_scatter_is_not_overtaken(pools: list[torch.Tensor]) -> None:
    table = PtrTable(pools, SHAPE.page_size)
    ids = torch.arange(50, 150, device=table.device)
    blocks = torch.randint(0, 256, (100, SHAPE.block_bytes), dtype=torch.uint8, device=table.device)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        scatter_pages(table, ids, blocks, trusted_ids=True)
        done = torch.cuda.Event()
        done.record()
    torch.cuda.current_stream().wait_event(done)
    assert torch.equal(block_of(pools, SHAPE.page_size, 149), blocks[99])


def test_trusted_ids_cause_no_synchronisation(pools: list[torch.Tensor]) -> None:
    table = PtrTable(pools, SHAPE.page_size)
    ids = torch.arange(100, device=table.device)
    blocks = poisoned(100, SHAPE.block_bytes, table.device)
    warmup(table)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gather_pages(table, ids, blocks, trusted_ids=True)
        scatter_pages(table, ids, blocks, trusted_ids=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_warmup_leaves_nothing_to_compile(pools: list[torch.Tensor]) -> None:
    from flexkv_sglang.triton_kernels.copy import copy_pieces

    table = PtrTable(pools, SHAPE.page_size)
    warmup(table)
    cache = copy_pieces.device_caches[0][0]
    before = len(cache)
    for count in (1, 2, 16, 17):
        blocks = poisoned(count, SHAPE.block_bytes, table.device, SHAPE.block_bytes + 16)
        ids = torch.arange(count + 1, device=table.device)[1:]  # an odd address
        gather_pages(table, ids, blocks, quota=1)
        scatter_pages(table, ids.int(), blocks[:, :-4096], first=1, count=1)
    assert len(cache) == before


def test_ids_on_the_device_are_checked_unless_trusted(pools: list[torch.Tensor]) -> None:
    table = PtrTable(pools, SHAPE.page_size)
    blocks = poisoned(2, SHAPE.block_bytes, table.device)
    ids = torch.tensor([1, SHAPE.pages], device=table.device)
    with pytest.raises(ValueError, match="not in"):
        gather_pages(table, ids, blocks)
    gather_pages(table, ids, blocks, trusted_ids=True)
    assert torch.equal(blocks[0], block_of(pools, SHAPE.page_size, 1))
