"""A block is SGLang's host page: device pools and host pools are SGLang's own, and so is the copy between them.

If SGLang changes ``page_first_direct``, this fails, and pages of the two paths must not be shared any more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import pytest

from flexkv_bed.controller import (
    Geometry,
    Kind,
    boot,
    device_pool,
    host_pool,
)
from flexkv_bed.tiny_model import write_config
from models import hybrid_models

import torch  # isort: skip  # after flexkv_bed, which silences warnings of SGLang's imports
from sglang.srt.mem_cache.pool_host import dsa, mha

from flexkv_sglang.triton_kernels.layout import BlockLayout
from flexkv_sglang.triton_kernels.ops import PtrTable, gather_pages, scatter_pages
from models.paged_pools import layout_of, poisoned, random_bytes

pytestmark = pytest.mark.sglang
LAYOUT = "page_first_direct"
PAGES = 4


def fill(buffers: list[torch.Tensor]) -> None:
    for i, buffer in enumerate(buffers):
        flat = buffer.view(torch.uint8)
        flat.copy_(random_bytes(flat.numel(), seed=i).view(flat.shape))


def stored_bytes(host: Any, indices: torch.Tensor) -> torch.Tensor:
    """Bytes that the storage backend stores of each page: the buffers of ``get_page_buffer_meta`` in their order."""
    addresses, lengths = host.get_page_buffer_meta(indices)
    per_page = len(addresses) // PAGES
    pieces = [
        bytearray(ctypes.string_at(address, length))
        for address, length in zip(addresses, lengths, strict=True)
    ]
    pages = [b"".join(pieces[i : i + per_page]) for i in range(0, len(pieces), per_page)]
    return torch.frombuffer(bytearray(b"".join(pages)), dtype=torch.uint8).view(PAGES, -1)


def compare(
    host: Any,
    device: Any,
    pools: list[list[torch.Tensor]],
    layout: BlockLayout,
    page_size: int,
    *,
    rows_are_pages: bool = False,
    flat_pages: bool = True,
) -> None:
    """SGLang copies device to host, we copy device to block: equal bytes. A block back on the device is equal too."""
    everything = [buffer for pool in pools for buffer in pool]
    fill(everything)
    slots = torch.cat([torch.arange(page_size) + page * page_size for page in (5, 2, 7, 1)]).to(
        torch.int64
    )
    indices = torch.arange(PAGES * page_size) + page_size
    host.backup_from_device_all_layer(device, indices, slots, "direct")
    want = stored_bytes(host, indices)
    tables = [PtrTable(pool, page_size, rows_are_pages=rows_are_pages) for pool in pools]
    assert len(tables) == layout.table_count
    pages = slots[::page_size] // page_size
    blocks = poisoned(PAGES, layout.block_bytes, torch.device("cpu"))
    copy_runs(gather_pages, tables, layout, pages, blocks)
    assert torch.equal(blocks, want)
    if flat_pages:
        for row, index in enumerate(indices[::page_size].tolist()):
            flat = host.get_data_page(index, flat=True).contiguous().view(torch.uint8)
            assert torch.equal(flat, blocks[row])
    before = [buffer.clone() for buffer in everything]
    for buffer in everything:
        buffer.view(torch.uint8).fill_(0x5A)
    copy_runs(scatter_pages, tables, layout, pages, blocks)
    rows = pages if rows_are_pages else slots
    for buffer, old in zip(everything, before, strict=True):
        assert torch.equal(buffer.view(torch.uint8)[rows], old.view(torch.uint8)[rows])


def copy_runs(
    function: Callable[..., None],
    tables: list[PtrTable],
    layout: BlockLayout,
    pages: torch.Tensor,
    blocks: torch.Tensor,
) -> None:
    for run in layout.runs():
        function(
            tables[run.table],
            pages,
            blocks,
            first=run.first,
            count=run.count,
            offset_bytes=run.offset_bytes,
        )


@pytest.fixture(scope="module", autouse=True)
def booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("kind", ["mha", "mha_asymmetric", "mla"])
def test_a_block_is_a_host_page(kind: Kind, page_size: int) -> None:
    geometry = Geometry(kind=kind, layout=LAYOUT, page_size=page_size, size_tokens=16 * page_size)
    device = device_pool(geometry)
    host = host_pool(device, geometry)
    assert host.layout == LAYOUT
    size = geometry.heads * geometry.dtype.itemsize
    if kind == "mla":
        pools = [list(device.kv_buffer)]
        layout = layout_of(geometry.layers, page_size, (64 + 16) * 2)
    else:
        k, v = list(device.k_buffer), list(device.v_buffer)
        pools = [k, v] if kind == "mha_asymmetric" else [[*k, *v]]
        rows = geometry.head_dim * size, geometry.v_head_dim * size
        layout = layout_of(geometry.layers, page_size, *rows)
    compare(host, device, pools, layout, page_size, flat_pages=kind != "mha_asymmetric")


def test_a_block_is_a_host_page_of_an_indexer(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without a GPU this module does not import the copy that mha.py uses as well.
    name = "transfer_kv_all_layer_direct_lf_pf"
    monkeypatch.setattr(dsa, name, getattr(mha, name), raising=False)
    model = hybrid_models.MODELS["indexer"](LAYOUT)
    host, device = model.sidecars["indexer"].pool, model.device
    buffers = list(device.index_k_with_scale_buffer)
    layout = layout_of(len(buffers), 1, buffers[0][0].numel())
    compare(host, device, [buffers], layout, hybrid_models.PAGE, rows_are_pages=True)
