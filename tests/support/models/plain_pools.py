"""Host pools in plain memory: they have the interface of SGLang's pools, without SGLang."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolHitPolicy, PoolTransfer

from flexkv_sglang import FlexKVStorage
from stores.engines import keys, page_memory

PAGES = 320
MAMBA_PAGE = 3 * 4096

PAGE_SIZE = 4
KV_PAGES = 300
HALF = 8192


class Pool:
    """``PAGES`` pages of ``page_bytes`` in one tensor ``rows``; names its buffers. ``page_size`` tokens each."""

    layout, dtype = "page_first", torch.uint8
    start_layer, layer_num = 0, 2

    def __init__(self, page_bytes: int = 4096, page_size: int = 4, seed: int | None = None) -> None:
        self.page_size = page_size
        self.rows = torch.full((PAGES, page_bytes), 0xA5, dtype=torch.uint8)
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            self.rows = torch.randint(
                0, 256, self.rows.shape, dtype=torch.uint8, generator=generator
            )

    @property
    def size(self) -> int:
        """Tokens that it has room for."""
        return len(self.rows) * self.page_size

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        rows = [token // self.page_size for token in indices.tolist()[:: self.page_size]]
        size = self.rows.shape[1]
        return [self.rows.data_ptr() + row * size for row in rows], [size] * len(rows)

    def indices(self, *pages: int) -> torch.Tensor:
        """``host_indices`` of these pages."""
        size = self.page_size
        return torch.tensor([t for p in pages for t in range(p * size, (p + 1) * size)])


class FlatPool(Pool):
    """Does not name its buffers."""

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        raise NotImplementedError("not in this layout")

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.rows[0]).view(torch.bfloat16)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self.rows[index // self.page_size].view(torch.bfloat16)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        assert page.dtype == torch.bfloat16
        self.rows[index // self.page_size] = page.view(torch.uint8)


class LogicalPool(Pool):
    """Has no bytes."""

    kv_buffer, size_per_token = None, 0

    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        return None


class KVPool:
    """page_first MHA with K and V apart, and all that SGLang's controller asks of it.

    K of all pages, then V; ``HALF`` bytes of each per page. ``seed``: random bytes, else 0xA5 poison.
    """

    layout, dtype, page_size = "page_first", torch.bfloat16, PAGE_SIZE
    start_layer, layer_num = 0, 2
    size = logical_size = KV_PAGES * PAGE_SIZE

    def __init__(self, seed: int | None = None) -> None:
        self.pages, buffers = page_memory(2 * KV_PAGES, HALF, seed=seed)
        self._base = int(buffers.addresses[0, 0])

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """SGLang's zero-copy question: addresses and lengths, one index per token."""
        assert len(indices) % PAGE_SIZE == 0
        starts = [self._base + token // PAGE_SIZE * HALF for token in indices.tolist()[::PAGE_SIZE]]
        return [a for k in starts for a in (k, k + KV_PAGES * HALF)], [HALF] * 2 * len(starts)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        """A copy of one page, bfloat16 ``[HALF]``; ``index`` is its first token."""
        page = int(index) // PAGE_SIZE
        both = torch.from_numpy(self.pages[[page, KV_PAGES + page]].reshape(-1))
        return both.view(torch.bfloat16)

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Memory for one page."""
        return torch.zeros(HALF, dtype=torch.bfloat16)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Put one page where its first token is ``index``."""
        page = int(index) // PAGE_SIZE
        self.pages[[page, KV_PAGES + page]] = data_page.view(torch.uint8).numpy().reshape(2, HALF)


def tokens(*pages: int) -> torch.Tensor:
    """Token indices of these pages of a ``KVPool``, int64."""
    return torch.cat([torch.arange(p * PAGE_SIZE, (p + 1) * PAGE_SIZE) for p in pages])


def config(place: Path, rank: int = 0, ranks: int = 1, mla: bool = False, **extra: Any) -> Any:
    """SGLang's storage config for one tensor-parallel rank."""
    defaults = {"path": str(place), "size": "16MB", "model_id": "m"}
    given = {key: value for key, value in (defaults | extra).items() if value is not None}
    return HiCacheStorageConfig(
        rank, ranks, 0, 1, 0, 1, mla, False, True, "model", extra_config=given
    )


def attach(
    settings: Any, anchor: Any, pools: dict[str, Any], *, fires: bool = True
) -> FlexKVStorage:
    """As SGLang's hybrid controller does; releases before 0.5.23 do not say when they are done (``fires``)."""
    storage = FlexKVStorage(settings, {})
    storage.register_mem_pool_host(anchor)
    for name, pool in {"kv": anchor, **pools}.items():
        storage.register_mem_host_pool_v2(pool, name)
    if fires:
        storage.on_host_pools_registered()
    return storage


def names(count: int, seed: int = 0) -> list[str]:
    """Page hashes as SGLang writes them."""
    return [key.hex() for key in keys(count, seed)]


def transfer(name: str, page_keys: list[str], indices: Any = None, window: int = 0) -> Any:
    """A ``PoolTransfer``; with ``window`` one for an exists-check of trailing state."""
    if window:
        return PoolTransfer(
            name=name,  # type: ignore[arg-type]
            keys=["__placeholder__"] * window,
            hit_policy=PoolHitPolicy.TRAILING_PAGES,
        )
    return PoolTransfer(name=name, keys=page_keys, host_indices=indices)  # type: ignore[arg-type]


def hybrid(place: Path, seed: int | None = 1, *, fires: bool = True, **extra: Any) -> FlexKVStorage:
    """KV, an indexer that shares its indices, and Mamba state."""
    pools = {"indexer": Pool(512, seed=seed), "mamba": Pool(MAMBA_PAGE, page_size=1, seed=seed)}
    return attach(config(place, **extra), Pool(seed=seed), pools, fires=fires)


def pool_of(storage: FlexKVStorage, name: str) -> Any:
    """A registered host pool."""
    return storage.registered_pools[name]


def stored(storage: FlexKVStorage, name: str = "kv") -> Any:
    """The ``Pool`` of this name, which is open."""
    pool = storage._stores.get(name)
    assert pool is not None, name
    return pool


def store_of(storage: FlexKVStorage, name: str = "kv") -> Any:
    """The open store of a pool."""
    return stored(storage, name).store


def put(storage: FlexKVStorage, keys: list[str], *, but: str = "") -> None:
    """As SGLang: sidecars first, every page of the indexer, the state of the last page."""
    count = len(keys)
    transfers = [
        transfer("indexer", keys, pool_of(storage, "indexer").indices(*range(count))),
        transfer("mamba", keys[-1:], pool_of(storage, "mamba").indices(count - 1)),
    ]
    results = storage.batch_set_v2([t for t in transfers if t.name != but])
    assert all(all(flags) for flags in results.values())
    assert all(storage.batch_set_v1(keys, pool_of(storage, "kv").indices(*range(count))))


def ask(storage: FlexKVStorage, keys: list[str]) -> Any:
    """Look a prefix up in all three pools."""
    return storage.batch_exists_v2(keys, [transfer("indexer", []), transfer("mamba", [], window=1)])
