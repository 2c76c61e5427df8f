"""A weight update of a hybrid model: all pools move together, with files, size and calls in flight."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.cache.assembly import open_tiers
from flexkv_sglang.identity.epochs import WEIGHTS, Epoch
from models.plain_pools import Pool, ask, hybrid, names, pool_of, put, store_of, transfer
from sglang_bed.weight_updater import forget_updates

pytestmark = pytest.mark.sglang

POOLS = ("kv", "indexer", "mamba")
SIZE = 16_000_000
KEYS = names(4)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test here is about time limits, and each begins with the weights of the start."""
    monkeypatch.setattr("flexkv_sglang.integration.storage.READ_SECONDS_MIN", 8.0)
    monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 20.0)
    forget_updates()
    yield
    forget_updates()


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[FlexKVStorage]:
    made = hybrid(tmp_path)
    yield made
    made.close()


def update(epoch: Epoch, *, clean: bool = True) -> None:
    WEIGHTS.begin()
    WEIGHTS.finish(epoch, clean=clean)


def nonce(text: str) -> Epoch:
    return Epoch("", text)


def namespaces(storage: FlexKVStorage) -> dict[str, str]:
    return {name: _open(storage, name).spec.identity.namespace for name in POOLS}


def found(storage: FlexKVStorage) -> dict[str, list[bool]]:
    """Ask each pool alone, so that none hides behind another. For a False no bytes may move."""
    answer = {}
    for name in POOLS:
        pool = pool_of(storage, name)
        targets = pool.indices(*range(10, 10 + len(KEYS)))
        answer |= storage.batch_get_v2([transfer(name, KEYS, targets)])
    return answer


def on_disk(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob("*.slots"))


def described(place: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in place.rglob("NAMESPACE.json")]


@pytest.mark.parametrize("epoch", [Epoch("other weights"), nonce("n")], ids=["files", "nonce"])
def test_all_pools_move_and_no_old_page_of_any_is_hit(
    tmp_path: Path, storage: FlexKVStorage, epoch: Epoch
) -> None:
    put(storage, KEYS)
    before, slots = (
        namespaces(storage),
        {n: store_of(storage, n).tiers[0].slot_count for n in POOLS},
    )
    update(epoch)
    after = namespaces(storage)
    assert all(after[name] != before[name] for name in POOLS)
    assert ask(storage, KEYS).kv_hit_pages == 0
    assert found(storage) == {name: [False] * len(KEYS) for name in POOLS}
    assert {n: store_of(storage, n).tiers[0].slot_count for n in POOLS} == slots
    assert on_disk(tmp_path) <= SIZE
    put(storage, KEYS)
    assert ask(storage, KEYS).kv_hit_pages == len(KEYS)
    for fields in described(tmp_path):
        if fields["namespace"] in after.values():
            assert fields["epoch"] == epoch.nonce
            if fields["pool"] == "kv":
                assert {claim["name"] for claim in fields["pools"]} == set(POOLS)


def test_in_between_every_pool_misses_and_nothing_is_written(
    tmp_path: Path, storage: FlexKVStorage
) -> None:
    put(storage, KEYS)
    WEIGHTS.begin()
    for _ in ("while weights change", "stale"):
        assert found(storage) == {name: [False] * len(KEYS) for name in POOLS}
        assert storage.batch_exists(KEYS) == 0
        kv, mamba = pool_of(storage, "kv"), pool_of(storage, "mamba")
        assert not any(storage.batch_set_v1(KEYS, kv.indices(0, 1, 2, 3)))
        late = [transfer("mamba", KEYS[3:], mamba.indices(3))]
        assert storage.batch_set_v2(late) == {"mamba": [False]}
        WEIGHTS.finish(nonce("n"), clean=False)
    WEIGHTS.flushed()
    assert found(storage) == {name: [False] * len(KEYS) for name in POOLS}
    assert all(store_of(storage, name).page_count() == 0 for name in POOLS)
    assert on_disk(tmp_path) <= SIZE


def test_the_same_weights_again_keep_the_pages_of_all_pools(storage: FlexKVStorage) -> None:
    update(Epoch("files"))
    put(storage, KEYS)
    before = namespaces(storage)
    update(Epoch("files"))
    assert namespaces(storage) == before
    assert ask(storage, KEYS).kv_hit_pages == len(KEYS)


def test_many_updates_leave_nothing_behind(tmp_path: Path, storage: FlexKVStorage) -> None:
    for number in range(4):
        update(nonce(str(number)))
        put(storage, KEYS)
        assert on_disk(tmp_path) <= SIZE
    assert len(described(tmp_path)) <= 2 * len(POOLS)  # of the start, and of now


def test_a_pool_that_comes_after_an_update_leaves_the_others_their_pages(
    storage: FlexKVStorage,
) -> None:
    """Stores are closed and opened again; their files are those of weights without a name, but of the present."""
    update(nonce("n"))
    put(storage, KEYS)
    storage.register_mem_host_pool_v2(Pool(512, seed=7), "draft")
    assert ask(storage, KEYS).kv_hit_pages == len(KEYS)
    assert _open(storage, "draft").spec.identity.epoch == "n"


def test_a_pool_that_comes_during_an_update_opens_with_the_others(storage: FlexKVStorage) -> None:
    WEIGHTS.begin()
    storage.register_mem_host_pool_v2(Pool(512, seed=7), "draft")
    for pool in storage._stores._pools.values():
        assert pool is not None
        assert pool.store is None
    WEIGHTS.finish(nonce("n"), clean=True)
    assert {_open(storage, n).spec.identity.epoch for n in (*POOLS, "draft")} == {"n"}


def test_a_store_attached_before_the_flush_opens_all_pools_with_it(
    tmp_path: Path, storage: FlexKVStorage, caplog: pytest.LogCaptureFixture
) -> None:
    put(storage, KEYS)
    storage.close()
    update(nonce("n"), clean=False)
    with caplog.at_level(logging.WARNING):
        late = hybrid(tmp_path)
    assert "until the cache is flushed" in caplog.text
    assert found(late) == {name: [False] * len(KEYS) for name in POOLS}
    WEIGHTS.flushed()
    assert {_open(late, name).spec.identity.epoch for name in POOLS} == {"n"}
    put(late, KEYS)
    assert ask(late, KEYS).kv_hit_pages == len(KEYS)
    late.close()


def test_a_call_that_began_before_the_update_never_writes_into_the_new_namespace(
    storage: FlexKVStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs between two pools, through the update and the flush. The first call after it opens the stores."""
    monkeypatch.setattr("flexkv_sglang.pools.stores._SUSPEND_S", 0.05)
    monkeypatch.setattr("flexkv_sglang.pools.stores._EXCHANGE_S", 0.05)
    reached, go_on, answers = threading.Event(), threading.Event(), []
    mamba, indexer = pool_of(storage, "mamba"), pool_of(storage, "indexer")

    class Slow:
        name, host_indices = "mamba", mamba.indices(3)

        @property
        def keys(self) -> list[str]:
            if threading.current_thread() is thread and answers == ["started"]:
                answers.append("waited")
                reached.set()
                go_on.wait(30)
            return KEYS[3:]

    def write() -> None:
        transfers = [transfer("indexer", KEYS[:1], indexer.indices(0)), Slow()]
        answers.append("started")
        answers.append(storage.batch_set_v2(transfers))

    thread = threading.Thread(target=write)
    thread.start()
    assert reached.wait(30)
    update(nonce("n"))
    storage._stores._opener.join(30)
    assert all(storage._stores.get(name) is None for name in POOLS), "not while that call runs"
    go_on.set()
    thread.join(30)
    assert answers[-1] == {"indexer": [True], "mamba": [False]}
    assert storage.batch_exists(KEYS) == 0
    assert {_open(storage, name).spec.identity.epoch for name in POOLS} == {"n"}
    assert found(storage) == {name: [False] * len(KEYS) for name in POOLS}


def test_files_that_were_being_opened_for_the_old_weights_are_not_used_for_the_new_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes longer to open Mamba's files than the whole update takes."""
    for name in ("_SUSPEND_S", "_EXCHANGE_S", "_OPEN_S"):
        monkeypatch.setattr(f"flexkv_sglang.pools.stores.{name}", 0.05)
    before = hybrid(tmp_path)
    put(before, KEYS)
    before.close()
    storage = hybrid(tmp_path, fires=False)
    reached, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        opened = open_tiers(*args)
        if args[3]["pool"] == "mamba" and not args[3]["epoch"]:
            reached.set()
            assert go_on.wait(30)
        return opened

    monkeypatch.setattr("flexkv_sglang.pools.stores.open_tiers", slow)
    assert storage.batch_exists(KEYS) == 0
    assert reached.wait(30)
    update(nonce("n"))
    go_on.set()
    storage._stores._opener.join(30)
    monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 20.0)
    mamba = pool_of(storage, "mamba")
    with storage._stores._gate.shared(30):  # a call that began a moment ago
        assert storage._stores.get("mamba") is None
    last = transfer("mamba", KEYS[3:], mamba.indices(10))
    assert storage.batch_get_v2([last]) == {"mamba": [False]}
    put(storage, KEYS)
    assert ask(storage, KEYS).kv_hit_pages == len(KEYS)
    assert {_open(storage, name).opened_as.epoch for name in POOLS} == {"n"}
    storage.close()


def test_calls_of_all_pools_in_flight_during_updates_give_right_pages_or_none(
    storage: FlexKVStorage,
) -> None:
    """A reader runs on while epochs change; every byte of a page names the weights it was written with."""
    generation, stop, wrong = [0], threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            for name in POOLS:
                pool, newest = pool_of(storage, name), None
                oldest = generation[0]
                targets = pool.indices(*range(100, 104))
                flags = storage.batch_get_v2([transfer(name, KEYS, targets)])[name]
                newest = generation[0]
                for row, flag in zip(range(100, 104), flags, strict=True):
                    values = set(pool.rows[row].tolist()) if flag else {newest}
                    if len(values) != 1 or not oldest - 1 <= min(values) <= newest:
                        wrong.append(f"{name}: {values} of {oldest} to {newest}")

    thread = threading.Thread(target=read)
    thread.start()
    try:
        for number in range(1, 8):
            WEIGHTS.begin()
            for name in POOLS:
                pool_of(storage, name).rows[:4] = number
            generation[0] = number
            WEIGHTS.finish(nonce(str(number)), clean=True)
            put(storage, KEYS)
    finally:
        stop.set()
        thread.join(30)
    assert wrong == []


def _open(storage: FlexKVStorage, name: str) -> Any:
    pool = storage._stores.get(name)
    assert pool is not None, name
    return pool
