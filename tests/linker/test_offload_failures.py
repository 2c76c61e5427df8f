"""Offloads: one result each, in their order, whatever happens; and never the bytes of pages that were given back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import flexkv_sglang.linker.offload as module
from flexkv_bed.controller import Geometry, boot
from flexkv_bed.tiny_model import write_config
from flexkv_sglang.linker.linker import FlexKVLinker
from models.plain_pools import names
from sglang_bed.faulty_linker import Fault, faults_of, hold
from sglang_bed.linker_bed import WAIT_S, Side, same, side, transfer
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang]

A, B, C = (names(2, seed=seed) for seed in (1, 2, 3))


class Hasty(FlexKVLinker):
    """Half a second for an offload."""

    offload_seconds = 0.5


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


@pytest.fixture
def replica(tmp_path: Path) -> Iterator[Side]:
    with side(tmp_path, Geometry()) as made:
        yield made


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Side]:
    with side(tmp_path, Geometry(), Hasty) as made:
        yield made


def begin(replica: Side, keys: list[str], *pages: int) -> None:
    assert replica.linker.offload([transfer(keys, replica.tokens(*pages))])


def idle(replica: Side) -> bool:
    return wait_until(lambda: replica.linker._offloader._worker.wait_idle(0), WAIT_S)


def test_results_come_in_order_under_failures(replica: Side) -> None:
    gate = hold(replica.linker, "write")
    begin(replica, A, 1, 2)
    begin(replica, B, 3, 4)
    begin(replica, C, 5, 6)
    assert gate.arrived.wait(WAIT_S)
    assert replica.linker.num_completed_offloads() == 0
    assert replica.linker.pop_completed_offload() is False  # too early: no result is lost
    faults_of(replica.linker, "write")  # the gate stays in front of the first call
    gate.go_on.set()
    assert [replica.result() for _ in range(3)] == [True, True, True]
    assert replica.linker.num_completed_offloads() == 0


@pytest.mark.parametrize("fault", [Fault.BROKEN, Fault.EIO, Fault.NO_SPACE, Fault.SHORT])
def test_a_failed_write_is_not_stored_and_the_next_one_is(replica: Side, fault: Fault) -> None:
    faults_of(replica.linker, "write").next = fault
    begin(replica, A, 1, 2)
    begin(replica, B, 3, 4)
    assert [replica.result() for _ in range(2)] == [False, True]
    assert replica.find(A) in ([], [1])
    assert replica.find(B) == [1, 2]


def test_a_hanging_write_is_given_up_in_its_turn_with_one_result(hasty: Side) -> None:
    gate = hold(hasty.linker, "write")
    begin(hasty, A, 1, 2)
    assert gate.arrived.wait(WAIT_S)
    begin(hasty, B, 3, 4)
    assert [hasty.result() for _ in range(2)] == [False, False]
    hasty.fill(9)  # SGLang gives the slots to others
    gate.go_on.set()
    assert idle(hasty)
    assert hasty.linker.num_completed_offloads() == 0
    assert hasty.find(B) == []  # its pages were never read


def test_pages_of_a_given_up_offload_are_those_from_before(hasty: Side) -> None:
    """They were in staging already, so they may be stored late, and are right."""
    wanted = hasty.rows(1, 2)
    gate = hold(hasty.linker, "write")
    begin(hasty, A, 1, 2)
    assert gate.arrived.wait(WAIT_S)
    assert hasty.result() is False
    hasty.fill(9)
    gate.go_on.set()
    assert idle(hasty)
    if hasty.find(A):
        assert hasty.restore(A, 7, 8)
        assert same(hasty.rows(7, 8), wanted)


def test_a_given_up_offload_reads_no_further_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pages, one at a time: the first one was read, the slots of the others are reused by then."""
    monkeypatch.setattr(
        "flexkv_sglang.linker.staging.STAGING_BYTES", {"load": 1, "offload": 1, "backfill": 1}
    )
    keys = names(5, seed=4)
    with side(tmp_path, Geometry(), Hasty) as replica:
        wanted = replica.rows(1)
        gate = hold(replica.linker, "write")
        begin(replica, keys, 1, 2, 3, 4, 5)
        assert gate.arrived.wait(WAIT_S)
        assert replica.result() is False
        replica.fill(9)
        gate.go_on.set()
        assert idle(replica)
        assert replica.find(keys) == [1]
        assert replica.restore(keys[:1], 7)
        assert same(replica.rows(7), wanted)


def test_too_much_that_waits_is_refused_in_its_turn(
    replica: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = hold(replica.linker, "write")
    begin(replica, A, 1, 2)
    assert gate.arrived.wait(WAIT_S)
    monkeypatch.setattr(module, "WAITING_BYTES_MAX", 1)
    begin(replica, B, 3, 4)
    assert replica.linker.num_completed_offloads() == 0
    gate.go_on.set()
    assert [replica.result() for _ in range(2)] == [True, False]


def test_a_reset_waits_for_what_runs_and_forgets_its_result(replica: Side) -> None:
    begin(replica, A, 1, 2)
    begin(replica, B, 3, 4)
    replica.linker.reset()
    assert replica.linker.num_completed_offloads() == 0
    assert replica.find(A) == replica.find(B) == [1, 2]


def test_a_reset_gives_up_what_hangs(replica: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_sglang.linker.linker.QUIET_S", 0.2)
    gate = hold(replica.linker, "write")
    begin(replica, A, 1, 2)
    assert gate.arrived.wait(WAIT_S)
    begin(replica, B, 3, 4)
    replica.linker.reset()
    replica.fill(9)
    gate.go_on.set()
    assert idle(replica)
    assert replica.linker.num_completed_offloads() == 0
    assert replica.find(B) == []


def test_a_full_store_keeps_what_is_leased_and_says_what_it_took(tmp_path: Path) -> None:
    with side(tmp_path, Geometry(), size=16 * 12288) as small:
        slots = small.linker._stores.get("kv").store.tiers[0].slot_count
        assert small.store(A, 1, 2)
        assert small.find(A) == [1, 2]
        wanted = small.rows(1, 2)
        for seed in range(10, 10 + slots):
            small.store(names(2, seed=seed), 3, 4)
        assert small.restore(A, 7, 8)
        assert same(small.rows(7, 8), wanted)
