"""Loads that cannot succeed: reported as failed, in time, and no wrong byte reaches a slot SGLang goes on with."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flexkv_bed.controller import Geometry, boot
from flexkv_bed.storage import flip_bytes
from flexkv_bed.tiny_model import write_config
from flexkv_sglang.linker.linker import FlexKVLinker
from flexkv_sglang.linker.load import LoadTimes
from models.plain_pools import names
from sglang_bed.faulty_linker import Fault, faults_of, hold
from sglang_bed.linker_bed import WAIT_S, Side, same, side, transfer
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang]

KEYS = names(3)


class Hasty(FlexKVLinker):
    """Half a second for a load. Only for loads that cannot end: a busy machine may need longer for others."""

    load_times = LoadTimes(base=0.5, per_page=0.0, most=0.5)


@pytest.fixture(scope="module", autouse=True)
def _booted(tmp_path_factory: pytest.TempPathFactory) -> None:
    boot(write_config(tmp_path_factory.mktemp("model")))


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[Side]:
    """A replica that has stored three pages."""
    with side(tmp_path, Geometry()) as made:
        assert made.store(KEYS, 1, 2, 3)
        yield made


@pytest.fixture
def hasty(tmp_path: Path) -> Iterator[Side]:
    """The same, in a hurry."""
    with side(tmp_path, Geometry(), Hasty) as made:
        assert made.store(KEYS, 1, 2, 3)
        yield made


def slot_files(place: Path) -> list[Path]:
    return sorted(place.rglob("*.slots"))


def test_a_corrupt_page_fails_the_load_and_touches_no_slot(stored: Side, tmp_path: Path) -> None:
    assert stored.find(KEYS) == [1, 2, 3]
    for path in slot_files(tmp_path):
        assert flip_bytes(path)
    before = [buffer.clone() for buffer in stored.buffers]
    assert stored.restore(KEYS, 5, 6, 7) is False
    assert same(stored.buffers, before)
    assert stored.linker.metrics.snapshot()["linker_failed_loads"] == 1
    assert stored.find(KEYS) == []
    assert stored.store(KEYS, 1, 2, 3)
    assert stored.restore(KEYS, 5, 6, 7)


def test_a_page_that_failed_one_request_is_no_hit_for_another_that_leased_it(
    stored: Side, tmp_path: Path
) -> None:
    assert stored.find(KEYS, rid="a") == stored.find(KEYS, rid="b") == [1, 2, 3]
    for path in slot_files(tmp_path):
        assert flip_bytes(path)
    assert stored.restore(KEYS, 5, 6, 7, rid="a") is False
    assert stored.find(KEYS, rid="b") == []


def test_a_page_lost_between_lookup_and_load_fails_the_load(stored: Side) -> None:
    assert stored.find(KEYS) == [1, 2, 3]
    stored.linker._stores.clear()
    assert stored.restore(KEYS, 5, 6, 7) is False


def test_one_lost_page_fails_its_batch_and_no_other(stored: Side) -> None:
    good, bad = names(2, seed=4), names(2, seed=5)
    assert stored.store(good, 8, 9)
    for rid, keys in (("good", good), ("bad", bad)):
        assert stored.linker.load(rid, [transfer(keys, stored.tokens(5, 6) + (rid == "bad") * 64)])
    assert (
        stored.linker.finish_layer_wise_loading(stored.linker.start_layer_wise_loading()) is False
    )
    assert stored.restore(good, 5, 6)
    assert same(stored.rows(5, 6), stored.rows(8, 9))


def test_two_requests_of_one_batch_may_want_the_same_pages(stored: Side) -> None:
    for rid, page in (("a", 5), ("b", 8)):
        slots = stored.tokens(page, page + 1, page + 2)
        assert stored.linker.load(rid, [transfer(KEYS, slots)])
    assert stored.linker.finish_layer_wise_loading(stored.linker.start_layer_wise_loading())
    assert same(stored.rows(5, 6, 7), stored.rows(1, 2, 3))
    assert same(stored.rows(8, 9, 10), stored.rows(1, 2, 3))


def test_a_read_error_fails_the_load(stored: Side) -> None:
    faults_of(stored.linker, "read").next = Fault.BROKEN
    assert stored.restore(KEYS, 5, 6, 7) is False


def test_a_hanging_disk_releases_the_forward_pass_and_writes_nothing_afterwards(
    hasty: Side,
) -> None:
    gate = hold(hasty.linker, "read")
    index = hasty.begin(KEYS, 5, 6, 7)
    assert gate.arrived.wait(WAIT_S)
    counter = hasty.linker.layer_done_counter
    counter.set_consumer(index)
    waiting = threading.Thread(target=counter.wait_until, args=(0,))
    waiting.start()
    waiting.join(WAIT_S)  # the watchdog ended it: finish was not called
    assert not waiting.is_alive()
    assert hasty.linker.finish_layer_wise_loading(index) is False
    hasty.poison()  # the slots are somebody else's now
    before = [buffer.clone() for buffer in hasty.buffers]
    gate.go_on.set()
    assert wait_until(lambda: hasty.linker._loader._worker.wait_idle(0), WAIT_S)
    assert same(hasty.buffers, before)


def test_finishing_waits_no_longer_than_the_deadline(hasty: Side) -> None:
    gate = hold(hasty.linker, "read")
    hasty.linker._watch.stop()  # no watchdog
    index = hasty.begin(KEYS, 5, 6, 7)
    assert hasty.linker.finish_layer_wise_loading(index) is False
    gate.go_on.set()


def test_loads_behind_a_hanging_one_fail_at_their_own_deadline(hasty: Side) -> None:
    gate = hold(hasty.linker, "read")
    first, second = hasty.begin(KEYS, 5, 6, 7), hasty.begin(KEYS, 8, 9, 10, rid="s")
    assert hasty.linker.finish_layer_wise_loading(first) is False
    assert hasty.linker.finish_layer_wise_loading(second) is False
    gate.go_on.set()
    assert wait_until(lambda: hasty.linker._loader._worker.wait_idle(0), WAIT_S)
    hasty.linker._loader._times = LoadTimes()
    assert hasty.restore(KEYS, 5, 6, 7)


def test_many_chunks_are_double_buffered_and_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five pages through two rows; a bad one in the middle fails the load."""
    monkeypatch.setattr(
        "flexkv_sglang.linker.staging.STAGING_BYTES", {"load": 1, "offload": 1, "backfill": 1}
    )
    keys = names(5, seed=6)
    with side(tmp_path, Geometry()) as replica:
        assert len(replica.linker._staging["kv"]._rows["load"]) == 2
        assert replica.store(keys, 1, 2, 3, 4, 5)
        assert replica.restore(keys, 9, 8, 7, 6, 10)
        assert same(replica.rows(9, 8, 7, 6, 10), replica.rows(1, 2, 3, 4, 5))
        faults = faults_of(replica.linker, "read")
        faults.rng.seed(1)
        faults.next = Fault.CORRUPT
        assert replica.restore(keys, 9, 8, 7, 6, 10) is False


def test_a_queued_load_can_be_cancelled_once_and_a_started_one_not(stored: Side) -> None:
    linker = stored.linker
    assert stored.find(KEYS, rid="a")
    assert linker.load("a", [transfer(KEYS, stored.tokens(5, 6, 7))])
    assert linker.load("a", [transfer(KEYS, stored.tokens(5, 6, 7))]) is False
    assert linker.cancel_queued_load("a") is True
    assert linker.cancel_queued_load("a") is False
    assert linker._leases.leased_pages() == 0
    assert linker.start_layer_wise_loading() == -1
    index = stored.begin(KEYS, 5, 6, 7, rid="b")
    assert linker.cancel_queued_load("b") is False
    assert linker.finish_layer_wise_loading(index) is True
    assert linker.finish_layer_wise_loading(index) is False  # not a batch any more
    assert linker.finish_layer_wise_loading(-1) is False  # a start that failed


def test_indices_that_are_no_whole_pages_are_refused_alike_on_every_rank(stored: Side) -> None:
    short = [transfer(KEYS, stored.tokens(5, 6, 7)[:-1])]
    assert stored.linker.load("r", short) is False
    assert stored.linker.offload(short) is False
    assert stored.linker.load("r", [transfer([], torch.empty(0, dtype=torch.int64))]) is False


def test_a_reset_ends_what_runs_and_what_waits_and_can_be_repeated(stored: Side) -> None:
    gate = hold(stored.linker, "read")
    index = stored.begin(KEYS, 5, 6, 7)
    assert gate.arrived.wait(WAIT_S)
    assert stored.linker.load("waiting", [transfer(KEYS, stored.tokens(8, 9, 10))])
    before = [buffer.clone() for buffer in stored.buffers]
    stored.linker.reset()
    stored.linker.reset()
    gate.go_on.set()
    assert stored.linker.start_layer_wise_loading() == -1
    assert stored.linker.finish_layer_wise_loading(index) is False
    assert wait_until(lambda: stored.linker._loader._worker.wait_idle(0), WAIT_S)
    assert same(stored.buffers, before)
    assert stored.find(KEYS) == [1, 2, 3]
    assert stored.restore(KEYS, 5, 6, 7)


def test_closing_is_bounded_can_be_repeated_and_leaves_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flexkv_sglang.linker.linker.QUIET_S", 0.2)
    with side(tmp_path, Geometry(), Hasty) as replica:
        assert replica.store(KEYS, 1, 2, 3)
        gate = hold(replica.linker, "read")
        index = replica.begin(KEYS, 5, 6, 7)
        assert gate.arrived.wait(WAIT_S)
        started = time.monotonic()
        replica.linker.close()
        replica.linker.close()
        assert time.monotonic() - started < WAIT_S
        gate.go_on.set()
        assert replica.find(KEYS) == []
        assert replica.linker.finish_layer_wise_loading(index) is False
        assert replica.linker.load("r", [transfer(KEYS, replica.tokens(5, 6, 7))])
        late = replica.linker.start_layer_wise_loading()
        assert replica.linker.finish_layer_wise_loading(late) is False
        assert replica.store(KEYS, 1, 2, 3) is False
        replica.linker.reset()


def test_nothing_is_raised_into_sglang(stored: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("planted")

    linker = stored.linker
    for part in ("answer", "expire"):
        monkeypatch.setattr(linker._leases, part, broken)
    for part in ("queue", "start", "finish", "cancel", "follow_layer", "fail_overdue"):
        monkeypatch.setattr(linker._loader, part, broken)
    for part in ("accept", "pop"):
        monkeypatch.setattr(linker._offloader, part, broken)
    slots = stored.tokens(5, 6, 7)
    assert stored.find(KEYS) == []
    assert linker.load("r", [transfer(KEYS, slots)]) is False
    assert linker.start_layer_wise_loading() == -1
    assert linker.finish_layer_wise_loading(0) is False
    assert linker.cancel_queued_load("r") is False
    assert linker.offload([transfer(KEYS, slots)]) is True  # as on the other ranks
    assert linker.num_completed_offloads() == 1
    assert linker.pop_completed_offload() is False
    linker._follow_layer(0, 0)
    counted = linker.metrics.snapshot()
    assert {"lookup_exceptions", "load_exceptions", "offload_exceptions"} <= counted.keys()
    monkeypatch.undo()
