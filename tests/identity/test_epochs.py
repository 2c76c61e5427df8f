"""Stores leave and enter at the right time, for all orders of updates, sessions and flushes."""

from __future__ import annotations

import pytest

from flexkv_sglang.identity.epochs import Epoch, Weights


class Store:
    """Records the calls, with the epoch of each."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.open: Epoch | None = weights.epoch
        self.told: list[str] = []

    def leave_epoch(self) -> None:
        self.told.append("leave")
        self.open = None

    def enter_epoch(self) -> None:
        self.told.append("enter")
        self.open = self.open or self._weights.epoch


@pytest.fixture
def weights() -> Weights:
    return Weights()


@pytest.fixture
def store(weights: Weights) -> Store:
    made = Store(weights)
    weights.attach(made)
    return made


KNOWN = Epoch("files")


def test_an_update_with_a_flush_in_it_opens_the_next_namespace(
    weights: Weights, store: Store
) -> None:
    weights.begin()
    assert store.open is None
    weights.flushed()  # inside the update: the weights have no fingerprint yet
    assert store.open is None
    weights.finish(KNOWN, clean=False)
    assert store.open == KNOWN
    assert weights.settled


def test_without_a_flush_nothing_opens_until_one_comes(weights: Weights, store: Store) -> None:
    weights.begin()
    weights.finish(KNOWN, clean=False)
    assert store.open is None
    assert not weights.settled
    weights.flushed()
    assert store.open == KNOWN


def test_with_an_empty_cache_no_flush_is_needed(weights: Weights, store: Store) -> None:
    weights.begin()
    weights.finish(KNOWN, clean=True)
    assert store.open == KNOWN


def test_a_flush_before_the_last_of_two_updates_does_not_count(
    weights: Weights, store: Store
) -> None:
    weights.begin()
    weights.flushed()
    weights.finish(KNOWN, clean=False)
    weights.begin()
    weights.finish(KNOWN, clean=False)
    assert store.open is None


def test_inside_a_session_nothing_opens(weights: Weights, store: Store) -> None:
    weights.begin(session=True)
    weights.finish(Epoch(nonce="a"), clean=True)
    weights.begin()
    weights.flushed()
    weights.finish(Epoch(nonce="b"), clean=True)
    weights.flushed()
    assert store.open is None
    weights.begin()
    weights.end_session()
    weights.finish(Epoch(nonce="c"), clean=False)
    assert store.open is None, "requests may have run with half of the weights"
    weights.flushed()
    assert store.open == Epoch(nonce="c")


def test_changing_weights_have_no_fingerprint(weights: Weights, store: Store) -> None:
    before = weights.epoch
    weights.begin()
    first = weights.epoch
    weights.begin()
    assert len({before.nonce, first.nonce, weights.epoch.nonce}) == 3
    assert not weights.epoch.agreed


def test_a_refused_update_restores_the_former_state(weights: Weights, store: Store) -> None:
    weights.begin()
    weights.finish(KNOWN, clean=True)
    weights.begin()
    weights.unchanged()
    assert store.open == KNOWN
    weights.begin()
    weights.finish(Epoch("other"), clean=False)
    weights.begin()
    weights.unchanged()
    assert store.open is None, "the flush that the first one needs is still due"
    weights.flushed()
    assert store.open == Epoch("other")


def test_a_refused_update_in_a_session_leaves_the_weights_unknown(
    weights: Weights, store: Store
) -> None:
    weights.begin(session=True)
    weights.finish(Epoch(nonce="a"), clean=True)
    weights.begin()
    weights.unchanged()
    assert store.open is None
    assert weights.epoch.nonce not in ("", "a")


def test_removed_stores_are_not_called(weights: Weights, store: Store) -> None:
    other = Store(weights)
    weights.attach(other)
    weights.detach(store)
    weights.detach(store)
    weights.begin()
    weights.finish(KNOWN, clean=True)
    assert store.told == []
    assert other.told == ["leave", "enter"]
    del other
    assert not weights._stores


def test_a_flush_of_a_settled_process_lets_stores_try_again_to_open(
    weights: Weights, store: Store
) -> None:
    store.open = None
    weights.flushed()
    assert store.open == weights.epoch
