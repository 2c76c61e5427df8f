"""The arithmetic of blocks: runs cover a block once, in order, for any layers; tables know their buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.errors import KernelArgumentError
from flexkv_sglang.triton_kernels.layout import BlockLayout, Part
from flexkv_sglang.triton_kernels.ops import PtrTable
from models.paged_pools import Shape, layout_of, random_buffers

layouts = st.integers(1, 9).flatmap(
    lambda layers: st.lists(
        st.builds(Part, st.just(layers), st.sampled_from([16, 48, 4096])), min_size=1, max_size=4
    ).map(lambda parts: BlockLayout(tuple(parts)))
)


@given(layouts, st.data())
def test_runs_name_each_chunk_of_the_layers_once(layout: BlockLayout, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, layout.layers - 1))
    last = data.draw(st.integers(first + 1, layout.layers))
    want = {}  # (table, buffer) -> offset, by walking the block
    offset = 0
    shared = layout.table_count == 1
    for number, part in enumerate(layout.parts):
        for layer in range(part.layers):
            if first <= layer < last:
                place = (0, number * part.layers + layer) if shared else (number, layer)
                want[place] = offset
            offset += part.chunk_bytes
    assert offset == layout.block_bytes
    got = {}
    for run in layout.runs(first, last):
        size = layout.parts[run.table].chunk_bytes
        for j in range(run.count):
            assert (run.table, run.first + j) not in got
            got[run.table, run.first + j] = run.offset_bytes + j * size
    assert got == want


def test_layouts_of_known_models() -> None:
    llama = layout_of(32, 64, 8 * 128 * 2, 8 * 128 * 2)
    assert (llama.block_bytes, llama.table_count, len(llama.runs())) == (8 << 20, 1, 1)
    chunk = 128 << 10
    group = [(run.first, run.count, run.offset_bytes) for run in llama.runs(4, 8)]
    assert group == [(4, 4, 4 * chunk), (36, 4, 36 * chunk)]
    deepseek = layout_of(61, 64, 1152)
    assert deepseek.block_bytes == 61 * 72 * 1024
    uneven = layout_of(2, 16, 384, 256)
    assert [run.table for run in uneven.runs()] == [0, 1]


def test_layers_outside_are_refused() -> None:
    layout = layout_of(4, 1, 16)
    for first, last in ((-1, 2), (0, 5), (2, 2), (3, 1)):
        with pytest.raises(KernelArgumentError, match="layers"):
            layout.runs(first, last)
    with pytest.raises(KernelArgumentError):
        BlockLayout((Part(2, 16), Part(3, 16)))
    with pytest.raises(KernelArgumentError):
        Part(0, 16)


def test_a_table_knows_its_buffers() -> None:
    cpu = torch.device("cpu")
    table = PtrTable(random_buffers(Shape(4, 6, 16, (2, 64)), cpu), 16)
    assert (table.row_bytes, table.chunk_bytes, table.page_stride_bytes) == (256, 4096, 4096)
    assert (table.page_count, table.row_count, table.buffer_count) == (6, 96, 4)
    assert (table.align, table.spacing_bytes, table.ptrs.dtype) == (16, None, torch.uint64)
    assert table.ptrs.tolist() == [buffer.data_ptr() for buffer in table.buffers]
    stacked = PtrTable(random_buffers(Shape(4, 6, 16, (2, 64), stack=True), cpu), 16)
    assert stacked.spacing_bytes == 6 * 16 * 256
    odd = [
        PtrTable(random_buffers(Shape(2, 6, 3, (n,), torch.uint8), cpu), 3) for n in (24, 12, 6, 5)
    ]
    assert [table.align for table in odd] == [8, 4, 2, 1]
    partial = PtrTable([torch.zeros(50, 16, dtype=torch.uint8)], 16)
    assert partial.page_count == 3  # two rows that are no page
