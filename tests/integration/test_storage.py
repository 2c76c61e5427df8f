"""FlexKVStorage against SGLang's real abstract class, config type and factory, with a plain host pool.

The real host pools and the real controller are in ``test_sglang_pools.py``; here every shape of answer,
every odd input and every failure.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
)
from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.pools.host_pages import HostPages
from models.plain_pools import HALF, KV_PAGES, PAGE_SIZE, KVPool, names, store_of, tokens

pytestmark = pytest.mark.sglang


def config(place: Path, **extra: Any) -> HiCacheStorageConfig:
    given = {"path": str(place), "size": "16MB", "model_id": "m"} | extra
    return HiCacheStorageConfig(0, 1, 0, 1, 0, 1, False, False, True, "model", extra_config=given)


def make(place: Path, pool: Any = None, **extra: Any) -> FlexKVStorage:
    storage = FlexKVStorage(config(place, **extra), {})
    storage.register_mem_pool_host(pool if pool is not None else KVPool(seed=1))
    return storage


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FlexKVStorage]:
    made = make(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("count", [1, 5, 127, 128, 129, 300])
def test_any_batch_length_round_trips_between_two_instances(tmp_path: Path, count: int) -> None:
    writer = make(tmp_path)
    order = np.random.default_rng(2).permutation(KV_PAGES)[:count].tolist()
    assert writer.batch_set_v1(names(count), tokens(*order)) == [True] * count
    target = KVPool()
    reader = make(tmp_path, target)
    assert reader.batch_exists(names(count)) == count
    assert reader.batch_get_v1(names(count), tokens(*range(count))) == [True] * count
    source = writer.mem_pool_host.pages
    assert np.array_equal(target.pages[:count], source[order])
    assert np.array_equal(
        target.pages[KV_PAGES : KV_PAGES + count], source[[KV_PAGES + p for p in order]]
    )
    assert (target.pages[count:KV_PAGES] == 0xA5).all()
    writer.close()
    reader.close()


def test_hits_and_durations_are_counted_per_call(storage: FlexKVStorage) -> None:
    storage.batch_set_v1(names(4), tokens(0, 1, 2, 3))
    assert storage.batch_exists(names(6)) == 4
    storage.batch_get_v1(names(6), tokens(0, 1, 2, 3, 4, 5))
    counters, histograms = storage.metrics.snapshot(), storage.metrics.histograms()
    assert (counters["asked_pages"], counters["found_pages"]) == (6, 4)
    assert (counters["tier0_hit_pages"], counters["read_miss_pages"]) == (4, 2)
    calls = {name: sum(item.counts) for name, item in histograms.items()}
    assert (calls["exists_seconds"], calls["get_seconds"], calls["put_seconds"]) == (1, 1, 1)
    assert storage.metrics.gauges()["running_gets", ""] == 0
    assert storage.metrics.export is None  # SGLang's metrics are off


def test_answers_have_one_entry_per_key_whatever_is_asked(storage: FlexKVStorage) -> None:
    assert storage.batch_exists([]) == 0
    assert storage.batch_get_v1([], tokens(0)[:0]) == []
    assert storage.batch_set_v1([], tokens(0)[:0]) == []
    assert storage.batch_get_v1(names(3), tokens(0, 1, 2)) == [False] * 3
    assert storage.batch_set_v1(names(3), tokens(0, 1)) == [False] * 3  # indices of two pages
    assert storage.batch_get_v1(names(3), tokens(0, 1, 2, 3)) == [False] * 3
    assert storage.batch_set_v1(names(3), tokens(0, 1, 2)) == [True] * 3
    assert storage.batch_set_v1(names(3), tokens(0, 1, 2)) == [True] * 3  # present already
    assert storage.exists(names(1)[0])
    assert not storage.exists("not a hash")


def test_the_generic_interface_reads_what_zero_copy_wrote_and_back(tmp_path: Path) -> None:
    storage = make(tmp_path)
    pool = storage.mem_pool_host
    storage.batch_set_v1(names(2), tokens(0, 1))
    flat = torch.zeros(2 * HALF // 2, dtype=torch.bfloat16)
    assert storage.get(names(1)[0], flat) is flat
    expected = np.concatenate([pool.pages[0], pool.pages[KV_PAGES]])
    assert np.array_equal(flat.view(torch.uint8).numpy(), expected)
    got = storage.batch_get([*names(2), names(3)[2]], [torch.zeros_like(flat) for _ in range(3)])
    assert [page is not None for page in got] == [True, True, False]
    other = torch.from_numpy(np.random.default_rng(3).integers(0, 256, 2 * HALF, dtype=np.uint8))
    assert storage.set(names(1, 9)[0], other)
    assert storage.batch_get_v1(names(1, 9), tokens(7)) == [True]
    assert np.array_equal(np.concatenate([pool.pages[7], pool.pages[KV_PAGES + 7]]), other.numpy())
    assert not storage.set(names(1, 8)[0], other[:100])  # not a page
    assert storage.get(names(1)[0], None) is None
    assert storage.batch_set([], []) is True
    storage.close()


def test_prefix_keys_make_one_chain_of_two_batches(storage: FlexKVStorage) -> None:
    every = names(4)
    storage.batch_set_v1(every[:2], tokens(0, 1))
    storage.batch_set_v1(every[2:], tokens(2, 3), HiCacheStorageExtraInfo(prefix_keys=every[:2]))
    engine = store_of(storage)
    index = engine.tiers[0]._pages.index
    found = [index.find(bytes.fromhex(name)) for name in every]
    assert [index.parent_slot(slot) for slot in found] == [-1, *found[:3]]


def test_stats_are_sglangs_type_and_drained(storage: FlexKVStorage) -> None:
    from sglang.srt.observability.metrics_collector import StorageMetrics

    storage.batch_set_v1(names(3), tokens(0, 1, 2))
    storage.batch_get_v1(names(2), tokens(0, 1))
    stats = storage.get_stats()
    assert type(stats) is StorageMetrics
    assert (stats.backup_pgs, stats.prefetch_pgs) == ([3], [2])
    assert all(speed > 0 for speed in stats.backup_bandwidth + stats.prefetch_bandwidth)
    assert storage.get_stats().backup_pgs == []


@pytest.mark.parametrize("method", ["prefix", "get", "put", "clear"])
def test_an_exception_in_the_engine_is_a_miss_of_the_right_shape(
    storage: FlexKVStorage,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def explode(*_args: object, **_more: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(store_of(storage), method, explode)
    page = torch.zeros(HALF, dtype=torch.bfloat16)
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert storage.batch_exists(names(2)) == 0 or method != "prefix"
            assert storage.batch_get_v1(names(2), tokens(0, 1)) == [False, False] or method != "get"
            assert storage.batch_set_v1(names(2), tokens(0, 1)) == [False, False] or method != "put"
            assert (
                storage.batch_get(names(2), [page, page.clone()]) == [None, None] or method != "get"
            )
            assert storage.set(names(1)[0], page) is False or method != "put"
            storage.clear()
    assert "planted" in caplog.text
    assert sum(
        storage.metrics.snapshot().get(name, 0)
        for name in storage.metrics.snapshot()
        if "exceptions" in name
    )
    assert (
        len([record for record in caplog.records if "answered as a miss" in record.message]) <= 3
    )  # rate limited


def test_after_close_everything_misses_and_close_again_is_fine(tmp_path: Path) -> None:
    storage = make(tmp_path)
    storage.batch_set_v1(names(1), tokens(0))
    storage.close()
    storage.close()
    assert storage.batch_exists(names(1)) == 0
    assert storage.batch_get_v1(names(1), tokens(0)) == [False]
    assert storage.batch_set_v1(names(1), tokens(0)) == [False]
    storage.clear()
    half_made = FlexKVStorage(config(tmp_path))
    half_made.close()
    again = make(tmp_path)
    assert again.batch_exists(names(1)) == 1
    again.close()


def test_a_pool_without_page_buffers_misses_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Logical(KVPool):
        def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
            return None

        def get_dummy_flat_data_page(self) -> torch.Tensor:
            raise NotImplementedError

    with caplog.at_level(logging.ERROR):
        storage = make(tmp_path, Logical())
    assert "every page will miss" in caplog.text
    assert storage.batch_exists(names(1)) == 0
    assert storage.batch_set_v1(names(1), tokens(0)) == [False]
    storage.close()


def test_the_real_factory_makes_it_and_the_failure_injector_wraps_it(tmp_path: Path) -> None:
    extra = {
        "backend_name": "flexkv",
        "module_path": "flexkv_sglang",
        "class_name": "FlexKVStorage",
        "interface_v1": 1,
    }
    storage = StorageBackendFactory.create_backend("dynamic", config(tmp_path, **extra), KVPool())
    assert isinstance(storage, FlexKVStorage)
    assert isinstance(storage, HiCacheStorage)
    wrapped = HiCacheStorageFailureInjector(storage, 0.0, 1.0)
    wrapped.register_mem_pool_host(KVPool(seed=1))
    assert wrapped.batch_set_v1(names(1), tokens(0)) == [False]
    wrapped._failure_prob = 0.0
    assert wrapped.batch_set_v1(names(1), tokens(0)) == [True]
    wrapped.close()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pth": "/x"}, r"pth: unknown key, value '/x'. Did you mean 'path'"),
        ({"size": "lots"}, r"size: 'lots' is not a size. Valid"),
        ({"size": "1000TB"}, r"size: .*free.*Valid"),
        ({"size": 4096}, r"size: .*less than one page"),
        ({"verify": "maybe"}, r"verify: 'maybe'. Valid: full, sampled, off"),
        ({"path": 7}, r"path: 7. Valid: a directory"),
        ({"path": "/proc/nowhere"}, r"path: cannot use '/proc/nowhere'"),
        ({"io_engine": "aio"}, r"io_engine: 'aio'. Valid: auto"),
    ],
)
def test_a_bad_setting_stops_the_start_and_names_key_value_and_choices(
    tmp_path: Path, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(tmp_path, **extra)
    assert not list(tmp_path.rglob("*.slots"))


def test_size_is_shared_by_the_ranks_that_write(tmp_path: Path) -> None:
    mha = config(tmp_path, size=64 * 2 * HALF)
    mha.tp_size, mha.pp_size = 4, 2
    storage = FlexKVStorage(mha)
    storage.register_mem_pool_host(KVPool())
    assert store_of(storage).tiers[0].slot_count == 8
    storage.close()
    reading = config(tmp_path, size=64 * 2 * HALF)
    reading.tp_rank, reading.tp_size, reading.is_mla_model = 1, 2, True
    reader = FlexKVStorage(reading)
    reader.register_mem_pool_host(KVPool())
    assert store_of(reader).tiers[0].slot_count == 0
    writing = config(tmp_path, size=64 * 2 * HALF)
    writing.tp_size, writing.is_mla_model = 2, True
    writer = FlexKVStorage(writing)
    writer.register_mem_pool_host(KVPool(seed=1))
    assert writer.batch_set_v1(names(3), tokens(0, 1, 2)) == [True] * 3
    store_of(reader).tiers[0]._neighbours.scan()
    assert (
        reader.batch_get_v1(names(3), tokens(0, 1, 2)) == [True] * 3
    )  # rank 1 reads what rank 0 wrote
    reader.close()
    writer.close()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"layout": "page_first_direct"},
        {"layer_num": 1},
        {"start_layer": 2},
        {"storage_format_tag": "other"},
    ],
)
def test_pages_of_another_identity_are_not_seen(tmp_path: Path, change: dict[str, Any]) -> None:
    storage = make(tmp_path)
    storage.batch_set_v1(names(3), tokens(0, 1, 2))
    other = KVPool()
    for name, value in change.items():
        setattr(other, name, value)
    stranger = make(tmp_path, other)
    assert stranger.batch_exists(names(3)) == 0
    for renamed in (make(tmp_path, model_id="other weights"),):
        assert renamed.batch_exists(names(3)) == 0
        renamed.close()
    storage.close()
    stranger.close()
    spaces = [json.loads(path.read_text()) for path in tmp_path.rglob("NAMESPACE.json")]
    assert len(spaces) == 3
    assert all(space["page_size"] == PAGE_SIZE for space in spaces)


def test_layer_first_buffers_are_stored_k_before_v() -> None:
    class LayerFirst(KVPool):
        layout = "layer_first"

        def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
            return [100, 200, 101, 201] * (len(indices) // PAGE_SIZE), [8] * len(indices)

    pages = HostPages(LayerFirst(), tokens(0))
    buffers = pages.buffers(tokens(0, 1), 2)
    assert buffers is not None
    assert buffers.addresses.tolist() == [[100, 101, 200, 201]] * 2


def test_a_get_is_bounded_by_the_prefetch_timeout(tmp_path: Path) -> None:
    storage = FlexKVStorage(config(tmp_path))
    storage.register_mem_pool_host(KVPool())

    def seconds(pages: int) -> float:
        return storage._deadline(pages) - time.monotonic()

    assert 0.4 < seconds(1) <= 0.5  # SGLang's defaults: 1 s and 0.25 s per 1024 tokens
    assert 1.5 < seconds(8 * 1024 // PAGE_SIZE) <= 1.6
    storage.set_prefetch_timeout(0.0, 1.0)
    assert 3.1 < seconds(4 * 1024 // PAGE_SIZE) <= 3.2
    assert 0.0 < seconds(1) <= 0.05
    storage.close()
