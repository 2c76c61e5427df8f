"""Lookups, reads and writes of the pools of hybrid models: each shape of answer of the storage backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from sglang.srt.mem_cache import hicache_storage
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorageExtraInfo,
    HiCacheStorageFailureInjector,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)

from flexkv_sglang import FlexKVStorage
from models.plain_pools import (
    FlatPool,
    Pool,
    ask,
    attach,
    config,
    hybrid,
    names,
    pool_of,
    put,
    store_of,
    transfer,
)

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("kind", [Pool, FlatPool])
@pytest.mark.parametrize("count", [1, 5, 127, 128, 129, 300])
def test_any_batch_of_any_pool_round_trips_between_two_instances(
    tmp_path: Path, kind: type[Pool], count: int
) -> None:
    name = "a pool of tomorrow"
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))[:count].tolist()
    source, target = kind(1536, seed=1), kind(1536)
    writer = attach(config(tmp_path), Pool(seed=1), {name: source})
    reader = attach(config(tmp_path), Pool(), {name: target})
    sent = writer.batch_set_v2([transfer(name, names(count), source.indices(*order))])
    assert sent == {name: [True] * count}
    got = reader.batch_get_v2([transfer(name, names(count), target.indices(*range(count)))])
    assert got == {name: [True] * count}
    assert torch.equal(target.rows[:count], source.rows[order])
    assert (target.rows[count:] == 0xA5).all()
    writer.close()
    reader.close()


def test_every_pool_is_in_the_answer_with_one_flag_per_key(storage: FlexKVStorage) -> None:
    keys = names(3)
    mamba = pool_of(storage, "mamba")
    odd = [
        transfer("indexer", keys, None),
        transfer("mamba", keys, mamba.indices(0, 1)),  # two pages for three keys
        transfer("swa", keys, mamba.indices(0, 1, 2)),  # never registered
        transfer("kv", [], None),
    ]
    expected = {"indexer": [False] * 3, "mamba": [False] * 3, "swa": [False] * 3, "kv": []}
    assert storage.batch_get_v2(odd) == expected
    assert storage.batch_set_v2(odd) == expected
    assert storage.batch_get_v2([]) == {}
    named = storage.batch_get_v2([PoolTransfer(name=PoolName.MAMBA, keys=keys)])
    assert named[PoolName.MAMBA] == named["mamba"] == [False] * 3  # found under either name


def test_a_pool_that_is_named_twice_is_all_there_or_not(storage: FlexKVStorage) -> None:
    keys, indexer = names(4), pool_of(storage, "indexer")
    halves = [
        transfer("indexer", keys[:2], indexer.indices(0, 1)),
        transfer("indexer", keys[2:], indexer.indices(2, 3)),
    ]
    assert storage.batch_set_v2(halves) == {"indexer": [True, True]}
    assert storage.batch_get_v2(halves) == {"indexer": [True, True]}
    absent = transfer("indexer", names(2, 9), indexer.indices(4, 5))
    assert storage.batch_get_v2([absent, halves[0]]) == {"indexer": [False, False]}


def test_prefixes_that_every_pool_agrees_to(storage: FlexKVStorage) -> None:
    keys = names(6)
    put(storage, keys[:3])
    put(storage, keys[:5])
    answer = ask(storage, keys)
    assert type(answer) is PoolTransferResult
    assert (answer.kv_hit_pages, answer.restorable_prefix_pages) == (5, [3, 5])
    assert answer.extra_pool_hit_pages == {"kv": 5, "indexer": 5, "mamba": 5}
    assert storage.batch_exists(keys) == 5
    assert ask(storage, keys[:4]).kv_hit_pages == 3
    assert ask(storage, keys[:2]).kv_hit_pages == 0
    assert ask(storage, []).kv_hit_pages == 0
    nothing = storage.batch_exists_v2(keys, None)
    assert (nothing.kv_hit_pages, nothing.restorable_prefix_pages) == (5, [3, 5])


def test_a_missing_sidecar_page_is_a_miss_for_both_calls(storage: FlexKVStorage) -> None:
    keys = names(4)
    put(storage, keys, but="indexer")
    assert ask(storage, keys).kv_hit_pages == storage.batch_exists(keys) == 0
    indexer = pool_of(storage, "indexer")
    storage.batch_set_v2([transfer("indexer", keys[:3], indexer.indices(0, 1, 2))])
    assert ask(storage, keys).kv_hit_pages == 0  # no state at page 3
    storage.batch_set_v2([transfer("indexer", keys[3:], indexer.indices(3))])
    assert ask(storage, keys).kv_hit_pages == storage.batch_exists(keys) == 4


def test_the_call_for_kv_alone_remembers_the_window_that_was_asked_for(tmp_path: Path) -> None:
    swa = Pool(512, seed=1)
    storage = attach(config(tmp_path), Pool(seed=1), {"swa": swa})
    keys = names(4)
    storage.batch_set_v2([transfer("swa", keys[3:], swa.indices(3))])
    storage.batch_set_v1(keys, pool_of(storage, "kv").indices(0, 1, 2, 3))
    assert storage.batch_exists(keys) == 4  # no call has asked for a window of two pages
    assert storage.batch_exists_v2(keys, [transfer("swa", [], window=2)]).kv_hit_pages == 0
    assert storage.batch_exists(keys) == 0
    storage.close()


def test_thousands_of_keys_in_one_call(storage: FlexKVStorage) -> None:
    keys = names(5000)
    put(storage, keys[:300])
    answer = ask(storage, keys)
    assert (answer.kv_hit_pages, answer.restorable_prefix_pages) == (300, [300])
    assert ask(storage, [*names(1, 7), *keys]).kv_hit_pages == 0


def test_announced_pages_are_protected_in_every_pool(tmp_path: Path) -> None:
    """There is room for a few states only: the oldest would be the next victim if it were not protected."""
    storage = hybrid(tmp_path, size="2MB", pool_density={"mamba": 0.05})
    state = store_of(storage, "mamba")
    first = names(2, 1)
    put(storage, first)
    for number in range(state.tiers[0].slot_count - 1):
        put(storage, names(2, 100 + number))
    assert ask(storage, first).kv_hit_pages == 2
    for number in range(3):
        put(storage, names(2, 500 + number))
    assert ask(storage, first).kv_hit_pages == 2
    assert ask(storage, names(2, 100)).kv_hit_pages == 0  # gone in its place
    for name in ("kv", "indexer", "mamba"):
        assert len(store_of(storage, name).tiers[0]._pages._lookup_pins) == 1
    storage.close()


def test_no_page_beyond_the_fold_is_protected(storage: FlexKVStorage) -> None:
    keys = names(6)
    put(storage, keys, but="mamba")
    assert ask(storage, keys).kv_hit_pages == 0
    for name in ("kv", "indexer"):
        assert len(store_of(storage, name).tiers[0]._pages._lookup_pins) == 0


def test_an_exception_while_pages_move_is_all_false(
    storage: FlexKVStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = names(2)
    put(storage, keys)
    monkeypatch.setattr(pool_of(storage, "mamba"), "get_page_buffer_meta", lambda _indices: 1 / 0)
    both = [
        transfer("indexer", keys, pool_of(storage, "indexer").indices(0, 1)),
        transfer("mamba", keys[1:], pool_of(storage, "mamba").indices(0)),
    ]
    for call in (storage.batch_get_v2, storage.batch_set_v2):
        assert call(both) == {"indexer": [False, False], "mamba": [False]}
    assert storage.metrics.snapshot()["batch_get_v2_exceptions"] == 1


def test_flat_pages_in_several_pieces_are_one_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.pools.host_pages.STAGING_BYTES", 3 * 1536)
    source = FlatPool(1536, seed=1)
    storage = attach(config(tmp_path), Pool(seed=1), {"indexer": source})
    keys = names(9)
    storage.batch_set_v2([transfer("indexer", keys[:1], source.indices(0))])
    rest = transfer("indexer", keys[1:], source.indices(*range(1, 9)))
    storage.batch_set_v2([rest], HiCacheStorageExtraInfo(prefix_keys=keys[:1]))
    index = store_of(storage, "indexer").tiers[0]._pages.index
    found = [index.find(bytes.fromhex(key)) for key in keys]
    assert [index.parent_slot(slot) for slot in found] == [-1, *found[:8]]
    expected = source.rows[:9].clone()
    source.rows[:] = 0
    asked = transfer("indexer", [*keys[:5], *names(1, 9), *keys[5:]], source.indices(*range(10)))
    assert storage.batch_get_v2([asked]) == {"indexer": [True] * 5 + [False] * 5}
    assert torch.equal(source.rows[:5], expected[:5])
    storage.close()


def test_results_of_a_release_without_restorable_lengths(
    storage: FlexKVStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass
    class Old:
        kv_hit_pages: int
        extra_pool_hit_pages: dict[str, int]

    monkeypatch.setattr(hicache_storage, "PoolTransferResult", Old)
    put(storage, names(2))
    answer = ask(storage, names(2))
    assert answer == Old(2, {"kv": 2, "indexer": 2, "mamba": 2})


def test_sglangs_failure_injector_wraps_v2(tmp_path: Path) -> None:
    wrapped = HiCacheStorageFailureInjector(FlexKVStorage(config(tmp_path), {}), 0.0, 0.0)
    kv, indexer = Pool(seed=1), Pool(512, seed=1)
    wrapped.register_mem_pool_host(kv)
    wrapped.register_mem_host_pool_v2(kv, PoolName.KV)
    wrapped.register_mem_host_pool_v2(indexer, PoolName.INDEXER)
    wrapped.on_host_pools_registered()
    sent = wrapped.batch_set_v2([transfer("indexer", names(2), indexer.indices(0, 1))])
    assert sent == {"indexer": [True, True]}
    wrapped._failure_prob = 1.0
    lost = wrapped.batch_get_v2([transfer("indexer", names(2), indexer.indices(0, 1))])
    assert lost == {"indexer": [False, False]}
    wrapped.close()


def test_a_kv_pool_that_names_no_buffers_goes_as_flat_pages(tmp_path: Path) -> None:
    kv = FlatPool(1536, seed=1)
    storage = attach(config(tmp_path), kv, {})
    keys = names(5)
    assert storage.batch_set_v1(keys, kv.indices(0, 1, 2, 3, 4)) == [True] * 5
    assert storage.batch_exists(keys) == 5
    assert storage.batch_get_v1(keys, kv.indices(10, 11, 12, 13, 14)) == [True] * 5
    assert torch.equal(kv.rows[10:15], kv.rows[:5])
    flat = torch.zeros(1536, dtype=torch.uint8)
    assert storage.get(keys[2], flat) is flat
    assert torch.equal(flat, kv.rows[2])
    storage.close()


def test_tiers_have_all_pools_each(tmp_path: Path) -> None:
    tiers = [
        {"path": str(tmp_path / "fast"), "size": "1MB"},
        {"path": str(tmp_path / "slow"), "size": "8MB"},
    ]
    storage = hybrid(tmp_path, path=None, size=None, tiers=tiers)
    keys = names(3)
    put(storage, keys)
    assert ask(storage, keys).kv_hit_pages == 3
    for name in ("kv", "indexer", "mamba"):
        fast, slow = store_of(storage, name).tiers
        assert 0 < fast.slot_count < slow.slot_count
        fast.clear()
    assert ask(storage, keys).kv_hit_pages == 3
    mamba = pool_of(storage, "mamba")
    expected = mamba.rows[2].clone()
    got = storage.batch_get_v2([transfer("mamba", keys[2:], mamba.indices(9))])
    assert got == {"mamba": [True]}
    assert torch.equal(mamba.rows[9], expected)
    storage.close()
