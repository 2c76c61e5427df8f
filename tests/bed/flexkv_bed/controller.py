"""SGLang's own HiCache controller, device pools and host pools inside this process, on the CPU, without a model.

    boot(model_dir, page_size=16)
    with Rig(Geometry(layout="page_first"), backend="flexkv", extra={"path": ...}) as rig:
        write_pages(rig, token_ids(6 * 16), seed=1)                  # L1 -> L2 -> L3
        got = prefetch_pages(rig, token_ids(6 * 16))                 # L3 -> L2 -> L1
        assert got.same_bytes(expected_rows(rig, 6 * 16, seed=1))

Contents depend on the seed alone, so one process can write and another verify. Pools hold random *bytes*,
NaN patterns included: compare bytes, never numbers. ``boot`` comes first and once per process.
Every wait is bounded by ``WAIT_S``.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from flexkv_bed.server import IO_BACKEND, Layout

os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "1")  # SGLang reads it while it is imported
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # tests run with warnings as errors; these are not ours
    import torch
    import torch.distributed as dist
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.managers.cache_controller import HiCacheController
    from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator, TokenToKVPoolAllocator
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool
    from sglang.srt.mem_cache.pool_host.mha import (
        AsymmetricMHATokenToKVPoolHost,
        MHATokenToKVPoolHost,
    )
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost
    from sglang.srt.mem_cache.utils import get_storage_hash_str
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import ServerArgs

Kind = Literal["mha", "mha_asymmetric", "mla"]
WAIT_S = 20.0
POISON = 0xA5
"""Fills both tiers before a read: a test sees bytes that were not loaded."""

LAYOUTS: Mapping[Kind, tuple[Layout, ...]] = {
    "mha": ("layer_first", "page_first", "page_first_direct", "page_head"),
    "mha_asymmetric": ("page_first", "page_first_direct"),
    "mla": ("layer_first", "page_first", "page_first_direct"),
}
"""Layouts that SGLang's host pools support."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shape of the pools. ``size_tokens`` is the device pool; the host pool is twice that.

    ``mha_asymmetric`` has V heads of half the size of the K heads.
    """

    kind: Kind = "mha"
    layout: Layout = "page_first"
    page_size: int = 16
    layers: int = 3
    size_tokens: int = 1024
    heads: int = 2
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    io_backend: str | None = None

    @property
    def v_head_dim(self) -> int:
        return self.head_dim // 2 if self.kind == "mha_asymmetric" else self.head_dim


@dataclass(frozen=True, slots=True)
class Written:
    """A finished L1 -> L2 -> L3 write: SGLang's page hashes, and how many tokens the backend took."""

    hashes: list[str]
    completed_tokens: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """A finished L3 -> L2 -> L1 read. ``rows`` are the loaded bytes, one tensor per device buffer."""

    hit_tokens: int
    completed_tokens: int
    rows: list[torch.Tensor]

    def same_bytes(self, expected: list[torch.Tensor]) -> bool:
        """Whether rows were loaded and are the first of ``expected``, byte for byte."""
        return len(self.rows) == len(expected) and all(
            len(got) > 0 and torch.equal(got, want[: len(got)])
            for got, want in zip(self.rows, expected, strict=True)
        )


def boot(model: Path | str, page_size: int = 16, **arguments: Any) -> ServerArgs:
    """Publish a resolved configuration, as a scheduler process does, and a world of one rank.

    ``model`` needs a ``config.json`` only (``tiny_model.write_config``). Calling it again replaces the
    configuration.
    """
    if torch.cuda.is_available():
        raise RuntimeError("the test bed is for the CPU: set CUDA_VISIBLE_DEVICES to nothing")
    settings: dict[str, Any] = {
        "model_path": str(model),
        "device": "cpu",
        "page_size": page_size,
        "mem_fraction_static": 0.1,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "enable_hierarchical_cache": True,
        "hicache_size": 1,
        "log_level": "warning",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server_args = ServerArgs(**(settings | arguments))
        server_args.resolve_once()
        publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0))
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return server_args


def device_pool(geometry: Geometry) -> MHATokenToKVPool | MLATokenToKVPool:
    """SGLang's L1 pool, in host memory."""
    common: dict[str, Any] = {
        "size": geometry.size_tokens,
        "page_size": geometry.page_size,
        "dtype": geometry.dtype,
        "layer_num": geometry.layers,
        "device": "cpu",
        "enable_memory_saver": False,
    }
    if geometry.kind == "mla":
        return MLATokenToKVPool(kv_lora_rank=64, qk_rope_head_dim=16, **common)
    return MHATokenToKVPool(
        head_num=geometry.heads,
        head_dim=geometry.head_dim,
        v_head_dim=geometry.v_head_dim,
        **common,
    )


def allocator(pool: Any, geometry: Geometry) -> Any:
    """SGLang's slot allocator for an L1 pool; pages of one token have a class of their own."""
    if geometry.page_size == 1:
        return TokenToKVPoolAllocator(pool.size, geometry.dtype, "cpu", pool, need_sort=False)
    return PagedTokenToKVPoolAllocator(
        pool.size, geometry.page_size, geometry.dtype, "cpu", pool, need_sort=False
    )


def host_pool(pool: Any, geometry: Geometry, ratio: float = 2.0) -> Any:
    """SGLang's L2 pool for an L1 pool."""
    shape = {
        "device_capacity_tokens": pool.size,
        "start_layer": pool.start_layer,
        "end_layer": pool.end_layer,
    }
    if geometry.kind == "mla":
        kind: Callable[..., Any] = MLATokenToKVPoolHost
        shape["target_layer_num"] = pool.layer_num
    elif geometry.kind == "mha_asymmetric":
        kind = AsymmetricMHATokenToKVPoolHost
    else:
        kind = MHATokenToKVPoolHost
    info = pool.get_device_pool_infos()[0].buffer_info
    return kind(info, ratio, 0, geometry.page_size, geometry.layout, **shape)


class Rig:
    """Device pool, host pool and controller with a storage backend. Used by one thread; a context manager."""

    def __init__(
        self,
        geometry: Geometry,
        backend: str | None = "flexkv",
        extra: Mapping[str, object] | None = None,
        model_name: str = "tiny",
    ) -> None:
        self.geometry = geometry
        self.device = device_pool(geometry)
        self.slots = allocator(self.device, geometry)
        self.host = host_pool(self.device, geometry)
        self.controller = HiCacheController(
            self.slots,
            self.host,
            geometry.page_size,
            dist.group.WORLD,
            load_cache_event=threading.Event(),
            write_policy="write_through",
            io_backend=geometry.io_backend or IO_BACKEND[geometry.layout],
            storage_backend=backend,
            prefetch_threshold=geometry.page_size,
            model_name=model_name,
            storage_backend_extra_config=dict(extra or {}),
        )

    def __enter__(self) -> Rig:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Detach the backend, which closes it and joins SGLang's storage threads. Idempotent."""
        self.controller.detach_storage_backend()

    @property
    def backend(self) -> Any:
        """The storage backend object SGLang made (None when detached)."""
        return self.controller.storage_backend

    @property
    def buffers(self) -> list[torch.Tensor]:
        """The device buffers: K of each layer, then V of each layer; or the one of each MLA layer."""
        if isinstance(self.device, MLATokenToKVPool):
            return list(self.device.kv_buffer)
        return [*self.device.k_buffer, *self.device.v_buffer]

    @property
    def host_buffers(self) -> list[torch.Tensor]:
        """The host pool's memory: one tensor, or K and V apart where their heads differ in size."""
        memory = self.host.kv_buffer
        return list(memory) if isinstance(memory, tuple) else [memory]


def token_ids(count: int, start: int = 1000) -> list[int]:
    """A prompt. Prompts with another ``start`` share no page."""
    return list(range(start, start + count))


def page_hashes(tokens: list[int], page_size: int) -> list[str]:
    """SGLang's storage key of each whole page."""
    hashes = get_storage_hash_str(tokens, None, page_size=page_size)
    assert isinstance(hashes, list)
    return hashes


def expected_rows(rig: Rig, tokens: int, seed: int) -> list[torch.Tensor]:
    """Random bytes for ``tokens`` rows of each device buffer, from the seed alone."""
    rows = []
    for number, buffer in enumerate(rig.buffers):
        generator = torch.Generator().manual_seed(seed * 1009 + number)
        row_bytes = buffer[0].numel() * buffer.element_size()
        shape = (tokens, row_bytes)
        rows.append(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator))
    return rows


def write_pages(rig: Rig, tokens: list[int], seed: int) -> Written:
    """Put seeded bytes for a prompt into L1, copy to L2, store in L3; wait until that is acknowledged."""
    slots = rig.slots.alloc(len(tokens))
    assert slots is not None, "the device pool is full"
    for buffer, rows in zip(rig.buffers, expected_rows(rig, len(tokens), seed), strict=True):
        _as_bytes(buffer)[slots] = rows
    host = rig.controller.write(slots)
    assert host is not None, "the host pool is full"
    hashes = page_hashes(tokens, rig.geometry.page_size)
    rig.controller.write_storage(host, tokens, hashes)
    done = rig.controller.ack_backup_queue.get(timeout=WAIT_S)
    rig.host.free(host)
    rig.slots.free(slots)
    return Written(hashes, done.completed_tokens)


def prefetch_pages(rig: Rig, tokens: list[int]) -> Fetched:
    """Look a prompt up in L3, fetch the hit to L2 and load it to L1. Both tiers are poisoned before."""
    for buffer in (*rig.host_buffers, *rig.buffers):
        _as_bytes(buffer).fill_(POISON)
    rig.controller.prefetch("bed", tokens)
    operation = rig.controller.prefetch_hit_queue.get(timeout=WAIT_S)
    hit = operation.storage_hit_count
    if hit == 0:
        return Fetched(0, 0, [_as_bytes(buffer)[:0] for buffer in rig.buffers])
    operation.host_indices = rig.host.alloc(hit)
    assert operation.host_indices is not None, "the host pool is full"
    rig.controller.prefetch_buffer.put(operation)
    completed = _wait_fetched(rig)
    loaded = _load(rig, operation.host_indices[:completed])
    rig.host.free(operation.host_indices)
    return Fetched(hit, completed, loaded)


def _wait_fetched(rig: Rig) -> int:
    """One acknowledgement per batch of 128 pages with the running total, then one for the request."""
    completed = 0
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        ack = rig.controller.ack_prefetch_queue.get(timeout=WAIT_S)
        if ack.completed_tokens is not None:
            completed = ack.completed_tokens
        if ack.completed_req:
            return completed
    raise TimeoutError(f"no end of the prefetch after {WAIT_S:.0f} s")


def _load(rig: Rig, host: torch.Tensor) -> list[torch.Tensor]:
    if len(host) == 0:
        return [_as_bytes(buffer)[:0] for buffer in rig.buffers]
    slots = rig.controller.load(host)
    assert slots is not None, "the device pool is full"
    rig.controller.start_loading()
    rows = [_as_bytes(buffer)[slots].clone() for buffer in rig.buffers]
    rig.slots.free(slots)
    return rows


def _as_bytes(buffer: torch.Tensor) -> torch.Tensor:
    """The same memory as rows of bytes, one row per token (or per element of the first dimension)."""
    return buffer.view(buffer.shape[0], -1).view(torch.uint8)
