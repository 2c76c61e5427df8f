"""Breaker: opens on repeated failures, closes after a probe, waits longer each time."""

from __future__ import annotations

from flexkv_sglang.backends.slots.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_three_failed_calls_in_a_row_open_it_and_a_good_page_starts_the_count_anew() -> None:
    breaker = Breaker(Clock())
    assert [breaker.record(0, 5, "EIO") for _ in range(2)] == [False, False]
    breaker.record(1, 127)  # a bad sector among good ones
    assert [breaker.record(0, 5, "EIO") for _ in range(3)] == [False, False, True]
    assert breaker.is_open
    assert not breaker.is_readable
    assert breaker.reason == "EIO"
    assert not breaker.record(0, 1), "it opens once"


def test_a_call_without_pages_says_nothing() -> None:
    breaker = Breaker(Clock())
    assert not any(breaker.record(0, 0) for _ in range(10))
    assert not breaker.is_open


def test_one_probe_at_a_time_and_each_failure_doubles_the_pause() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    assert not breaker.begin_probe(), "it is closed"
    breaker.trip("gone")
    pauses = []
    for _ in range(7):
        began = clock.now
        while not breaker.begin_probe():
            clock.now += 0.5
        assert not breaker.begin_probe(), "somebody probes already"
        pauses.append(clock.now - began)
        breaker.end_probe(healthy=False)
    assert pauses == [1, 2, 4, 8, 16, 30, 30]
    clock.now += 30
    assert breaker.begin_probe()
    breaker.end_probe(healthy=True)
    assert not breaker.is_open
    breaker.trip("gone again")
    clock.now += 1
    assert breaker.begin_probe(), "the pause is short again"


def test_a_full_disk_stays_readable_until_reads_fail_as_well() -> None:
    breaker = Breaker(Clock())
    assert breaker.trip("journal", readable=True)
    assert breaker.is_open
    assert breaker.is_readable
    assert not breaker.trip("journal", readable=True)
    assert [breaker.record(0, 1, "EIO") for _ in range(3)] == [False, False, True]
    assert not breaker.is_readable
    assert not breaker.trip("journal", readable=True), "it does not become readable by that"
    assert not breaker.is_readable


def test_a_directory_that_stops_to_be_readable_is_probed_a_whole_pause_later() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.trip("full", readable=True)
    clock.now += 0.9
    breaker.trip("EIO")
    clock.now += 0.9
    assert not breaker.begin_probe()
    clock.now += 0.1
    assert breaker.begin_probe()


def test_reads_and_writes_are_counted_apart() -> None:
    breaker = Breaker(Clock())
    for _ in range(2):
        assert not breaker.record(0, 5, "EROFS", writing=True)
        assert not breaker.record(5, 0)
        assert not breaker.record(0, 5, "EIO")
        assert not breaker.record(5, 0, writing=False)
    assert breaker.record(0, 5, "EROFS", writing=True), "no read says that writing works"
    assert breaker.is_open
    assert breaker.is_readable


def test_a_probe_that_can_only_read_leaves_it_open_and_readable() -> None:
    clock = Clock()
    breaker = Breaker(clock)
    breaker.trip("a transfer hangs")
    clock.now += 1
    assert breaker.begin_probe()
    breaker.end_probe(healthy=False, readable=True, reason="EROFS")
    assert breaker.is_open
    assert breaker.is_readable
    assert breaker.reason == "EROFS"
    assert [breaker.record(0, 1, "EIO") for _ in range(3)] == [False, False, True]
    assert not breaker.is_readable
