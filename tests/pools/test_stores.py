"""Pools of hybrid models: the time of opening, the division of the size, the writers, and odd pools."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.errors import ConfigError
from models.plain_pools import (
    MAMBA_PAGE,
    LogicalPool,
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
from stores.engines import wait_until

pytestmark = pytest.mark.sglang


@pytest.mark.parametrize("fires", [True, False])
def test_releases_that_do_not_say_when_registration_is_done(tmp_path: Path, fires: bool) -> None:
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


def test_a_size_beyond_the_disk_stops_the_start_of_a_logical_anchor_too(tmp_path: Path) -> None:
    storage = FlexKVStorage(config(tmp_path, size="1000TB"), {})
    with pytest.raises(ConfigError, match=r"size: .*file system has .*Valid: a size that fits"):
        storage.register_mem_pool_host(LogicalPool())
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


def test_pools_that_come_while_calls_run_disturb_none_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files are closed and opened again five times under three callers: every page is right or missing."""
    monkeypatch.setattr("flexkv_sglang.pools.stores._EXCHANGE_S", 20.0)
    storage = hybrid(tmp_path)
    kv = pool_of(storage, "kv")
    expected = kv.rows.clone()
    stop = threading.Event()
    wrong: list[str] = []

    def write(number: int) -> None:
        keys = names(4, number)
        while not stop.is_set():
            rows = range(4 * number, 4 * number + 4)
            storage.batch_set_v1(keys, kv.indices(*rows))
            targets = range(200 + 4 * number, 204 + 4 * number)
            got = storage.batch_get_v1(keys, kv.indices(*targets))
            for row, target, flag in zip(rows, targets, got, strict=True):
                if flag and not torch.equal(kv.rows[target], expected[row]):
                    wrong.append(f"{number}: page {row}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for number in range(5):
        storage.register_mem_host_pool_v2(Pool(512, seed=number), f"late {number}")
    stop.set()
    for thread in threads:
        thread.join(30)
    assert wrong == []
    exceptions = {n: v for n, v in storage.metrics.snapshot().items() if n.endswith("_exceptions")}
    assert exceptions == {}
    assert storage._stores.get("late 4") is not None
    storage.close()


def test_files_are_not_exchanged_under_a_call_and_the_next_one_tries_again(
    storage: FlexKVStorage,
) -> None:
    keys = names(2)
    put(storage, keys)
    kv = store_of(storage, "kv")
    with storage._stores.in_use():  # as if a call ran
        storage.register_mem_host_pool_v2(Pool(512, seed=1), "draft")
        assert store_of(storage, "kv") is kv
        assert storage._stores.get("draft") is None
    assert storage.batch_exists(keys) == 0  # the draft's pages are not there
    assert storage._stores.get("draft") is not None


def test_a_server_that_starts_beside_an_old_one_takes_over_its_files_when_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.cache.upkeep._ROOM_ROUND_S", 0.2)

    def free(_: Path) -> int:
        return 1_000_000 - sum(path.stat().st_size for path in tmp_path.rglob("*.slots"))

    monkeypatch.setattr("flexkv_sglang.backends.slots.space.places.free_bytes", free)
    monkeypatch.setattr("flexkv_sglang.backends.slots.space.places.floor_bytes", lambda *_: 0)
    old = attach(config(tmp_path, size=1_000_000), Pool(seed=1), {})
    assert all(old.batch_set_v1(names(3), pool_of(old, "kv").indices(0, 1, 2)))
    new = attach(config(tmp_path, size=1_000_000), Pool(seed=1), {})
    assert store_of(new, "kv").tiers[0].slot_count == 0
    assert new.batch_exists(names(3)) == 3  # it reads its neighbour
    old.close()

    def grown() -> bool:
        new.batch_exists(names(1))
        return bool(store_of(new, "kv").tiers[0].slot_count == 1_000_000 // 4096)

    assert wait_until(grown)
    assert new.batch_exists(names(3)) == 3
    new.close()
