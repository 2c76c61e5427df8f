"""Pages of other owners, found by tailing their journals: seen at once, never believed without a second look."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.slots.following.choice import Choice
from flexkv_sglang.backends.slots.journal import generations, journal_path
from flexkv_sglang.backends.slots.neighbours import NeighbourStore
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.backends.slots.space.places import prepare_directory
from flexkv_sglang.types import PageKey
from stores.engines import keys, open_engine, page_memory, soon, wait_until

PAGE = 8192
SIZE = 8 * PAGE


def look(directory: Path, namespace: str = "ns", payload: int = PAGE) -> NeighbourStore:
    """A store that owns nothing and tails everybody."""
    mode = prepare_directory(str(directory), "auto")
    store = NeighbourStore(
        [(directory / namespace, mode)], namespace, payload, [], ACCEPTED_KINDS["full"]
    )
    store.scan()
    return store


def prefix(store: NeighbourStore, wanted: list[PageKey]) -> int:
    """As a directory's thread does: look, then answer from memory."""
    store.poll()
    return store.prefix(wanted)


def test_a_committed_page_is_seen_at_the_next_look(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    store = look(tmp_path)
    assert prefix(store, keys(3)) == 0
    _source, buffers = page_memory(3, PAGE, seed=1)
    engine.put(keys(3), buffers, None, soon())
    assert wait_until(lambda: prefix(store, keys(3)) == 3)
    engine.clear()
    assert wait_until(lambda: prefix(store, keys(3)) == 0)
    store.close()
    engine.close()


def test_a_claim_is_no_longer_valid_once_its_slot_was_given_away(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    _source, buffers = page_memory(8, PAGE, seed=1)
    engine.put(keys(8), buffers, None, soon())
    store = look(tmp_path)
    claims = store.find(keys(8))
    assert store.still_valid(claims) == [True] * 8
    engine.put(keys(2, seed=9), buffers.take(slice(2)), None, soon())  # evicts the last two
    assert store.still_valid(claims) == [True] * 6 + [False] * 2
    engine.clear()
    assert store.still_valid(claims) == [False] * 8
    store.release(claims)
    store.close()
    engine.close()


def test_a_page_written_again_into_the_same_slot_is_another_page(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, PAGE)
    _source, buffers = page_memory(1, PAGE, seed=1)
    first, second = keys(1, seed=1), keys(1, seed=2)
    engine.put(first, buffers, None, soon())
    store = look(tmp_path)
    claims = store.find(first)
    engine.put(second, buffers, None, soon())
    engine.put(first, buffers, None, soon())  # same key, same slot, another life
    assert store.still_valid(claims) == [False]
    store.release(claims)
    store.close()
    engine.close()


def test_a_store_dropped_while_it_is_read_keeps_its_descriptor_until_the_lease_ends(
    tmp_path: Path,
) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    _source, buffers = page_memory(2, PAGE, seed=1)
    engine.put(keys(2), buffers, None, soon())
    store = look(tmp_path)
    claims = store.find(keys(2))
    fd = claims[0].journal.slots.fd
    engine.close()
    for path in (tmp_path / "ns").glob("*.journal"):
        path.unlink()
    assert store.still_valid(claims) == [False, False]
    assert len(store) == 0
    os.fstat(fd)  # still open
    store.release(claims)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    store.close()


def test_owners_of_another_namespace_or_page_size_are_not_neighbours(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE, namespace="other")
    _source, buffers = page_memory(1, PAGE, seed=1)
    engine.put(keys(1), buffers, None, soon())
    (tmp_path / "other").rename(tmp_path / "ns")  # as a wrong copy would
    store = look(tmp_path)
    assert store.neighbour_count == 0
    (tmp_path / "ns").rename(tmp_path / "other")
    wrong_size = look(tmp_path, "other", payload=2 * PAGE)
    assert wrong_size.neighbour_count == 0
    store.close()
    wrong_size.close()
    engine.close()


def test_a_journal_with_a_damaged_record_is_believed_up_to_it(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    _source, buffers = page_memory(4, PAGE, seed=1)
    engine.put(keys(4), buffers, None, soon())
    engine.close()
    (path,) = (tmp_path / "ns").glob("*.journal")
    raw = bytearray(path.read_bytes())
    raw[4096 + 2 * 64 + 40] ^= 1
    path.write_bytes(raw)
    store = look(tmp_path)
    assert prefix(store, keys(4)) == 2
    store.close()


def test_rotation_is_followed_without_reading_the_snapshot(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    _source, buffers = page_memory(4, PAGE, seed=1)
    engine.put(keys(2), buffers.take(slice(2)), None, soon())
    store = look(tmp_path)
    owned = engine._tier.stores[0]
    keys_, slots, parents = engine._pages.index.snapshot().by_age()
    owned.journal.rotate(engine._tier.snapshot_records(keys_, slots, parents, 0))
    for snapshot in (tmp_path / "ns").glob("*.snap"):
        snapshot.unlink()
    engine.put(keys(4)[2:], buffers.take(slice(2, 4)), keys(4)[1], soon())
    assert wait_until(lambda: prefix(store, keys(4)) == 4)
    assert store.neighbour_count == 1
    store.close()
    engine.close()


def test_a_neighbour_that_dies_and_is_adopted_is_followed(tmp_path: Path) -> None:
    first = open_engine(tmp_path, PAGE, SIZE)
    _source, buffers = page_memory(3, PAGE, seed=1)
    first.put(keys(3), buffers, None, soon())
    store = look(tmp_path)
    first.close()
    assert prefix(store, keys(3)) == 3  # nobody owns it, the pages are good
    second = open_engine(tmp_path, PAGE, SIZE)
    assert second.page_count() == 3
    more, more_buffers = page_memory(1, PAGE, seed=2)
    second.put(keys(1, seed=5), more_buffers, None, soon())
    assert wait_until(lambda: (store.scan(), prefix(store, keys(1, seed=5)))[1] == 1)
    assert prefix(store, keys(3)) == 3
    assert len(more)
    store.close()
    second.close()


CHURN = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from stores.engines import keys, open_engine, page_memory, soon
engine = open_engine(Path(sys.argv[1]), 65536, 8 * 65536)
memories = [page_memory(8, 65536, seed=100 + s) for s in range(4)]
print("ready", flush=True)
turn = 0
while True:
    engine.put(keys(8, seed=turn % 4), memories[turn % 4][1], None, soon())
    turn += 1
    time.sleep(turn % 5 * 0.0005)
"""


@pytest.mark.crash
@pytest.mark.parametrize("verify", ["full", "off"])
def test_reading_slots_that_another_process_rewrites_gives_right_pages_or_none(
    tmp_path: Path, verify: str
) -> None:
    """With ``verify`` off the second look at the journal is the only protection, and has to be enough."""
    support = str(Path(__file__).parents[2] / "support")
    program = CHURN.replace("8 * 65536)", f"8 * 65536, verify={verify!r})")
    expected = [page_memory(8, 65536, seed=100 + s)[0] for s in range(4)]
    right = lost = 0
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path), support], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "ready"
        reader = open_engine(tmp_path, 65536, 65536, verify=verify)
        try:
            for turn in range(20000):
                target, buffers = page_memory(8, 65536)
                done = reader.get(keys(8, seed=turn % 4), buffers, soon())
                for page, flag in enumerate(done):
                    if flag:
                        right += 1
                        assert np.array_equal(target[page], expected[turn % 4][page]), (turn, page)
                lost = reader._metrics.snapshot().get("neighbour_lost_pages", 0)
                if right > 200 and lost > 5:
                    break
        finally:
            child.send_signal(signal.SIGKILL)
            reader.close()
    assert right > 0, "nothing was ever read: the test shows nothing"
    assert lost > 0, "no page was ever caught by the second look: the test shows nothing"


def test_the_owner_name_of_a_journal_is_checked(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, SIZE)
    directory = tmp_path / "ns"
    (owner,) = owners(directory)
    assert generations(directory, owner) == [0]
    (directory / "aaaaaaaaaaaa.lock").touch()
    journal_path(directory, "aaaaaaaaaaaa", 0).write_bytes(
        journal_path(directory, owner, 0).read_bytes()
    )
    store = look(tmp_path)
    assert store.neighbour_count == 1
    store.close()
    engine.close()


def test_dead_owners_leave_descriptors_for_those_that_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (320, 320))  # ten places
    (tmp_path / "ns").mkdir()
    names = [f"{number:012x}" for number in range(30)]
    for name in names:
        (tmp_path / "ns" / f"{name}.lock").touch()
    lock = OwnerLock.try_take(tmp_path / "ns", names[-1])
    assert lock is not None
    choice = Choice()
    assert choice.of(tmp_path / "ns", names, 0) == [names[-1], *names[:4]]
    assert choice.of(tmp_path / "ns", names[4:-1], 5) == []
    lock.close()
    assert Choice().of(tmp_path / "ns", names[:5], 0) == names[:5]
