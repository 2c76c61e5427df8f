"""Properties of the kernels alone; ``test_other_ways.py`` runs these tests, in the interpreter and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flexkv_sglang.triton_kernels import checks, launch
from flexkv_sglang.triton_kernels.ops import PtrTable
from models.paged_pools import (
    POISON,
    Shape,
    block_of,
    poisoned,
    random_buffers,
    same_bytes,
)


def test_ids_outside_of_the_pool_move_nothing(device: torch.device) -> None:
    """Ids on a device may come unchecked; a wrong one must not reach other memory."""
    shape = Shape(6, 9, 16, (2, 64))
    buffers = random_buffers(shape, device)
    before = [buffer.clone() for buffer in buffers]
    table = PtrTable(buffers, shape.page_size)
    ids = torch.tensor([2, 9, -1, 1 << 40], device=device)
    blocks = poisoned(4, shape.block_bytes, device)
    copy = checks.checked_copy(
        table, ids % 9, blocks, (0, None, 0, None), distinct=False, trusted=True
    )
    launch.gather(dataclasses.replace(copy, ids=ids))
    assert torch.equal(blocks[0], block_of(buffers, shape.page_size, 2))
    assert (blocks[1:] == POISON).all()
    launch.scatter(dataclasses.replace(copy, ids=ids))
    assert same_bytes(buffers, before)


@pytest.mark.parametrize("rows", [1, 2, 31, 64, 164, 288, 1024, 4096, 4097, 100_000])
def test_tiles_waste_little(rows: int) -> None:
    pieces, words = launch.tile_shape(rows)
    assert pieces * words == launch.TILE_WORDS
    lanes = -(-rows // words) * words
    assert words <= 32 or lanes <= rows * 9 / 8
