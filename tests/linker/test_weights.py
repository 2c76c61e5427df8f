"""Weight updates: pages of the old weights are never found again, and none is stored under the new name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_bed.controller import Geometry, boot
from flexkv_bed.tiny_model import write_config
from flexkv_sglang.identity.epochs import WEIGHTS, Epoch
from models.plain_pools import names
from sglang_bed.faulty_linker import hold
from sglang_bed.linker_bed import WAIT_S, Side, same, side, transfer
from sglang_bed.weight_updater import forget_updates

pytestmark = [pytest.mark.sglang]

KEYS = names(3)
NEW = Epoch("", "n" * 32)


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Side]:
    """Three pages of the old weights, and a request that waits to load them."""
    forget_updates()
    with side(tmp_path, Geometry()) as made:
        assert made.store(KEYS, 1, 2, 3)
        assert made.find(KEYS) == [1, 2, 3]
        yield made
    forget_updates()


def test_after_an_update_and_a_flush_old_pages_miss_and_new_ones_are_found(stored: Side) -> None:
    WEIGHTS.begin()
    assert stored.find(KEYS) == []
    assert stored.store(KEYS, 4, 5, 6) is False
    WEIGHTS.finish(NEW, clean=False)
    assert stored.find(KEYS) == []  # the device may hold KV cache of the old weights
    assert stored.store(KEYS, 4, 5, 6) is False
    stored.linker.reset()  # SGLang's flush
    assert stored.find(KEYS) == []
    assert stored.store(KEYS, 7, 8, 9)
    assert stored.find(KEYS) == [1, 2, 3]
    assert stored.restore(KEYS, 10, 11, 12)
    assert same(stored.rows(10, 11, 12), stored.rows(7, 8, 9))


def test_a_flush_in_the_middle_of_an_update_is_remembered(stored: Side) -> None:
    WEIGHTS.begin()
    stored.linker.reset()
    assert stored.find(KEYS) == []
    WEIGHTS.finish(NEW, clean=False)
    assert stored.store(KEYS, 7, 8, 9)
    assert stored.find(KEYS) == [1, 2, 3]


def test_a_refused_update_changes_nothing(stored: Side) -> None:
    WEIGHTS.begin()
    WEIGHTS.unchanged()
    assert stored.find(KEYS) == [1, 2, 3]


def test_a_load_accepted_before_an_update_fails_after_it(stored: Side) -> None:
    assert stored.linker.load("r", [transfer(KEYS, stored.tokens(4, 5, 6))])
    WEIGHTS.begin()
    before = stored.rows(4, 5, 6)
    index = stored.linker.start_layer_wise_loading()
    assert stored.linker.finish_layer_wise_loading(index) is False
    assert same(stored.rows(4, 5, 6), before)


def test_an_offload_that_waits_is_not_stored_under_the_new_weights(
    stored: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.pools.stores._SUSPEND_S", 0.2)
    early, late = names(2, seed=1), names(2, seed=2)
    gate = hold(stored.linker, "write")
    for keys in (early, late):
        assert stored.linker.offload([transfer(keys, stored.tokens(4, 5))])
    assert gate.arrived.wait(WAIT_S)
    WEIGHTS.begin()
    WEIGHTS.finish(NEW, clean=True)
    gate.go_on.set()
    assert [stored.result() for _ in range(2)][1] is False
    assert stored.store(KEYS, 7, 8, 9)  # it is open again
    assert stored.find(late) == stored.find(early) == []


def test_a_linker_made_after_an_update_waits_for_the_flush(tmp_path: Path) -> None:
    forget_updates()
    WEIGHTS.begin()
    WEIGHTS.finish(NEW, clean=False)
    try:
        with side(tmp_path, Geometry()) as replica:
            assert replica.store(KEYS, 1, 2, 3) is False
            assert replica.find(KEYS) == []
            replica.linker.reset()
            assert replica.store(KEYS, 1, 2, 3)
            assert replica.find(KEYS) == [1, 2, 3]
    finally:
        forget_updates()
