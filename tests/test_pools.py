"""The pools of hybrid models at the adapter: every shape of answer, every odd registration, who writes what."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
from plain_pools import FlatPool, LogicalPool, Pool, attach, config, names, transfer

pytestmark = pytest.mark.sglang

MAMBA_PAGE = 3 * 4096


def hybrid(place: Path, seed: int | None = 1, *, fires: bool = True, **extra: Any) -> FlexKVStorage:
    """KV, an indexer that shares its indices, and Mamba state."""
    pools = {"indexer": Pool(512, seed=seed), "mamba": Pool(MAMBA_PAGE, page_size=1, seed=seed)}
    return attach(config(place, **extra), Pool(seed=seed), pools, fires=fires)


def pool_of(storage: FlexKVStorage, name: str) -> Any:
    return storage.registered_pools[name]


def store_of(storage: FlexKVStorage, name: str) -> Any:
    pool = storage._stores.get(name)
    assert pool is not None
    return pool.store


def put(storage: FlexKVStorage, keys: list[str], *, but: str = "", end: str = "mamba") -> None:
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
    return storage.batch_exists_v2(keys, [transfer("indexer", []), transfer("mamba", [], window=1)])


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FlexKVStorage]:
    made = hybrid(tmp_path)
    yield made
    made.close()


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
    assert storage.batch_exists(keys) == 4  # nobody has said that the window is two pages
    assert storage.batch_exists_v2(keys, [transfer("swa", [], window=2)]).kv_hit_pages == 0
    assert storage.batch_exists(keys) == 0
    storage.close()


def test_thousands_of_keys_in_one_call(storage: FlexKVStorage) -> None:
    keys = names(5000)
    put(storage, keys[:300])
    answer = ask(storage, keys)
    assert (answer.kv_hit_pages, answer.restorable_prefix_pages) == (300, [300])
    assert ask(storage, [*names(1, 7), *keys]).kv_hit_pages == 0


def test_what_is_announced_is_kept_in_every_pool(tmp_path: Path) -> None:
    """Room for a few states only: the oldest would be the next to go, were it not promised."""
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
        assert len(store_of(storage, name).tiers[0]._pages._promises) == 1
    storage.close()


def test_nothing_is_promised_beyond_the_fold(storage: FlexKVStorage) -> None:
    keys = names(6)
    put(storage, keys, but="mamba")
    assert ask(storage, keys).kv_hit_pages == 0
    for name in ("kv", "indexer"):
        assert len(store_of(storage, name).tiers[0]._pages._promises) == 0


@pytest.mark.parametrize("fires", [True, False])
def test_releases_that_do_not_say_when_the_burst_is_over(tmp_path: Path, fires: bool) -> None:
    storage = hybrid(tmp_path, fires=fires)
    put(storage, names(3))
    assert ask(storage, names(3)).kv_hit_pages == 3
    storage.close()
    again = hybrid(tmp_path, fires=fires)
    assert ask(again, names(3)).kv_hit_pages == 3
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.slots")) <= 16_000_000
    again.close()


def test_a_pool_that_comes_late_is_stored_and_needed(storage: FlexKVStorage) -> None:
    keys = names(3)
    put(storage, keys)
    before = store_of(storage, "kv").tiers[0].slot_count
    draft = Pool(2048, seed=5)
    storage.register_mem_host_pool_v2(draft, "draft")
    assert store_of(storage, "kv").tiers[0].slot_count < before  # made room
    assert ask(storage, keys).kv_hit_pages == 3
    assert storage.batch_exists(keys) == 0
    storage.batch_set_v2([transfer("draft", keys, draft.indices(0, 1, 2))])
    assert storage.batch_exists(keys) == 3


def test_a_model_that_lost_its_sidecars_gets_the_whole_size_again(tmp_path: Path) -> None:
    both = hybrid(tmp_path)
    divided = store_of(both, "kv").tiers[0].slot_count
    both.close()
    plain = attach(config(tmp_path), Pool(seed=1), {})
    assert store_of(plain, "kv").tiers[0].slot_count == 16_000_000 // 4096 > divided
    plain.close()
    noted = [json.loads(path.read_text()) for path in tmp_path.rglob("NAMESPACE.json")]
    kv = next(fields for fields in noted if fields["pool"] == "kv")
    assert [claim["name"] for claim in kv["pools"]] == ["kv"]


def test_the_configured_density_divides(tmp_path: Path) -> None:
    sparse = hybrid(tmp_path / "a", pool_density={"mamba": 0.1})
    dense = hybrid(tmp_path / "b", pool_density={"mamba": 1.0})
    slots = {
        s: {n: store_of(s, n).tiers[0].slot_count for n in ("kv", "indexer", "mamba")}
        for s in (sparse, dense)
    }
    assert slots[sparse]["kv"] == slots[sparse]["indexer"]
    assert slots[sparse]["mamba"] == pytest.approx(slots[sparse]["kv"] / 10, abs=1)
    assert slots[dense]["kv"] == slots[dense]["indexer"] == slots[dense]["mamba"]
    sparse.close()
    dense.close()


class Exploding(Pool):
    def get_page_buffer_meta(self, indices: torch.Tensor) -> Any:
        raise OSError("planted")  # nothing a host pool is known to raise


@pytest.mark.parametrize("odd", [object(), Exploding(), LogicalPool.__new__(LogicalPool)])
def test_an_odd_pool_neither_raises_nor_lets_anything_hit(
    tmp_path: Path, odd: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        storage = attach(config(tmp_path), Pool(seed=1), {"mamba": odd})
    assert "mamba" in caplog.text or "register_mem_host_pool_v2" in caplog.text
    keys = names(2)
    assert storage.batch_set_v1(keys, pool_of(storage, "kv").indices(0, 1)) == [True, True]
    assert storage.batch_exists_v2(keys, [transfer("mamba", [], window=1)]).kv_hit_pages == 0
    assert storage.batch_exists(keys) == 0
    assert storage.batch_get_v2([transfer("mamba", keys, torch.arange(2))]) == {
        "mamba": [False] * 2
    }
    assert storage.batch_exists_v2(keys, [transfer("swa", [], window=1)]).kv_hit_pages == 0
    storage.close()


def test_a_size_too_small_for_all_pools_is_said_and_misses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        storage = hybrid(tmp_path, size=3 * 4096)
    assert "host pool mamba is not stored, what needs it misses: size: " in caplog.text
    assert ask(storage, names(2)).kv_hit_pages == 0
    assert storage.batch_exists(names(2)) == 0
    storage.close()


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
    monkeypatch.setattr("flexkv_sglang.staged_pages.STAGING_BYTES", 3 * 1536)
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


def test_pages_without_bytes_are_markers_that_are_true(tmp_path: Path) -> None:
    pools = {"deepseek_v4_c4": Pool(512, seed=1)}
    storage = attach(config(tmp_path), LogicalPool(seed=1), pools)
    keys = names(4)
    kv, c4 = pool_of(storage, "kv"), pools["deepseek_v4_c4"]
    before = kv.rows.clone()
    assert storage.batch_get_v1(keys, kv.indices(0, 1, 2, 3)) == [False] * 4
    storage.batch_set_v2([transfer("deepseek_v4_c4", keys, c4.indices(0, 1, 2, 3))])
    assert storage.batch_exists_v2(keys, [transfer("deepseek_v4_c4", [])]).kv_hit_pages == 0
    assert storage.batch_set_v1(keys[:3], kv.indices(0, 1, 2)) == [True] * 3
    assert storage.batch_exists_v2(keys, [transfer("deepseek_v4_c4", [])]).kv_hit_pages == 3
    assert storage.batch_get_v1(keys, kv.indices(0, 1, 2, 3)) == [True, True, True, False]
    empty = torch.empty(0, dtype=torch.uint8)
    assert storage.set(keys[3], empty)
    assert storage.get(keys[3], empty) is empty
    assert not storage.set(names(1, 9)[0], torch.zeros(4))
    assert torch.equal(kv.rows, before)
    storage.close()


def test_a_logical_pool_alone_stores_nothing(tmp_path: Path) -> None:
    storage = attach(config(tmp_path), LogicalPool(), {})
    assert storage.batch_set_v1(names(1), LogicalPool().indices(0)) == [False]
    assert not list(tmp_path.rglob("*.slots"))
    storage.close()


def test_replicated_pools_have_one_writer_and_state_one_per_rank(tmp_path: Path) -> None:
    """Two tensor-parallel ranks of an MLA model: rank 0 writes KV and indexer, both write their own Mamba state."""
    ranks = []
    for rank in range(2):
        settings = config(tmp_path, rank, 2, mla=True)
        pools = {"indexer": Pool(512, seed=1), "mamba": Pool(MAMBA_PAGE, 1, seed=10 + rank)}
        ranks.append(attach(settings, Pool(seed=1), pools))
    first, second = ranks
    keys = names(3)
    put(first, keys)
    for name in ("kv", "indexer"):
        assert store_of(second, name).tiers[0].slot_count == 0
        store_of(second, name).tiers[0]._neighbours.scan()
    assert store_of(second, "mamba").tiers[0].slot_count > 0
    assert ask(second, keys).kv_hit_pages == 0  # its own state is not there
    mamba = pool_of(second, "mamba")
    assert second.batch_set_v2([transfer("mamba", keys[2:], mamba.indices(2))]) == {"mamba": [True]}
    assert ask(second, keys).kv_hit_pages == 3
    expected = mamba.rows[2].clone()
    mamba.rows[:] = 0
    assert second.batch_get_v2([transfer("mamba", keys[2:], mamba.indices(7))]) == {"mamba": [True]}
    assert torch.equal(mamba.rows[7], expected)
    indexer = pool_of(second, "indexer")
    indexer.rows[:] = 0
    got = second.batch_get_v2([transfer("indexer", keys, indexer.indices(0, 1, 2))])
    assert got == {"indexer": [True] * 3}
    assert torch.equal(indexer.rows[:3], pool_of(first, "indexer").rows[:3])
    on_disk = sum(path.stat().st_size for path in tmp_path.rglob("*.slots"))
    assert on_disk <= 16_000_000
    for rank in ranks:
        rank.close()


def test_a_draft_with_heads_is_not_read_by_the_other_ranks(tmp_path: Path) -> None:
    """Its bytes differ by rank, and SGLang lets only one of them write: a lost hit, not a wrong one."""
    ranks = []
    for rank in range(2):
        draft = Pool(512, seed=rank)
        draft.head_num = 2  # type: ignore[attr-defined]
        ranks.append(attach(config(tmp_path, rank, 2, mla=True), Pool(seed=1), {"draft": draft}))
    keys = names(2)
    for rank in ranks:
        for name in ("kv", "draft"):
            store_of(rank, name).tiers[0]._neighbours.scan()
    draft = pool_of(ranks[0], "draft")
    ranks[0].batch_set_v2([transfer("draft", keys, draft.indices(0, 1))])
    ranks[0].batch_set_v1(keys, pool_of(ranks[0], "kv").indices(0, 1))
    asked = [transfer("draft", [])]
    assert [rank.batch_exists_v2(keys, asked).kv_hit_pages for rank in ranks] == [2, 0]
    for rank in ranks:
        rank.close()


def test_clear_and_close_reach_every_pool(tmp_path: Path) -> None:
    storage = hybrid(tmp_path)
    keys = names(3)
    put(storage, keys)
    storage.clear()
    for name in ("kv", "indexer", "mamba"):
        assert store_of(storage, name).page_count() == 0
    put(storage, keys)
    storage.close()
    storage.close()
    assert ask(storage, keys).kv_hit_pages == 0
    indexer = pool_of(storage, "indexer")
    absent = {"indexer": [False] * 3}
    assert storage.batch_get_v2([transfer("indexer", keys, indexer.indices(0, 1, 2))]) == absent
    again = hybrid(tmp_path)
    assert ask(again, keys).kv_hit_pages == 3
    again.close()


def test_pages_of_one_pool_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    """Same size, same keys, other name."""
    one = attach(config(tmp_path), Pool(seed=1), {"indexer": Pool(512, seed=2)})
    one.batch_set_v2([transfer("indexer", names(2), Pool(512).indices(0, 1))])
    other = attach(config(tmp_path), Pool(seed=1), {"draft": Pool(512)})
    assert other.batch_get_v2([transfer("draft", names(2), Pool(512).indices(0, 1))]) == {
        "draft": [False, False]
    }
    one.close()
    other.close()


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
