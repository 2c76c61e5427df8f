"""Leases: a lookup counts only pinned pages, until the request stops asking, and pins at most half of the slots."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_bed.controller import Geometry, boot
from flexkv_bed.tiny_model import write_config
from flexkv_sglang.identity.keys import page_keys
from flexkv_sglang.linker import linker as linker_module
from flexkv_sglang.linker.leases import LEASE_S, LOADED_S
from flexkv_sglang.linker.linker import FlexKVLinker
from models.plain_pools import names
from sglang_bed.linker_bed import WAIT_S, Side, same, side, transfer
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang]

KEYS = names(3)
SMALL = 16 * 12288


class Clock:
    """Time that a test sets."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[Side, Clock]]:
    """A small store with three pages, and the clock of its leases."""
    with side(tmp_path, Geometry(), size=SMALL) as made:
        assert made.store(KEYS, 1, 2, 3)
        clock = made.linker._leases._clock = Clock()
        yield made, clock


def leased(replica: Side) -> int:
    return replica.linker._leases.leased_pages()


def crowd_out(replica: Side) -> None:
    """Store pages until only pinned ones of the old pages are left."""
    opened = replica.linker._stores.get("kv")
    for seed in range(10, 10 + opened.store.tiers[0].slot_count):
        replica.store(names(2, seed=seed), 4, 5)
        replica.linker._stores.get("kv").store.prefix(
            page_keys(names(2, seed=seed))
        )  # used: worth keeping


def test_a_lookup_keeps_its_pages_until_the_lease_ends(stored: tuple[Side, Clock]) -> None:
    replica, clock = stored
    assert replica.find(KEYS) == [1, 2, 3]
    assert leased(replica) == 3
    crowd_out(replica)
    assert replica.find(KEYS) == [1, 2, 3]
    clock.now += LEASE_S + 1
    replica.linker._leases.expire()
    assert leased(replica) == 0
    replica.linker._stores.get("kv").store.check()


def test_each_lookup_renews_the_lease(stored: tuple[Side, Clock]) -> None:
    replica, clock = stored
    for _ in range(3):
        assert replica.find(KEYS) == [1, 2, 3]
        clock.now += LEASE_S - 1
        replica.linker._leases.expire()
        assert leased(replica) == 3


def test_the_watchdog_ends_leases(stored: tuple[Side, Clock]) -> None:
    replica, clock = stored
    replica.find(KEYS)
    clock.now += LEASE_S + 1
    assert wait_until(lambda: leased(replica) == 0, WAIT_S)


def test_a_lease_outlives_its_time_while_its_load_runs(stored: tuple[Side, Clock]) -> None:
    replica, clock = stored
    assert replica.find(KEYS) == [1, 2, 3]
    assert replica.linker.load("r", [transfer(KEYS, replica.tokens(4, 5, 6))])
    clock.now += 10 * LEASE_S
    replica.linker._leases.expire()
    assert leased(replica) == 3
    index = replica.linker.start_layer_wise_loading()
    assert replica.linker.finish_layer_wise_loading(index) is True
    assert leased(replica) == 3  # other ranks may still read
    clock.now += LOADED_S + 1
    replica.linker._leases.expire()
    assert leased(replica) == 0


def test_two_requests_keep_a_page_twice(stored: tuple[Side, Clock]) -> None:
    replica, _ = stored
    assert replica.find(KEYS, rid="a") == replica.find(KEYS, rid="b") == [1, 2, 3]
    replica.linker._leases.end("a")
    assert leased(replica) == 3
    replica.linker._leases.end("b")
    replica.linker._leases.end("b")
    assert leased(replica) == 0


def test_no_more_than_half_of_the_slots_can_be_leased(stored: tuple[Side, Clock]) -> None:
    replica, _ = stored
    count = replica.linker._stores.get("kv").store.tiers[0].slot_count
    keys = names(count, seed=8)
    replica.linker._stores.clear()
    for start in range(0, count, 4):
        replica.store(keys[start : start + 4], *range(1, 1 + len(keys[start : start + 4])))
    assert replica.find(keys) == list(range(1, count // 2 + 1))
    assert leased(replica) == count // 2
    assert replica.find(names(2, seed=8), rid="late") == []


def test_a_changed_prompt_keeps_what_it_still_names(stored: tuple[Side, Clock]) -> None:
    replica, _ = stored
    assert replica.find(KEYS) == [1, 2, 3]
    assert replica.find(KEYS[1:]) == [1, 2]
    assert replica.find([]) == []
    assert leased(replica) == 0


def test_what_is_not_there_leaves_no_lease(stored: tuple[Side, Clock]) -> None:
    replica, _ = stored
    assert replica.find(names(3, seed=9)) == []
    assert replica.find([*names(1, seed=9), *KEYS]) == []
    assert replica.linker._leases._by_request == {}


def test_nothing_is_read_from_disk_by_a_lookup(stored: tuple[Side, Clock]) -> None:
    replica, _ = stored
    mover = replica.linker._stores.get("kv").store.tiers[0]._mover
    before = mover.counts()
    replica.find(KEYS)
    assert mover.counts() == before


def test_the_page_before_is_known_from_lookups(stored: tuple[Side, Clock]) -> None:
    replica, _ = stored
    replica.find(KEYS)
    before = replica.linker._leases.page_before
    assert before(KEYS[1]) == bytes.fromhex(KEYS[0])
    assert before(KEYS[0]) is None


def test_a_rank_that_does_not_write_counts_what_the_writing_rank_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks of an MLA model: the writing one pins the pages that both answer."""
    geometry = Geometry(kind="mla")
    plain = linker_module._storage_config
    rank = 0

    def told(*args: Any) -> Any:
        made = plain(*args)
        made.tp_rank, made.tp_size = rank, 2
        return made

    monkeypatch.setattr(linker_module, "_storage_config", told)
    with side(tmp_path, geometry) as writer:
        rank = 1
        with side(tmp_path, geometry) as reader:
            assert writer.store(KEYS, 1, 2, 3)
            assert reader.store(names(2, seed=5), 1, 2)  # answered, and not written
            assert reader.linker._stores.get("kv").store.page_count() == 0
            assert wait_until(lambda: reader.find(KEYS) == [1, 2, 3], WAIT_S)
            assert writer.find(KEYS) == [1, 2, 3]
            assert (leased(writer), leased(reader)) == (3, 0)
            assert reader.restore(KEYS, 5, 6, 7)
            assert same(reader.rows(5, 6, 7), writer.rows(1, 2, 3))


def test_tiers_keep_pages_wherever_they_are(tmp_path: Path, shm_path: Path) -> None:
    tiers = [{"path": str(shm_path), "size": SMALL // 2}, {"path": str(tmp_path), "size": "8MB"}]
    geometry = Geometry()
    settings: dict[str, Any] = {"tiers": tiers}

    class Tiered(FlexKVLinker):
        """Two tiers."""

        def __init__(self, *args: Any, extra_config: Any, **more: Any) -> None:
            super().__init__(*args, extra_config=settings, **more)

    with side(tmp_path, geometry, Tiered) as replica:
        keys = names(12, seed=7)
        for start in range(0, 12, 4):
            assert replica.store(keys[start : start + 4], *range(start + 1, start + 5))
        assert replica.find(keys) == list(range(1, 13))
        levels = {
            level
            for pinned in replica.linker._leases._by_request["r"].pools.values()
            for level, _ in pinned.pages.values()
        }
        assert 1 in levels
        assert replica.restore(keys, *range(20, 32))
        assert same(replica.rows(*range(20, 32)), replica.rows(*range(1, 13)))
        replica.linker._leases.end_all()
        assert leased(replica) == 0
