"""Interrupted adoptions must leave no traces. ``scripts/crash`` found each of these."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_sglang.backends import failpoints
from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.failpoints import Failpoint
from flexkv_sglang.backends.io.probe import probe_directory
from flexkv_sglang.backends.slots.journal import JournalWriter, recover
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.backends.slots.slot_file import OwnedStore
from stores.engines import keys, open_engine, page_memory, soon

PAGE = 4096
SLOTS = 16
ADOPTING = [p for p in Failpoint if Failpoint.PUBLISH_BEFORE <= p < Failpoint.CREATE_LOCKED]
ADOPTING.remove(Failpoint.ADOPT_UNLINK)  # passed only where two generations are left


class _Died(BaseException):
    """Stands for a kill: the product does not catch it."""


@pytest.fixture(autouse=True)
def _unarmed() -> Iterator[None]:
    yield
    failpoints.set_hook(None)


def die_at(wanted: Failpoint) -> None:
    def hook(point: Failpoint, fd: int, data: bytes) -> None:
        if point is wanted:
            raise _Died

    failpoints.set_hook(hook)


def stored(directory: Path, count: int, seed: int = 0) -> str:
    """A closed store with ``count`` pages in its first slots. Returns its owner."""
    engine = open_engine(directory, PAGE, SLOTS * PAGE)
    _, buffers = page_memory(count, PAGE, seed=seed)
    assert engine.put(keys(count, seed), buffers, None, soon()) == [True] * count
    owner = str(engine._tier.stores[0].lock.owner)
    engine.close()
    return owner


def adopt(directory: Path, owner: str, slots_max: int) -> None:
    mode = probe_directory(str(directory))
    with OwnerLock.try_take(directory, owner) or pytest.fail("locked") as lock:
        store, _ = OwnedStore.adopt(
            lock, "ns", PAGE, mode, slots_max=slots_max, accepted=ACCEPTED_KINDS["full"]
        )
        store.close()


@pytest.mark.parametrize("point", ADOPTING, ids=lambda point: point.name)
def test_dying_in_an_adoption_that_gives_up_slots_costs_those_slots_only(
    tmp_path: Path, point: Failpoint
) -> None:
    owner, directory = stored(tmp_path, 12), tmp_path / "ns"
    die_at(point)
    with pytest.raises(_Died):
        adopt(directory, owner, 8)
    failpoints.set_hook(None)
    adopt(directory, owner, 8)
    assert sorted(recover(directory, owner, "ns").records["slot"].tolist()) == list(range(8))
    assert (directory / f"{owner}.{PAGE}.slots").stat().st_size == 8 * PAGE
    kinds = sorted(
        path.name.rpartition(".")[2]
        for path in directory.glob(f"{owner}.*")
        if path.suffix != ".json"
    )
    assert kinds == ["journal", "lock", "slots", "snap"]


@pytest.mark.parametrize(
    "point", [p for p in Failpoint if p.name.startswith("ROTATE")], ids=lambda point: point.name
)
def test_dying_in_a_rotation_leaves_nothing_that_the_next_owner_does_not_remove(
    tmp_path: Path, point: Failpoint
) -> None:
    owner, directory = stored(tmp_path, 12), tmp_path / "ns"
    adopt(directory, owner, SLOTS)  # now there is a snapshot to leave behind
    state = recover(directory, owner, "ns")
    journal = JournalWriter(directory, state.header, position=state.end, seq=state.seq)
    die_at(point)
    with pytest.raises(_Died):
        journal.rotate(state.records)
    failpoints.set_hook(None)
    os.close(journal._fd)
    adopt(directory, owner, SLOTS)
    kinds = sorted(
        path.name.rpartition(".")[2]
        for path in directory.glob(f"{owner}.*")
        if path.suffix != ".json"
    )
    assert kinds == ["journal", "lock", "slots", "snap"]
    assert len(recover(directory, owner, "ns").records) == 12


def test_an_owner_that_died_during_its_creation_is_removed_even_if_no_slot_is_needed(
    tmp_path: Path,
) -> None:
    stored(tmp_path, 4)
    (tmp_path / "ns" / "0123456789ab.lock").touch()
    (tmp_path / "ns" / f"0123456789ab.{PAGE}.slots").write_bytes(bytes(PAGE))
    stored(tmp_path, 4)
    assert not list(tmp_path.rglob("0123456789ab.*"))


@pytest.mark.parametrize("point", [Failpoint.ROTATE_BEFORE, Failpoint.ROTATE_SNAPSHOT])
def test_dying_while_a_directory_is_brought_back_loses_nothing(
    tmp_path: Path, point: Failpoint
) -> None:
    owner, directory = stored(tmp_path, 12), tmp_path / "ns"
    engine = open_engine(tmp_path, PAGE, SLOTS * PAGE)
    live = recover(directory, owner, "ns").records
    die_at(point)
    with pytest.raises(_Died):
        engine._tier.stores[0].revive(live)
    failpoints.set_hook(None)
    assert len(recover(directory, owner, "ns").records) == 12
    engine.close()


def test_a_neighbour_does_not_trust_its_old_view_of_a_dead_owner(tmp_path: Path) -> None:
    """A kill between a rotation and the tombstone of a victim that the snapshot no longer had."""
    owner, directory = stored(tmp_path, 2), tmp_path / "ns"
    mode = probe_directory(str(directory))
    tail = NeighbourStore([(directory, mode)], "ns", PAGE, [], ACCEPTED_KINDS["full"])
    tail.scan()
    claims = tail.find(keys(2))
    assert tail.still_valid(claims) == [True, True]
    state = recover(directory, owner, "ns")
    journal = JournalWriter(directory, state.header, position=state.end, seq=state.seq)
    journal.rotate(state.records[:1])  # the second page is being evicted
    os.close(journal._fd)
    assert tail.still_valid(claims) == [True, True]  # rightly: its slot is not rewritten
    adopt(directory, owner, SLOTS)
    assert tail.still_valid(claims) == [False, False]
    tail.release(claims)
    tail.scan()
    assert (tail.prefix(keys(2)), len(tail)) == (1, 1)
    tail.close()


def test_a_page_found_in_two_adopted_stores_gets_a_tombstone_in_one(
    tmp_path: Path,
) -> None:
    """Without the tombstone the slot is rewritten while neighbours trust the old record."""
    for name in ("a", "b"):
        stored(tmp_path / name, 10)
    for path in (tmp_path / "b" / "ns").iterdir():
        path.rename(tmp_path / "a" / "ns" / path.name)
    engine = open_engine(tmp_path / "a", PAGE, 2 * SLOTS * PAGE)
    assert (len(engine._tier.stores), engine.page_count()) == (2, 10)
    directory = tmp_path / "a" / "ns"
    said = [len(recover(directory, owner, "ns").records) for owner in owners(directory)]
    assert sorted(said) == [0, 10]
    engine.close()
