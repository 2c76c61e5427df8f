"""FlexKVStorage against the storage classes of the SGLang release on the path: ``scripts/test-versions`` runs
these with the wheels of older releases, the normal suite with the installed one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sglang
import torch
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from flexkv_sglang import FlexKVStorage
from models.plain_pools import KV_PAGES, KVPool, names, tokens
from sglang_bed.releases import (
    DYNAMIC,
    HAS,
    KNOWN_FIELDS,
    OLDEST_FIELDS,
    release,
    storage_config,
)

pytestmark = pytest.mark.sglang

METHODS = [
    name
    for name, member in inspect.getmembers(HiCacheStorage, inspect.isfunction)
    if not name.startswith("_")
]


def extra(place: Path) -> dict[str, Any]:
    return {"path": str(place), "size": "16MB", "model_id": "m", **DYNAMIC}


def config(place: Path, **changed: Any) -> HiCacheStorageConfig:
    return storage_config(extra_config=extra(place), **changed)


def made_by_factory(place: Path, pool: Any) -> FlexKVStorage:
    storage = StorageBackendFactory.create_backend("dynamic", config(place), pool)
    assert type(storage) is FlexKVStorage
    storage.register_mem_pool_host(pool)
    return storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FlexKVStorage]:
    made = made_by_factory(tmp_path, KVPool(seed=1))
    yield made
    made.close()


def test_this_is_the_release_that_was_asked_for(request: pytest.FixtureRequest) -> None:
    asked = request.config.getoption("--sglang-version")
    if asked is not None:
        assert sglang.__version__ == asked
        assert asked in str(sglang.__file__), "the wheel's files are not first on the path"


def test_the_parts_of_a_release_are_those_that_are_written_down() -> None:
    """Otherwise the tests below would check nothing."""
    result = {field.name for field in dataclasses.fields(PoolTransferResult)}
    fields = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    found = {
        "restorable": "restorable_prefix_pages" in result,
        "block_groups": "BLOCK_GROUPS" in PoolHitPolicy.__members__,
        "dp_rank": "dp_rank" in fields,
        "dcp": "dcp_size" in fields,
        "pools_registered": hasattr(HiCacheStorage, "on_host_pools_registered"),
        "injector": hasattr(hicache_storage, "HiCacheStorageFailureInjector"),
    }
    assert found == {name: HAS[name] <= release() for name in found}


def test_no_abstract_method_is_left() -> None:
    assert FlexKVStorage.__abstractmethods__ == frozenset()
    assert issubclass(FlexKVStorage, HiCacheStorage)
    assert "close" in vars(FlexKVStorage)  # SGLang looks it up; the base class lacks it


@pytest.mark.parametrize("method", METHODS)
def test_a_method_takes_what_this_release_passes(method: str) -> None:
    theirs = list(inspect.signature(getattr(HiCacheStorage, method)).parameters.values())
    mine = inspect.signature(getattr(FlexKVStorage, method))
    values = [object() for _ in theirs]
    mine.bind(*values)
    mine.bind(values[0], **{p.name: v for p, v in zip(theirs[1:], values[1:], strict=True)})
    needed = [p for p in theirs if p.default is p.empty]
    mine.bind(*[object() for _ in needed])


@pytest.mark.parametrize(
    "method", ["batch_get_v1", "batch_set_v1", "batch_exists", "batch_exists_v2", "batch_get_v2",
               "batch_set_v2", "batch_get", "batch_set", "get_stats", "clear"]
)  # fmt: skip
def test_no_method_of_the_interface_is_left_to_the_base_class(method: str) -> None:
    """Its defaults answer None, or ask page by page."""
    assert getattr(FlexKVStorage, method) is not getattr(HiCacheStorage, method)


def test_every_field_of_the_config_is_known() -> None:
    fields = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    assert fields <= set(KNOWN_FIELDS)
    assert set(OLDEST_FIELDS) <= fields


def test_a_config_without_the_newer_fields_will_do(tmp_path: Path) -> None:
    """In both directions: the release's own config reads the pages that such a config wrote."""
    old = SimpleNamespace(
        **{name: KNOWN_FIELDS[name] for name in OLDEST_FIELDS}, extra_config=extra(tmp_path)
    )
    writer = FlexKVStorage(old, {})
    writer.register_mem_pool_host(KVPool(seed=1))
    assert writer.batch_set_v1(names(3), tokens(0, 1, 2)) == [True] * 3
    reader = made_by_factory(tmp_path, KVPool())
    assert reader.batch_exists(names(3)) == 3
    assert reader.batch_get_v1(names(3), tokens(0, 1, 2)) == [True] * 3
    writer.close()
    reader.close()


@pytest.mark.parametrize(
    "shard", [("tp_rank", "tp_size"), ("pp_rank", "pp_size"), ("attn_cp_rank", "attn_cp_size")]
)
def test_shards_of_a_page_are_kept_apart(tmp_path: Path, shard: tuple[str, str]) -> None:
    rank, size = shard
    writer = FlexKVStorage(config(tmp_path, **{size: 2}), {})
    writer.register_mem_pool_host(KVPool(seed=1))
    assert writer.batch_set_v1(names(2), tokens(0, 1)) == [True] * 2
    other = FlexKVStorage(config(tmp_path, **{size: 2, rank: 1}), {})
    other.register_mem_pool_host(KVPool())
    assert other.batch_exists(names(2)) == 0
    writer.close()
    other.close()


def test_a_rank_that_does_not_write_mla_pages_owns_no_files(tmp_path: Path) -> None:
    reader = FlexKVStorage(config(tmp_path, is_mla_model=True, tp_rank=1, tp_size=2), {})
    reader.register_mem_pool_host(KVPool())
    assert not list(tmp_path.rglob("*.slots"))
    reader.close()


def test_pages_go_out_and_back_through_the_zero_copy_interface(tmp_path: Path) -> None:
    source, target = KVPool(seed=1), KVPool()
    writer = made_by_factory(tmp_path, source)
    first, second = names(5)[:2], names(5)[2:]
    assert writer.batch_set_v1(first, tokens(0, 1), HiCacheStorageExtraInfo()) == [True] * 2
    chained = HiCacheStorageExtraInfo(prefix_keys=first, extra_info={"unknown": 1})
    assert writer.batch_set_v1(second, tokens(2, 3, 4), extra_info=chained) == [True] * 3
    reader = made_by_factory(tmp_path, target)
    assert reader.batch_exists(names(6), HiCacheStorageExtraInfo()) == 5
    assert reader.batch_exists(names(6)) == 5
    done = reader.batch_get_v1(names(6), tokens(0, 1, 2, 3, 4, 5), HiCacheStorageExtraInfo())
    assert done == [True] * 5 + [False]
    rows = [*range(5), *range(KV_PAGES, KV_PAGES + 5)]
    assert np.array_equal(target.pages[rows], source.pages[rows])
    writer.close()
    reader.close()


def test_pages_go_out_and_back_through_the_generic_interface(storage: FlexKVStorage) -> None:
    pool: KVPool = storage.mem_pool_host
    written = [pool.get_data_page(4 * page) for page in range(3)]
    assert storage.batch_set(names(3), written) is True
    assert storage.exists(names(1)[0])
    got = storage.batch_get(names(4), [pool.get_dummy_flat_data_page() for _ in range(4)])
    assert [page is not None for page in got] == [True, True, True, False]
    for page, expected in zip(got[:3], written, strict=True):
        assert torch.equal(page.view(torch.uint8), expected.view(torch.uint8))
    assert storage.set(names(1, 7)[0], written[0]) is True
    assert storage.get(names(1, 7)[0], pool.get_dummy_flat_data_page()) is not None
    storage.clear()
    assert storage.batch_exists(names(3)) == 0


@pytest.mark.parametrize("pool", list(PoolName))
def test_a_page_without_its_sidecar_is_a_miss_for_every_pool_of_this_release(
    storage: FlexKVStorage, pool: PoolName
) -> None:
    storage.register_mem_host_pool_v2(storage.mem_pool_host, PoolName.KV)
    if pool is not PoolName.KV:
        storage.register_mem_host_pool_v2(object(), pool)  # nothing that we could store
    if hasattr(HiCacheStorage, "on_host_pools_registered"):
        storage.on_host_pools_registered()
    assert storage.batch_set_v1(names(2), tokens(0, 1)) == [True] * 2
    plain = storage.batch_exists_v2(names(3), None, HiCacheStorageExtraInfo())
    assert type(plain) is PoolTransferResult
    if pool is PoolName.KV:
        assert plain.kv_hit_pages == 2
        return
    assert plain.kv_hit_pages == 0  # not even where SGLang forgets to ask for the sidecar
    for policy in PoolHitPolicy:
        asked = PoolTransfer(name=pool, keys=names(2), hit_policy=policy)
        found = storage.batch_exists_v2(names(2), [asked], extra_info=HiCacheStorageExtraInfo())
        assert type(found) is PoolTransferResult
        if policy.value != "block_groups":  # never gates KV
            assert found.kv_hit_pages == 0
        assert not found.extra_pool_hit_pages.get(pool)
    wanted = PoolTransfer(name=pool, keys=names(2), host_indices=tokens(0, 1))
    for answer in (
        storage.batch_get_v2([wanted], HiCacheStorageExtraInfo()),
        storage.batch_set_v2([wanted], extra_info=HiCacheStorageExtraInfo()),
    ):
        assert answer[pool] == [False, False]  # an omitted or a short list reads as success


def test_sglang_can_go_on_with_a_result(storage: FlexKVStorage) -> None:
    result = storage.batch_exists_v2(names(2), [])
    result.update_kv_hit_pages(1)
    result.update_extra_pool_hit_pages({})
    assert result.kv_hit_pages in (0, 1)


def test_stats_are_of_the_type_that_the_collector_asserts(storage: FlexKVStorage) -> None:
    from sglang.srt.observability.metrics_collector import StorageMetrics

    storage.batch_set_v1(names(3), tokens(0, 1, 2))
    stats = storage.get_stats()
    assert type(stats) is StorageMetrics
    assert stats.backup_pgs == [3]
    stats.prefetch_stats = None  # the tree hangs something on it
    assert storage.get_stats().backup_pgs == []


def test_the_failure_injector_wraps_it(storage: FlexKVStorage) -> None:
    if HAS["injector"] > release():
        pytest.skip("this release has no failure injector")
    wrapped = hicache_storage.HiCacheStorageFailureInjector(storage, 0.0, 1.0)
    wrapped.register_mem_host_pool_v2(storage.mem_pool_host, PoolName.KV)
    wrapped.on_host_pools_registered()
    assert wrapped.batch_set_v1(names(1), tokens(0)) == [False]
    assert wrapped.batch_exists(names(1)) == 0
    wrapped._failure_prob = 0.0
    assert wrapped.batch_set_v1(names(1), tokens(0)) == [True]
    assert wrapped.batch_exists_v2(names(1), []).kv_hit_pages == 1
