"""Staging stands for SGLang's own host pools: same identity, same buffers, same bytes of a page.

It fails when SGLang changes a host pool in a way that would part the pages of linker and HiCache replicas.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flexkv_bed.controller import Geometry, boot, device_pool, host_pool
from flexkv_bed.tiny_model import write_config
from models.hybrid_models import PAGE
from models.plain_pools import config

import sgl_kernel.kvcacheio as copies  # isort: skip
import torch  # isort: skip
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo  # isort: skip
from sglang.srt.mem_cache.hicache_storage import PoolName  # isort: skip
from sglang.srt.mem_cache.hybrid_cache.linker_pool_assembler import DevicePoolEntry  # isort: skip
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool  # isort: skip
from sglang.srt.mem_cache.pool_host import dsa as dsa_host  # isort: skip
from sglang.srt.mem_cache.pool_host import mamba as mamba_host  # isort: skip
from sglang.srt.mem_cache.pool_host.dsa import (  # isort: skip
    DSAIndexerPoolHost,
    make_dsa_indexer_pool_decl,
)
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost  # isort: skip

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.integration.pool_identity import PoolSpecs
from flexkv_sglang.linker.device_models import _mamba, device_pools
from flexkv_sglang.linker.device_pages import DevicePool
from flexkv_sglang.linker.staging import StagingRows
from flexkv_sglang.pools.host_pages import open_pages

pytestmark = [pytest.mark.sglang]

LAYOUT = "page_first_direct"


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")), page_size=PAGE)


def fill(tensors: list[torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    for tensor in tensors:
        rows = tensor.view(torch.uint8)
        rows.copy_(torch.randint(0, 256, rows.shape, dtype=torch.uint8, generator=generator))


def carried(pool: Any, name: str = "kv") -> DevicePool:
    params = SimpleNamespace(page_size=PAGE)
    found = device_pools(pool, params, dcp_size=1, unified=False)
    return next(item for item in found if item.name == name)


def attention(kind: str) -> tuple[DevicePool, Any, list[torch.Tensor]]:
    geometry = Geometry(kind=kind, layout=LAYOUT, page_size=PAGE, size_tokens=16 * PAGE)  # type: ignore[arg-type]
    pool = device_pool(geometry)
    buffers = list(pool.kv_buffer) if kind == "mla" else [*pool.k_buffer, *pool.v_buffer]
    return carried(pool), host_pool(pool, geometry), buffers


def indexer() -> tuple[DevicePool, Any, list[torch.Tensor]]:
    """Of three layers, the second one shares the keys of the first."""
    pool = DSATokenToKVPool(
        PAGE * 16, PAGE, 64, torch.bfloat16, 16, 3, "cpu", 128,
        enable_memory_saver=False, kv_cache_dim=80, skip_topk_layers=[False, True, False],
    )  # fmt: skip
    anchor = host_pool(pool, Geometry(kind="mla", layout=LAYOUT, page_size=PAGE, layers=3))
    host = DSAIndexerPoolHost(
        decl=make_dsa_indexer_pool_decl(pool), anchor_host=anchor, pin_memory=False
    )
    buffers = [pool.index_k_with_scale_buffer[layer] for layer in (0, 2)]
    return carried(pool, "indexer"), host, buffers


def mamba() -> tuple[DevicePool, Any, list[torch.Tensor]]:
    temporal = torch.zeros(3, 8, 4, 64, dtype=torch.float32)
    conv = [torch.zeros(3, 8, 32, 4, dtype=torch.bfloat16)]
    cache = SimpleNamespace(temporal=temporal, conv=conv)
    requests = SimpleNamespace(
        mamba_pool=SimpleNamespace(mamba_cache=cache), mamba_map={0: 0, 2: 1, 3: 2}
    )
    info = MambaStateBufferInfo(temporal=temporal, conv=tuple(conv))
    host = MambaPoolHost(info, 4.0, 0, device_capacity=8, pin_memory=False, layout=LAYOUT)
    return _mamba(requests, 0), host, [*temporal, *conv[0]]


MODELS: dict[str, Callable[[], tuple[DevicePool, Any, list[torch.Tensor]]]] = {
    "mha": lambda: attention("mha"),
    "mha_asymmetric": lambda: attention("mha_asymmetric"),
    "mla": lambda: attention("mla"),
    "indexer": indexer,
    "mamba": mamba,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_identity_is_that_of_sglangs_host_pool(tmp_path: Path, name: str) -> None:
    device, host, _ = MODELS[name]()
    settings = config(tmp_path, mla=name in ("mla", "indexer"))
    specs = PoolSpecs(FlexKVConfig.parse(settings.extra_config), settings)
    staging = StagingRows(device.shape, device.device)
    fields = [
        specs.identity(device.name, pool, open_pages(pool)).fields() for pool in (staging, host)
    ]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_block_has_the_bytes_of_a_page_that_sglang_copied_to_its_host_pool(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's copy routine; its kernels, which it imports under CUDA alone, are the bed's torch copies."""
    for module in (dsa_host, mamba_host):
        for kernel in copies.ALL:
            monkeypatch.setattr(module, kernel, getattr(copies, kernel), raising=False)
    device, host, buffers = MODELS[name]()
    fill(buffers)
    page, copied = device.page_size, 5
    indices = torch.arange(copied * page, (copied + 1) * page)
    host.backup_from_device_all_layer(
        getattr(host, "device_pool", None), torch.arange(page, 2 * page), indices, "direct"
    )
    addresses, lengths = host.get_page_buffer_meta(torch.arange(page, 2 * page))
    wanted = b"".join(
        ctypes.string_at(address, size) for address, size in zip(addresses, lengths, strict=True)
    )
    blocks = torch.zeros(1, device.layout.block_bytes, dtype=torch.uint8)
    device.gather(device.page_ids(indices), blocks)
    assert blocks[0].numpy().tobytes() == wanted


@pytest.mark.parametrize("name", MODELS)
def test_addresses_and_chunks_are_those_of_sglangs_own_linker_entry(name: str) -> None:
    device, _, buffers = MODELS[name]()
    count = len(buffers) // len(device.layout.parts)
    entry = DevicePoolEntry(
        name=PoolName(device.name),
        indices_from_pool=PoolName(device.source),
        device_pool=None,
        components=[buffers[start : start + count] for start in range(0, len(buffers), count)],
        layer_mapping={},
        page_size=device.page_size,
        rows_are_pages=name in ("indexer", "mamba"),
    )
    theirs = [meta for component in entry.buffer_meta for meta in component]
    addresses = [int(address) for table in device.tables for address in table.ptrs.tolist()]
    assert addresses == [address for address, _, _ in theirs]
    chunks = [t.chunk_bytes for t in device.tables for _ in range(t.buffer_count)]
    assert chunks == [size for _, _, size in theirs]
    indices = torch.arange(3 * device.page_size, 5 * device.page_size)
    rows = entry.prepare_locations(indices)
    per_row = 1 if device.tables[0].page_size == 1 else device.page_size
    assert device.page_ids(indices).tolist() == [row // per_row for row in rows]


def test_index_keys_come_with_the_layers_that_have_some() -> None:
    device, _, _ = indexer()
    assert dict(device.layers) == {0: 0, 2: 1}


def test_scattering_a_layer_touches_no_other() -> None:
    for name in ("mha", "mha_asymmetric", "mla", "indexer", "mamba"):
        device, _, buffers = MODELS[name]()
        fill(buffers)
        blocks = torch.zeros(1, device.layout.block_bytes, dtype=torch.uint8)
        device.gather(torch.tensor([5]), blocks)
        before = [buffer.clone().view(torch.uint8) for buffer in buffers]
        device.scatter(torch.tensor([3]), blocks, 1)
        changed = {
            number % device.layout.layers
            for number, buffer in enumerate(buffers)
            if not torch.equal(buffer.view(torch.uint8), before[number])
        }
        assert changed == {1}, name
