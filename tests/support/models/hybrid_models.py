"""Host pools of hybrid models, SGLang's real classes on the CPU, under SGLang's real hybrid controller.

    with HybridRig("mamba", "page_first", storage) as rig:
        rig.write(tokens, seed=1)
        got = rig.prefetch(tokens)

Only the host side is real: device pools exist where a host pool wants to see one. Run as a script it writes a
prompt of every model and exits: ``python hybrid_models.py STORAGE_DIR MODEL_DIR``.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flexkv_bed.controller import (
    WAIT_S,
    Geometry,
    allocator,
    boot,
    device_pool,
    host_pool,
    page_hashes,
    token_ids,
)

import torch  # isort: skip  # after flexkv_bed, which silences warnings of SGLang's imports
import torch.distributed as dist  # isort: skip
from sglang.srt.mem_cache.base_prefix_cache import CacheRequestHandle
from sglang.srt.mem_cache.device_pool_info import MambaStateBufferInfo
from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolTransfer
from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MHATokenToKOnlyPool
from sglang.srt.mem_cache.memory_pool_host import (
    DeepSeekV4PagedHostPool,
    DeepSeekV4StateHostPool,
    LogicalHostPool,
)
from sglang.srt.mem_cache.pool_host import HostPoolGroup, PoolEntry
from sglang.srt.mem_cache.pool_host.dsa import DSAIndexerPoolHost, make_dsa_indexer_pool_decl
from sglang.srt.mem_cache.pool_host.mamba import MambaPoolHost
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKOnlyPoolHost

PAGE = 64  # SGLang's DSA pools know no other
PAGES = 6
HOST_PAGES = 33


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A pool beside KV. ``window``: pages of trailing state, 0: needed for every page. ``source``: whose host indices
    it shares ("" : it has its own)."""

    pool: Any
    window: int = 0
    source: str = ""


@dataclass(frozen=True, slots=True)
class Model:
    """The anchor and the pools beside it. ``kept``: device pools that must live on."""

    anchor: Any
    device: Any
    sidecars: Mapping[str, Sidecar]
    kept: tuple[Any, ...] = ()


def _mha(layout: str, layers: int = 2) -> tuple[Any, Any]:
    geometry = Geometry(layout=layout, page_size=PAGE, layers=layers, size_tokens=PAGE * 16)  # type: ignore[arg-type]
    device = device_pool(geometry)
    return device, host_pool(device, geometry)


def _mamba_pool(layout: str, *, side_state: bool = False) -> MambaPoolHost:
    info = MambaStateBufferInfo(
        temporal=torch.zeros(3, 8, 4, 64, dtype=torch.float32),
        conv=(torch.zeros(3, 8, 32, 4, dtype=torch.bfloat16),),
        extra_checkpoint_buffers=(torch.zeros(8, 5, dtype=torch.int32),) if side_state else (),
    )
    paged = layout if layout.startswith("page_first") else "page_first"
    return MambaPoolHost(info, 4.0, 0, device_capacity=8, pin_memory=False, layout=paged)


def _mamba(layout: str) -> Model:
    device, anchor = _mha(layout)
    return Model(anchor, device, {"mamba": Sidecar(_mamba_pool(layout), window=1)})


def _mamba_side_state(layout: str) -> Model:
    device, anchor = _mha(layout)
    pool = _mamba_pool(layout, side_state=True)
    return Model(anchor, device, {"mamba": Sidecar(pool, window=1)})


def _swa(layout: str) -> Model:
    device, anchor = _mha(layout)
    swa_device, swa = _mha(layout, layers=3)
    return Model(anchor, device, {"swa": Sidecar(swa, window=2)}, (swa_device,))


def _draft(layout: str) -> Model:
    device, anchor = _mha(layout)
    draft_device, draft = _mha(layout, layers=1)
    return Model(anchor, device, {"draft": Sidecar(draft, source="kv")}, (draft_device,))


def _indexer(layout: str) -> Model:
    device = DSATokenToKVPool(
        PAGE * 16, PAGE, 64, torch.bfloat16, 16, 2, "cpu", 128,
        enable_memory_saver=False, kv_cache_dim=80,
    )  # fmt: skip
    geometry = Geometry(kind="mla", layout=layout, page_size=PAGE, layers=2)  # type: ignore[arg-type]
    anchor = host_pool(device, geometry)
    decl = make_dsa_indexer_pool_decl(device)
    pool = DSAIndexerPoolHost(decl=decl, anchor_host=anchor, pin_memory=False)
    return Model(anchor, device, {"indexer": Sidecar(pool, source="kv")})


def _k_only(layout: str) -> Model:
    device, anchor = _mha(layout)
    keys = MHATokenToKOnlyPool(PAGE * 16, PAGE, torch.bfloat16, 2, 16, 2, "cpu", False)
    pool = MHATokenToKOnlyPoolHost(keys, anchor, layout, pin_memory=False)
    return Model(anchor, device, {"indexer": Sidecar(pool, source="kv")}, (keys,))


def _deepseek_v4(layout: str) -> Model:
    device, _ = _mha(layout)
    anchor = LogicalHostPool(HOST_PAGES * PAGE, PAGE, layout)

    def paged(name: str, item_bytes: int) -> DeepSeekV4PagedHostPool:
        buffers = [torch.zeros(8, item_bytes, dtype=torch.uint8) for _ in range(2)]
        return DeepSeekV4PagedHostPool(
            name, buffers, item_bytes, HOST_PAGES, PAGE, layout=layout, pin_memory=False
        )

    states = [
        SimpleNamespace(ring_size=4, kv_score_buffer=SimpleNamespace(kv_score=torch.zeros(32, 24)))
        for _ in range(2)
    ]
    state = DeepSeekV4StateHostPool(
        "deepseek_v4_c4_state", states, HOST_PAGES, PAGE, layout=layout, pin_memory=False
    )
    state.clear()
    return Model(
        anchor,
        device,
        {
            "swa": Sidecar(paged("swa", 640), window=2),
            "deepseek_v4_c4": Sidecar(paged("deepseek_v4_c4", 2048), source="kv"),
            "deepseek_v4_c4_indexer": Sidecar(paged("deepseek_v4_c4_indexer", 96), source="kv"),
            "deepseek_v4_c4_state": Sidecar(state, window=2, source="swa"),
        },
    )


MODELS: Mapping[str, Callable[[str], Model]] = {
    "mamba": _mamba,
    "mamba_side_state": _mamba_side_state,
    "swa": _swa,
    "draft": _draft,
    "indexer": _indexer,
    "k_only": _k_only,
    "deepseek_v4": _deepseek_v4,
}

CASES = [
    (model, layout)
    for model in MODELS
    for layout in ("layer_first", "page_first", "page_first_direct")
]


def page_bytes(pool: Any, start: int) -> torch.Tensor:
    """One page as SGLang's flat-page call gives it: no pointer arithmetic of ours."""
    page = pool.get_data_page(start, flat=True).contiguous().reshape(-1)
    return page.view(torch.uint8).clone()


def seeded(pool: Any, name: str, key: str, seed: int) -> torch.Tensor:
    """Bytes of a page of a pool, from name, key and seed alone."""
    number = int(key[:12], 16) ^ seed * 7919 ^ sum(name.encode()) << 20
    generator = torch.Generator().manual_seed(number)
    size = len(page_bytes(pool, 0))
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator)


def put_page(pool: Any, start: int, content: torch.Tensor) -> None:
    """Set one page through SGLang's flat-page call."""
    empty = pool.get_data_page(start, flat=True)
    pool.set_from_flat_data_page(start, content.view(empty.dtype))


@dataclass(slots=True)
class Fetched:
    """A finished prefetch: pages of the hit, KV pages read, and per trailing pool the leading run it got.

    ``compared``: pages whose bytes were looked at; ``wrong``: those that were not as written.
    """

    hit_pages: int
    kv_pages: int
    compared: int = 0
    pool_hits: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


class HybridRig:
    """One model's host pools under a controller with flexkv. A context manager; one thread."""

    def __init__(self, model: str, layout: str, storage: str, **extra: object) -> None:
        """``extra``: settings of the backend; None takes a default of ours away."""
        self.model = MODELS[model](layout)
        entries = [self._entry("kv", self.model.anchor, anchor=True)]
        entries += [self._entry(name, side.pool) for name, side in self.model.sidecars.items()]
        self.group = HostPoolGroup(entries)
        geometry = Geometry(page_size=PAGE)
        defaults = {"path": storage, "size": "16MB", "model_id": f"{model}-{layout}"}
        self.controller = HybridCacheController(
            allocator(self.model.device, geometry),
            self.group,
            PAGE,
            dist.group.WORLD,
            load_cache_event=threading.Event(),
            write_policy="write_through",
            io_backend="direct" if layout == "page_first_direct" else "kernel",
            storage_backend="flexkv",
            prefetch_threshold=PAGE,
            model_name="tiny",
            storage_backend_extra_config={
                key: value for key, value in (defaults | extra).items() if value is not None
            },
        )

    def _entry(self, name: str, pool: Any, *, anchor: bool = False) -> PoolEntry:
        return PoolEntry(name, pool, None, lambda layer: layer, is_primary_index_anchor=anchor)  # type: ignore[arg-type]

    def __enter__(self) -> HybridRig:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.controller.detach_storage_backend()

    @property
    def backend(self) -> Any:
        """The FlexKVStorage."""
        return self.controller.storage_backend

    def pool(self, name: str) -> Any:
        """A host pool."""
        return self.model.anchor if name == "kv" else self.model.sidecars[name].pool

    def transfers(self, tokens: list[int], *, ends: int | None = None) -> list[PoolTransfer]:
        """As SGLang plans them: windows as placeholders (``ends`` None), or pages before the end to be written."""
        made = []
        hashes = page_hashes(tokens, PAGE)
        for name, side in self.model.sidecars.items():
            transfer = PoolTransfer(name=name)  # type: ignore[arg-type]
            if side.window:
                transfer.hit_policy = PoolHitPolicy.TRAILING_PAGES
                window = min(side.window, len(hashes))
                transfer.keys = hashes[-window:] if ends else ["__placeholder__"] * side.window
            if side.source:
                transfer.indices_from_pool = side.source  # type: ignore[assignment]
            made.append(transfer)
        return made

    def write(self, tokens: list[int], seed: int, *, skip: str = "") -> int:
        """Fill host pages and let the backup thread store them, all pools but ``skip``. Returns KV tokens stored."""
        hashes = page_hashes(tokens, PAGE)
        host = self._fill("kv", hashes, seed)
        transfers = [
            transfer
            for transfer in self.transfers(tokens, ends=1)
            if not skip
            or skip not in (transfer.name, self.model.sidecars[str(transfer.name)].source)
        ]
        for transfer in transfers:
            source = self.model.sidecars[str(transfer.name)].source
            if source == "kv":
                self._fill(str(transfer.name), hashes, seed, host)
            elif not source:
                transfer.host_indices = self._fill(str(transfer.name), transfer.keys, seed)
        for transfer in transfers:
            if self.model.sidecars[str(transfer.name)].source == "swa":
                indices = next(t.host_indices for t in transfers if t.name == "swa")
                self._fill(str(transfer.name), transfer.keys, seed, indices)
        self.controller.write_storage(host, tokens, hashes, extra_pools=transfers)
        done = self.controller.ack_backup_queue.get(timeout=WAIT_S)
        self._free(host, transfers)
        return int(done.completed_tokens)

    def prefetch(self, tokens: list[int], seed: int) -> Fetched:
        """Look up, allocate the hit, fetch, and compare each page that came with the content for ``seed``."""
        controller = self.controller
        controller.prefetch(
            CacheRequestHandle("bed", 0), tokens, extra_pools=self.transfers(tokens)
        )
        operation = controller.prefetch_hit_queue.get(timeout=WAIT_S)
        pages = operation.storage_hit_count // PAGE
        if not pages:
            return Fetched(0, 0)
        operation.host_indices = self._poisoned("kv", pages)
        for transfer in operation.pool_transfers:
            side = self.model.sidecars[str(transfer.name)]
            if not side.source:
                transfer.host_indices = self._poisoned(str(transfer.name), side.window)
            elif side.source == "kv":
                self._poison(side.pool, operation.host_indices)
        controller._resolve_sidecar_kv_derived_pool_transfers(operation)
        controller.prefetch_buffer.put(operation)
        fetched = self._wait(pages)
        self._compare(operation, fetched, seed)
        self._free(operation.host_indices, operation.pool_transfers)
        return fetched

    def _free(self, host: torch.Tensor, transfers: list[PoolTransfer]) -> None:
        self.model.anchor.free(host)
        self.group.release_transfers(transfers)

    def _wait(self, pages: int) -> Fetched:
        fetched = Fetched(pages, 0)
        deadline = time.monotonic() + WAIT_S
        while time.monotonic() < deadline:
            ack = self.controller.ack_prefetch_queue.get(timeout=WAIT_S)
            if ack.completed_tokens is not None:
                fetched.kv_pages = ack.completed_tokens // PAGE
            if ack.pool_hits:
                own = self.model.sidecars
                fetched.pool_hits |= {str(k): v for k, v in ack.pool_hits.items() if k in own}
            if ack.completed_req:
                return fetched
        raise TimeoutError("no end of the prefetch")

    def _compare(self, operation: Any, fetched: Fetched, seed: int) -> None:
        hashes = operation.hash_value[: fetched.kv_pages]
        rows = [("kv", hashes, operation.host_indices)]
        for transfer in operation.pool_transfers:
            name = str(transfer.name)
            side = self.model.sidecars[name]
            count = fetched.pool_hits.get(name, 0) if side.window else len(hashes)
            rows.append((name, list(transfer.keys or [])[:count], transfer.host_indices))
        for name, keys, indices in rows:
            pool = self.pool(name)
            for number, key in enumerate(keys):
                start = int(indices[number * pool.page_size])
                fetched.compared += 1
                if not torch.equal(page_bytes(pool, start), seeded(pool, name, key, seed)):
                    fetched.wrong.append(f"{name} page {number}")

    def _fill(
        self, name: str, keys: list[str], seed: int, indices: torch.Tensor | None = None
    ) -> torch.Tensor:
        pool = self.pool(name)
        if indices is None:
            indices = pool.alloc(len(keys) * pool.page_size)
            assert indices is not None, f"{name} is full"
        for number, key in enumerate(keys):
            put_page(pool, int(indices[number * pool.page_size]), seeded(pool, name, key, seed))
        return indices

    def _poisoned(self, name: str, pages: int) -> torch.Tensor:
        pool = self.pool(name)
        indices = pool.alloc(pages * pool.page_size)
        assert indices is not None, f"{name} is full"
        self._poison(pool, indices)
        return indices

    def _poison(self, pool: Any, indices: torch.Tensor) -> None:
        for start in indices[:: pool.page_size].tolist():
            put_page(pool, start, torch.full_like(page_bytes(pool, start), 0xA5))


def prompt(number: int = 0, pages: int = PAGES) -> list[int]:
    """``pages`` whole pages; another ``number`` shares none of them."""
    return token_ids(pages * PAGE, start=1000 + 1000 * number)


def main(storage: str, model: str) -> None:
    """Write one prompt of every case."""
    boot(Path(model))
    for name, layout in CASES:
        with HybridRig(name, layout, storage) as rig:
            stored = rig.write(prompt(), seed=5)
            assert stored == PAGES * PAGE, (name, layout, stored)
        print(f"{name}-{layout}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
