"""Pages shared by servers of different tensor-parallel sizes: SGLang's real page_head pools, one per rank.

The heads of a model are written by the ranks of one size and read by those of another; what a rank must get is
cut from the whole model's bytes here, without our address arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

from flexkv_bed.controller import POISON, Geometry, boot, device_pool, host_pool
from flexkv_bed.tiny_model import write_config
from flexkv_sglang import FlexKVStorage
from flexkv_sglang.pools.head_groups import GROUPS_MAX, WHOLE, HeadGroups
from flexkv_sglang.pools.transfers import stored_run
from flexkv_sglang.types import PageKey
from models.plain_pools import attach, config, names, store_of, transfer
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.slow]

LCM, HEADS, PAGE, LAYERS, DIM = 4, 8, 16, 2, 64
PAGES = 6
SIZES = (1, 2, 4)


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")), page_size=PAGE)


def whole_model(dim: int = DIM) -> torch.Tensor:
    """K and V of ``PAGES`` pages, all heads: uint8 ``[2, pages, heads, tokens, layers, bytes]``."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, PAGES, HEADS, PAGE, LAYERS, 2 * dim)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def rank_pool(size: int, layout: Any = "page_head", dim: int = DIM, kind: Any = "mha") -> Any:
    """SGLang's host pool of one rank, poisoned."""
    geometry = Geometry(kind, layout, PAGE, LAYERS, 32 * PAGE, HEADS // size, dim)
    pool = host_pool(device_pool(geometry), geometry)
    pool.kv_buffer.view(torch.uint8).fill_(POISON)
    return pool


def held(pool: Any, pages: int = PAGES) -> torch.Tensor:
    """The pool's first pages as bytes, shaped as ``whole_model``."""
    data: torch.Tensor = pool.kv_buffer.view(torch.uint8)[:, :pages]
    return data


def part(whole: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """The heads of one rank."""
    heads = HEADS // size
    return whole[:, :, rank * heads : (rank + 1) * heads]


def settings(
    place: Path,
    rank: int,
    size: int,
    lcm: int | None = LCM,
    mla: bool = False,
    quota: int = 16 << 20,
) -> Any:
    """As SGLang's controller makes them of ``{"tp_lcm_size": lcm}``."""
    made = config(place, rank, size, mla)
    made.extra_config["size"] = quota
    made.tp_lcm_size, made.should_split_heads = lcm, bool(lcm and lcm > size)
    return made


@contextmanager
def server(
    place: Path, count: int, dim: int = DIM, quota: int = 16 << 20
) -> Iterator[list[FlexKVStorage]]:
    """All ranks of a server, which takes ``quota`` bytes of the disk."""
    ranks = [
        attach(settings(place, rank, count, quota=quota), rank_pool(count, dim=dim), {})
        for rank in range(count)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.close()


def tokens(pages: Sequence[int]) -> torch.Tensor:
    return torch.cat([torch.arange(p * PAGE, (p + 1) * PAGE) for p in pages])


def fill(storage: FlexKVStorage, whole: torch.Tensor, rank: int, size: int) -> None:
    held(storage.mem_pool_host).copy_(part(whole, rank, size))


def write(ranks: Sequence[FlexKVStorage], whole: torch.Tensor, keys: list[str]) -> None:
    for rank, storage in enumerate(ranks):
        fill(storage, whole, rank, len(ranks))
        assert all(storage.batch_set_v1(keys, tokens(range(len(keys)))))


def assert_read(ranks: Sequence[FlexKVStorage], whole: torch.Tensor, keys: list[str]) -> None:
    """Every rank finds all pages and gets its heads, into other places of its host pool than they came from."""
    places = list(range(len(keys)))[::-1]
    for rank, storage in enumerate(ranks):
        held(storage.mem_pool_host).fill_(POISON)
        # pages that a rank adopts which starts at the same moment are seen a quarter of a second later
        assert wait_until(lambda rank=storage: rank.batch_exists(keys) == len(keys))  # type: ignore[misc]
        # on a busy machine the second look at the other's journal may take longer than it may: a miss, and no harm
        assert wait_until(lambda rank=storage: all(rank.batch_get_v1(keys, tokens(places))))  # type: ignore[misc]
        assert torch.equal(held(storage.mem_pool_host)[:, places], part(whole, rank, len(ranks)))


@pytest.mark.parametrize("dim", [DIM, 24], ids=["aligned", "odd"])
@pytest.mark.parametrize("reader", SIZES)
@pytest.mark.parametrize("writer", SIZES)
def test_written_by_one_size_read_by_another(
    tmp_path: Path, writer: int, reader: int, dim: int
) -> None:
    whole, keys = whole_model(dim), names(PAGES)
    with server(tmp_path, writer, dim) as first:
        write(first, whole, keys)
        with server(tmp_path, reader, dim) as second:  # as neighbours
            assert_read(second, whole, keys)
            assert_read(first, whole, keys)
    with server(tmp_path, reader, dim) as second:  # from the files of servers that are gone
        assert_read(second, whole, keys)
    assert len(list(tmp_path.glob("*/NAMESPACE.json"))) == 1


def test_pages_of_another_size_are_not_stored_again(tmp_path: Path) -> None:
    whole, keys = whole_model(), names(PAGES)
    with server(tmp_path, 2) as first, server(tmp_path, 1) as second:
        write(first, whole, keys)
        write(second, whole, keys)
        assert store_of(second[0], "kv").page_count() == 0
        assert [store_of(rank, "kv").page_count() for rank in first] == [2 * PAGES, 2 * PAGES]


def test_sglangs_stats_count_pages(tmp_path: Path) -> None:
    whole, keys = whole_model(), names(PAGES)
    with server(tmp_path, 2) as ranks:
        write(ranks, whole, keys)
        assert_read(ranks, whole, keys)
        for rank in ranks:
            stats = rank.get_stats()
            assert (stats.backup_pgs, stats.prefetch_pgs) == ([PAGES], [PAGES])


def test_a_page_is_a_hit_only_with_all_its_head_groups(tmp_path: Path) -> None:
    whole, keys = whole_model(), names(PAGES)
    with server(tmp_path, 2) as writers:
        for rank, count in ((0, PAGES), (1, 3)):
            fill(writers[rank], whole, rank, 2)
            assert all(writers[rank].batch_set_v1(keys[:count], tokens(range(count))))
        with server(tmp_path, 1) as (alone,), server(tmp_path, 4) as four:
            assert alone.batch_exists(keys) == 3
            got = alone.batch_get_v1(keys, tokens(range(PAGES)))
            assert got == [True] * 3 + [False] * (PAGES - 3)
            assert torch.equal(held(alone.mem_pool_host, 3), whole[:, :3])
            assert [rank.batch_exists(keys) for rank in four] == [PAGES, PAGES, 3, 3]


def test_flat_pages_and_zero_copy_are_the_same_bytes(tmp_path: Path) -> None:
    whole, keys = whole_model(), names(PAGES)
    with server(tmp_path, 1) as (alone,), server(tmp_path, 2) as two:
        fill(alone, whole, 0, 1)
        pool = alone.mem_pool_host
        assert alone.batch_set(keys, [pool.get_data_page(page * PAGE) for page in range(PAGES)])
        assert_read(two, whole, keys)
        for rank, storage in enumerate(two):
            pool = storage.mem_pool_host
            empty = [pool.get_dummy_flat_data_page() for _ in keys]
            held(pool).fill_(POISON)
            for page, tensor in enumerate(storage.batch_get(keys, empty)):
                pool.set_from_flat_data_page(page * PAGE, tensor)
            assert torch.equal(held(pool), part(whole, rank, 2))
        assert alone.batch_get(keys, empty) == [None] * PAGES  # tensors of half a page


def test_the_end_of_a_chain_is_evicted_first_across_calls(tmp_path: Path) -> None:
    """40 groups fit: pages of one chain that is written in two calls, and then one of another chain."""
    whole, keys, others = whole_model(), names(PAGES), names(6, seed=9)
    group_bytes = 2 * HEADS // LCM * PAGE * LAYERS * 2 * DIM
    with server(tmp_path, 1, quota=40 * group_bytes) as (alone,):
        fill(alone, whole, 0, 1)
        assert all(alone.batch_set_v1(keys[:3], tokens(range(3))))
        after = HiCacheStorageExtraInfo(prefix_keys=keys[:3])
        assert all(alone.batch_set_v1(keys[3:], tokens(range(3, PAGES)), after))
        assert all(alone.batch_set_v1(others, tokens(range(6))))
        store_of(alone, "kv").check()
        left = alone.batch_exists(keys)
        pool, groups = alone._stores.get("kv"), HeadGroups(LCM, 0, LCM)
        assert pool is not None
        stored = [PageKey(bytes.fromhex(key)) for key in keys]
        flags = store_of(alone, "kv").holds(groups.keys(stored))
        assert flags == sorted(flags, reverse=True), "a hole: something before the end was evicted"
        assert left == stored_run(pool, stored, promise=False) == sum(flags) // LCM < PAGES


def test_windows_are_shared_as_well(tmp_path: Path) -> None:
    """Trailing pages of a sidecar pool: folded by pages, not by groups."""
    whole, keys = whole_model(), names(PAGES)

    def hybrid(rank: int, size: int) -> FlexKVStorage:
        made = attach(settings(tmp_path, rank, size), rank_pool(size), {"swa": rank_pool(size)})
        fill(made, whole, rank, size)
        held(made.registered_pools["swa"]).copy_(part(whole.flip(1), rank, size))
        return made

    two, alone = [hybrid(rank, 2) for rank in range(2)], hybrid(0, 1)
    ends = [keys[1], keys[2], keys[5]]
    for storage in two:
        answer = storage.batch_set_v2([transfer("swa", ends, tokens([1, 2, 5]))])
        assert answer == {"swa": [True] * 3}
        assert all(storage.batch_set_v1(keys, tokens(range(PAGES))))

    def restorable() -> list[int]:
        return alone.batch_exists_v2(keys, [transfer("swa", [], window=2)]).restorable_prefix_pages

    assert wait_until(lambda: restorable() == [3])
    target = alone.registered_pools["swa"]
    held(target).fill_(POISON)
    answer = alone.batch_get_v2([transfer("swa", ends, tokens([1, 2, 5]))])
    assert answer == {"swa": [True] * 3}
    assert torch.equal(held(target)[:, [1, 2, 5]], whole.flip(1)[:, [1, 2, 5]])
    for storage in (*two, alone):
        storage.close()


def namespace(place: Path, rank: int, size: int, pool: Any, **given: Any) -> dict[str, Any]:
    """The identity of a rank's KV pages."""
    storage = attach(settings(place, rank, size, **given), pool, {})
    kv = storage._stores.get("kv")
    assert kv is not None
    storage.close()
    return kv.spec.identity.fields()


def test_the_identity_has_the_groups_and_not_the_size(tmp_path: Path) -> None:
    mine = [namespace(tmp_path, r, n, rank_pool(n)) for n in SIZES for r in range(n)]
    assert all(one == mine[0] for one in mine)
    group = HEADS // LCM * PAGE * LAYERS * 2 * DIM
    assert (mine[0]["tp"], mine[0]["split_heads"]) == ((0, 1), LCM)
    assert mine[0]["buffer_bytes"] == (group, group)
    assert namespace(tmp_path, 0, 2, rank_pool(2), lcm=8) != mine[0]


@pytest.mark.parametrize(
    ("size", "lcm", "layout", "reason"),
    [
        (2, 4, "page_first", "the host layout is page_first, and has to be page_head"),
        (2, 3, "page_head", "it is no multiple of the tensor-parallel size"),
        (2, 16, "page_head", "8 groups per rank: AssertionError"),  # four heads
        (1, 2 * GROUPS_MAX, "page_head", "more than 65536 groups"),
    ],
)
def test_where_heads_cannot_be_cut_sizes_stay_apart_and_the_log_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, lcm: int, layout: str, reason: str
) -> None:
    with caplog.at_level(logging.WARNING):
        got = namespace(tmp_path, size - 1, size, rank_pool(size, layout), lcm=lcm)
    said = [r.getMessage() for r in caplog.records if "tp_lcm_size" in r.getMessage()]
    assert len(said) == 1
    assert f"tp_lcm_size={lcm} has no effect on MHATokenToKVPoolHost: {reason}" in said[0]
    assert (got["tp"], got["split_heads"]) == ((size - 1, size), 0)
    assert got == namespace(tmp_path, size - 1, size, rank_pool(size, layout), lcm=None)


def test_models_whose_ranks_hold_the_same_bytes_need_no_groups(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pool = rank_pool(1, "page_first", kind="mla")
    with caplog.at_level(logging.WARNING):
        mine = [
            namespace(tmp_path, rank, size, pool, mla=True, lcm=lcm)
            for rank, size, lcm in ((0, 1, None), (1, 2, 4), (3, 4, None))
        ]
    assert all(one == mine[0] for one in mine)
    assert mine[0]["tp"] == (0, 1)
    assert "tp_lcm_size" not in caplog.text


def test_every_group_of_every_page_has_a_key_and_a_checksum_seed_of_its_own() -> None:
    pages = [PageKey(bytes.fromhex(name)) for name in names(50)]
    keys = [key for rank in range(4) for key in HeadGroups(8, 2 * rank, 2).keys(pages)]
    assert len({key[:8] for key in keys}) == len(keys) == 8 * len(pages)
    assert sorted(keys) == sorted(HeadGroups(8, 0, 8).keys(pages))
    assert WHOLE.keys(pages) is pages
    assert HeadGroups(8, 2, 2).last_key(pages[0]) == HeadGroups(8, 3, 1).keys(pages[:1])[0]
    assert HeadGroups(8, 2, 2).last_key(None) is None
