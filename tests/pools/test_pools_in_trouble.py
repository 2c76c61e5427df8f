"""Pools of hybrid models that cannot be stored or opened, and calls that come while files are exchanged."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.cache.assembly import open_tiers
from flexkv_sglang.integration.storage import CALL_SECONDS_MAX
from flexkv_sglang.pools import stores as pools
from flexkv_sglang.threads import OVERDUE_S
from models.plain_pools import (
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

pytestmark = pytest.mark.sglang

BEFORE_A_CALL_S = pools._OPEN_S + pools._EXCHANGE_S


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
    assert "mamba" in unstored(tmp_path)  # a trace beside the log
    without = attach(config(tmp_path), Pool(seed=1), {})
    assert unstored(tmp_path) == {}
    assert without.batch_exists(keys) == 2
    without.close()


def unstored(place: Path) -> dict[str, str]:
    """The pools that are not stored, from NAMESPACE.json of the KV pages."""
    noted = [json.loads(path.read_text()) for path in place.rglob("NAMESPACE.json")]
    (kv,) = (fields for fields in noted if fields["pool"] == "kv")
    found: dict[str, str] = kv.get("unstored", {})
    return found


def test_a_pool_that_is_stored_again_is_not_reported_any_more(tmp_path: Path) -> None:
    hybrid(tmp_path, size=3 * 4096).close()
    assert unstored(tmp_path).keys() == {"mamba"}
    assert unstored(tmp_path)["mamba"].startswith("size: ")
    hybrid(tmp_path).close()
    assert unstored(tmp_path) == {}


def test_an_unknown_hit_policy_is_logged_once(
    storage: FlexKVStorage, caplog: pytest.LogCaptureFixture
) -> None:
    keys = names(2)
    put(storage, keys)
    asked = transfer("indexer", [])
    asked.hit_policy = "every_other_page"
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            assert storage.batch_exists_v2(keys, [asked]).kv_hit_pages == 0
    assert caplog.text.count("indexer: hit policy 'every_other_page' is not known") == 1


def test_a_size_too_small_for_all_pools_is_logged_and_misses(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR):
        storage = hybrid(tmp_path, size=3 * 4096)
    assert "host pool mamba is not stored, prefixes that need it miss: size: " in caplog.text
    assert ask(storage, names(2)).kv_hit_pages == 0
    assert storage.batch_exists(names(2)) == 0
    storage.close()


def test_a_disk_that_does_not_open_keeps_no_call_and_no_detach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The opening that hangs goes on alone; when it ends at last, nothing stays open."""
    monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 0.05)
    monkeypatch.setattr("flexkv_sglang.pools.stores._EXCHANGE_S", 0.05)
    reached, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        return open_tiers(*args)

    storage = hybrid(tmp_path, fires=False)
    monkeypatch.setattr("flexkv_sglang.pools.stores.open_tiers", slow)
    keys = names(2)
    assert storage.batch_exists(keys) == 0  # opens the sidecars
    assert reached.wait(30)
    assert storage.batch_get_v1(keys, pool_of(storage, "kv").indices(0, 1)) == [False, False]
    assert ask(storage, keys).kv_hit_pages == 0
    storage.close()
    go_on.set()
    storage._stores._opener.join(30)
    for pool in storage._stores._pools.values():
        assert pool is not None
        assert pool.store is None
    monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 20.0)
    again = hybrid(tmp_path)
    put(again, keys)
    again.close()


def test_a_pool_that_is_replaced_while_its_files_are_opened_keeps_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 0.05)
    monkeypatch.setattr("flexkv_sglang.pools.stores._EXCHANGE_S", 0.05)
    reached, go_on = threading.Event(), threading.Event()

    def slow(*args: Any) -> Any:
        opened = open_tiers(*args)
        if args[3]["pool"] == "mamba" and not go_on.is_set():
            reached.set()
            assert go_on.wait(30)
        return opened

    storage = hybrid(tmp_path, fires=False)
    monkeypatch.setattr("flexkv_sglang.pools.stores.open_tiers", slow)
    assert storage.batch_exists(names(1)) == 0
    assert reached.wait(30)
    old = storage._stores._pools["mamba"]
    storage.register_mem_host_pool_v2(Pool(512, seed=3), "mamba")
    go_on.set()
    storage._stores._opener.join(30)
    assert old is not None
    assert old.store is None
    monkeypatch.setattr("flexkv_sglang.pools.stores._OPEN_S", 20.0)
    put(storage, names(2))
    assert ask(storage, names(2)).kv_hit_pages == 2
    storage.close()


def test_a_clear_while_files_are_exchanged_is_not_lost(
    storage: FlexKVStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.pools.stores._EXCHANGE_S", 0.05)
    keys = names(3)
    put(storage, keys)
    with storage._stores._gate.exclusive(10):
        storage.clear()
    assert ask(storage, keys).kv_hit_pages == 0
    for name in ("kv", "indexer", "mamba"):
        assert store_of(storage, name).page_count() == 0
    put(storage, keys)  # once, not for ever
    assert ask(storage, keys).kv_hit_pages == 3


def test_a_clear_while_weights_change_reaches_the_files_that_come_back(
    storage: FlexKVStorage,
) -> None:
    keys = names(3)
    put(storage, keys)
    storage.leave_epoch()
    storage.clear()
    storage.enter_epoch()  # the update was refused: the same namespaces
    assert ask(storage, keys).kv_hit_pages == 0
    put(storage, keys)
    assert ask(storage, keys).kv_hit_pages == 3


@pytest.mark.parametrize("keys", [None, [None], [7]])
def test_nonsense_is_answered_in_the_right_shape(storage: FlexKVStorage, keys: Any) -> None:
    """None where a list is expected, keys that are no text."""
    count = len(keys or ())
    assert storage.batch_get_v1(keys, None) == [False] * count
    assert storage.batch_set_v1(keys, None) == [False] * count
    assert storage.batch_get(keys, None) == [None] * count
    assert storage.batch_exists(keys) == 0
    assert storage.batch_exists_v2(keys, None).kv_hit_pages == 0
    for transfers in (None, [transfer("mamba", keys)]):
        answer = {"mamba": [False] * count} if transfers else {}
        assert storage.batch_get_v2(transfers) == answer  # type: ignore[arg-type]
        assert storage.batch_set_v2(transfers) == answer  # type: ignore[arg-type]


def test_a_call_and_its_waits_fit_into_the_time_of_a_detach() -> None:
    """SGLang joins its threads for 10 s. A put may leave a write, and then its record, each late by that much."""
    assert BEFORE_A_CALL_S + CALL_SECONDS_MAX + 2 * OVERDUE_S < 10
    assert CALL_SECONDS_MAX + 2 * OVERDUE_S < pools._SUSPEND_S < 10
