"""Backoff: pauses grow up to a limit, and a success makes the next one short again."""

from __future__ import annotations

from flexkv_sglang.backoff import Backoff


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pauses_grow_by_the_factor_up_to_the_limit_and_begin_again_after_a_success() -> None:
    backoff = Backoff(0.5, 5.0, factor=3.0)
    assert [backoff.failed() for _ in range(4)] == [0.5, 1.5, 4.5, 5.0]
    backoff.reset()
    assert [backoff.failed() for _ in range(2)] == [0.5, 1.5]
    assert Backoff(10.0, 5.0).failed() == 5.0, "the limit holds for the first one too"


def test_it_is_due_when_the_pause_is_over_and_a_success_does_not_end_a_pause() -> None:
    clock = _Clock()
    backoff = Backoff(2.0, 30.0, clock=clock)
    assert backoff.due
    backoff.failed()
    clock.now += 1.99
    assert not backoff.due
    backoff.reset()
    assert not backoff.due
    clock.now += 0.01
    assert backoff.due


def test_a_given_pause_takes_the_place_of_one_and_the_next_grows_all_the_same() -> None:
    clock = _Clock()
    backoff = Backoff(2.0, 30.0, clock=clock)
    assert backoff.failed(60.0) == 60.0
    clock.now += 59.0
    assert not backoff.due
    assert backoff.failed() == 4.0


def test_jitter_multiplies_each_pause_and_does_not_add_up() -> None:
    backoff = Backoff(1.0, 8.0, jitter=(0.75, 1.0))
    for expected in (1.0, 2.0, 4.0, 8.0, 8.0):
        assert 0.75 * expected <= backoff.failed() <= expected
    pauses = {Backoff(1.0, 1.0, jitter=(0.5, 1.5)).failed() for _ in range(50)}
    assert len(pauses) > 40, "they are random"
    assert min(pauses) < 0.9
    assert max(pauses) > 1.1


def test_a_pause_that_is_restarted_has_its_length_again() -> None:
    clock = _Clock()
    backoff = Backoff(1.0, 30.0, clock=clock)
    backoff.failed()
    clock.now += 0.9
    backoff.restart()
    clock.now += 0.9
    assert not backoff.due
    clock.now += 0.1
    assert backoff.due
    assert backoff.failed() == 2.0
