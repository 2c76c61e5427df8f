"""Writer and reader of other nodes' sets on real files: nodes, sets, takeover, a silent agent, a full disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flexkv_sglang.backends.fleet.replica import files as replica_files
from flexkv_sglang.backends.fleet.replica.files import Entry, Peer, PeersTable, SetPlace, open_set
from flexkv_sglang.backends.fleet.replica.fingerprint_set import record_count
from flexkv_sglang.backends.fleet.replica.reader import PeerSetsReader
from flexkv_sglang.backends.fleet.replica.writer import PeerSetsWriter
from flexkv_sglang.backends.fleet.vocabulary import NodeId, Op, Snapshot
from flexkv_sglang.errors import PeerError
from nodes.replicas import OTHER, RNG, SPACE, A, B, C, fill, no_peer, open_reader, pages


def node_ids(reader: PeerSetsReader) -> list[str]:
    reader.refresh()
    return [peer.node_id for peer in reader.peers()]


def let_look(reader: PeerSetsReader) -> None:
    """End the pauses between looks at the file system."""
    reader._look_at_ns = reader._retry_at_ns = 0
    reader.refresh()


@pytest.fixture
def writer(shm_path: Path) -> Iterator[PeerSetsWriter]:
    made = PeerSetsWriter(shm_path)
    yield made
    made.close()


def test_without_files_there_are_no_peers(tmp_path: Path) -> None:
    reader = open_reader(tmp_path / "absent")
    assert not reader.alive
    assert reader.peers() == ()
    assert reader.run(pages(3), no_peer) is None
    assert not reader.holds(pages(3), no_peer).any()
    assert reader.page_count() == 0
    fill(PeerSetsWriter(tmp_path / "absent"), A, fingerprints := pages(3))
    let_look(reader)
    assert reader.run(fingerprints, no_peer) == (Peer(0, A, 7, "a:1"), 3)
    reader.close()
    assert reader.run(fingerprints, no_peer) is None


def test_a_change_is_seen_without_a_refresh(shm_path: Path, writer: PeerSetsWriter) -> None:
    fill(writer, A, fingerprints := pages(100))
    reader, more = open_reader(shm_path), pages(50)
    writer.apply(SPACE, A, Op.ADD, more)
    assert reader.holds(more, no_peer).all()
    writer.apply(SPACE, A, Op.DROP, fingerprints[:10])
    assert reader.holds(fingerprints, no_peer).tolist() == [False] * 10 + [True] * 90
    assert reader.page_count() == writer.pages(A) == 140
    writer.apply(SPACE, A, Op.HEARTBEAT, more[:0])
    assert reader.page_count() == 140


def test_a_set_follows_through_many_files(shm_path: Path, writer: PeerSetsWriter) -> None:
    fill(writer, A, pages(0))
    reader, held = open_reader(shm_path), set[int]()
    for number in range(40):
        fingerprints = pages(300)
        writer.apply(SPACE, A, Op.ADD, fingerprints)
        held.update(fingerprints.tolist())
        gone = fingerprints[: number * 5]
        writer.apply(SPACE, A, Op.DROP, gone)
        held.difference_update(gone.tolist())
        reader.refresh()
        asked = RNG.permutation(np.concatenate([fingerprints, pages(100)]))
        assert reader.holds(asked, no_peer).tolist() == [fp in held for fp in asked.tolist()]
    assert 4 * record_count(0) < 40 * 300
    assert len(list((shm_path / SPACE).glob("p0.*.set"))) > 4
    writer.tick()
    assert len(list((shm_path / SPACE).glob("p0.*.set"))) == 1
    assert reader.page_count() == len(held)


def test_reset_clear_and_drop(shm_path: Path, writer: PeerSetsWriter) -> None:
    first, second = pages(10), pages(20)
    fill(writer, A, first)
    reader = open_reader(shm_path)
    writer.reset(SPACE, A, Snapshot(8, 0, second))
    reader.refresh()
    assert not reader.holds(first, no_peer).any()
    assert reader.holds(second, no_peer).all()
    writer.apply(SPACE, A, Op.CLEAR, first[:0])
    writer.apply(SPACE, A, Op.ADD, first)
    reader.refresh()
    assert reader.holds(first, no_peer).all()
    assert not reader.holds(second, no_peer).any()
    writer.drop(SPACE, A)
    writer.apply(SPACE, A, Op.ADD, second)  # ignored until the next reset
    reader.refresh()
    assert not reader.holds(np.concatenate([first, second]), no_peer).any()
    assert node_ids(reader) == ["a"]
    writer.reset(SPACE, A, Snapshot(8, 0, np.concatenate([second, second[:3]])))  # not even sorted
    reader.refresh()
    assert reader.page_count() == 20


def test_namespaces_are_apart(shm_path: Path, writer: PeerSetsWriter) -> None:
    reader, other = open_reader(shm_path), open_reader(shm_path, OTHER)
    fill(writer, A, mine := pages(5))
    fill(writer, A, theirs := pages(5), OTHER)
    for one, yes, no in ((reader, mine, theirs), (other, theirs, mine)):
        one.refresh()
        assert one.holds(yes, no_peer).all()
        assert not one.holds(no, no_peer).any()
    writer.remove_peer(A)
    assert node_ids(reader) == node_ids(other) == []
    assert reader.run(mine, no_peer) is None


def test_down_removed_and_a_slot_that_changes_hands(shm_path: Path, writer: PeerSetsWriter) -> None:
    fill(writer, A, fingerprints := pages(5))
    reader = open_reader(shm_path)
    writer.set_peer(A, 9, "elsewhere:2", up=False)
    assert node_ids(reader) == []
    assert reader.run(fingerprints, no_peer) is None
    writer.set_peer(A, 9, "elsewhere:2", up=True)
    reader.refresh()
    assert reader.run(fingerprints, no_peer) == (Peer(0, A, 9, "elsewhere:2"), 5)
    writer.remove_peer(A)
    writer.remove_peer(A)
    fill(writer, B, other := pages(5))
    assert node_ids(reader) == ["b"]
    assert not reader.holds(fingerprints, no_peer).any()
    assert reader.run(other, no_peer) == (Peer(0, B, 7, "b:1"), 5)


def test_a_set_of_another_tenancy_is_not_taken(shm_path: Path, writer: PeerSetsWriter) -> None:
    fill(writer, A, fingerprints := pages(5))
    reader = open_reader(shm_path)
    entry = reader._entries[0]
    place = SetPlace(shm_path / SPACE, 0, entry.tenancy, 1)
    assert open_set(place) is not None
    assert open_set(SetPlace(shm_path / SPACE, 0, entry.tenancy + 1, 1)) is None
    # the slot changes hands after the reader has read the nodes, and before it reads the sets
    table = reader._table
    assert table is not None
    writer.remove_peer(A)
    fill(writer, B, other := pages(5))
    reader._follow_sets(table, time.monotonic_ns())
    reader._make_view()
    assert reader.run(other, no_peer) is None
    # the reader has read the new node, and not yet its set
    assert reader._follow_entries(table)
    reader._make_view()
    assert reader.run(fingerprints, no_peer) is None
    let_look(reader)
    assert reader.run(other, no_peer) == (Peer(0, B, 7, "b:1"), 5)
    assert reader.run(fingerprints, no_peer) is None


def test_the_longest_run_wins_and_is_exact(shm_path: Path, writer: PeerSetsWriter) -> None:
    chain = RNG.permutation(pages(128))
    fill(writer, A, np.unique(chain[:40]))
    fill(writer, B, np.unique(chain[:90]))
    fill(writer, C, np.unique(chain[1:]))
    reader = open_reader(shm_path)
    assert reader.run(chain, no_peer) == (Peer(1, B, 7, "b:1"), 90)
    assert reader.run(chain, lambda peer: peer.node_id == B) == (Peer(0, A, 7, "a:1"), 40)
    assert reader.run(chain[1:], no_peer) == (Peer(2, C, 7, "c:1"), 127)
    assert reader.run(chain[:0], no_peer) is None


def test_holes_are_found_at_all_places(shm_path: Path, writer: PeerSetsWriter) -> None:
    chain = RNG.permutation(pages(128))
    fill(writer, A, np.unique(chain))
    reader = open_reader(shm_path)
    for hole in range(128):
        writer.apply(SPACE, A, Op.DROP, chain[hole : hole + 1])
        answer = reader.run(chain, no_peer)
        assert (answer[1] if answer else 0) == hole
        writer.apply(SPACE, A, Op.ADD, chain[hole : hole + 1])


def test_runs_agree_with_the_definition(shm_path: Path, writer: PeerSetsWriter) -> None:
    pool, held = pages(300), {}
    for node_id in (A, B, C):
        own = np.sort(RNG.choice(pool, 270, replace=False))
        fill(writer, node_id, own)
        held[node_id] = set(own.tolist())
    reader = open_reader(shm_path)
    for _ in range(300):
        asked, skipped = RNG.choice(pool, RNG.integers(1, 40)), RNG.choice([A, B, C, "none"])
        runs = {}
        for node_id in {A, B, C} - {skipped}:
            flags = [fp in held[node_id] for fp in asked.tolist()]
            runs[node_id] = flags.index(False) if False in flags else len(flags)
        answer = reader.run(asked, lambda peer, no=skipped: peer.node_id == no)  # type: ignore[misc]
        best = max(runs.values())
        if not best:
            assert answer is None
        else:
            assert answer is not None
            assert answer[1] == runs[answer[0].node_id] == best


def test_of_equal_peers_the_last_answer_wins(shm_path: Path, writer: PeerSetsWriter) -> None:
    both, only_b = pages(20), pages(5)
    fill(writer, A, both)
    fill(writer, B, np.unique(np.concatenate([both, only_b])))
    reader = open_reader(shm_path)
    first = reader.run(both, no_peer)
    assert first is not None
    assert reader.run(only_b, no_peer) == (Peer(1, B, 7, "b:1"), 5)
    again = reader.run(both, no_peer)
    assert again is not None
    assert (first[0].node_id, again[0].node_id) == (A, B)


def test_a_silent_agent_is_ignored_and_comes_back(shm_path: Path, writer: PeerSetsWriter) -> None:
    fill(writer, A, fingerprints := pages(5))
    reader = open_reader(shm_path)
    table = PeersTable.open(shm_path, writable=True)
    assert table is not None
    for heartbeat in (
        time.monotonic_ns() - 31_000_000_000,
        time.monotonic_ns() + 3_600_000_000_000,
        0,
    ):
        table.heartbeat_ns = heartbeat
        reader.refresh()
        assert not reader.alive
        assert reader.peers() == ()
        assert reader.run(fingerprints, no_peer) is None
        assert not reader.holds(fingerprints, no_peer).any()
    writer.heartbeat()
    assert reader.alive
    assert reader.run(fingerprints, no_peer) == (Peer(0, A, 7, "a:1"), 5)


def test_the_next_writer_takes_over(shm_path: Path) -> None:
    old = PeerSetsWriter(shm_path)
    fill(old, A, before := pages(50))
    reader = open_reader(shm_path)
    (shm_path / "agent.lock").touch()
    (shm_path / SPACE / "someone").touch()
    new = PeerSetsWriter(shm_path)
    assert reader.holds(before, no_peer).all()  # mapped sets stay usable until the next refresh
    reader.refresh()
    assert reader.alive
    assert reader.peers() == ()
    fill(new, B, after := pages(50))
    assert node_ids(reader) == ["b"]
    assert reader.holds(after, no_peer).all()
    assert not reader.holds(before, no_peer).any()
    left = sorted(path.name for path in (shm_path / SPACE).iterdir())
    assert left == ["index", "p0.1.set", "someone"]
    assert (shm_path / "agent.lock").exists()
    fill(old, A, before)  # a writer that was taken for dead: its table has no readers
    reader.refresh()
    assert not reader.holds(before, no_peer).any()


def test_a_new_writer_removes_what_a_crash_left_of_new_files(shm_path: Path) -> None:
    fill(PeerSetsWriter(shm_path), A, pages(5))
    hexes = "0123456789abcdef"
    stale = [shm_path / f"peers.tbl.{hexes}.tmp", shm_path / SPACE / f"index.{hexes}.tmp"]
    stale.append(shm_path / SPACE / f"p0.1.set.{hexes}.tmp")
    for path in stale:
        path.write_bytes(b"half")
    PeerSetsWriter(shm_path)
    assert not [path for path in stale if path.exists()]


def test_a_table_in_a_new_directory_is_found(shm_path: Path) -> None:
    """The old table cannot be marked as retired: the directory was removed."""
    old = PeerSetsWriter(shm_path / "run")
    reader = open_reader(shm_path / "run")
    (shm_path / "run").rename(shm_path / "away")
    fill(PeerSetsWriter(shm_path / "run"), A, fingerprints := pages(5))
    old._table.heartbeat_ns = time.monotonic_ns() - 2_000_000_000
    let_look(reader)
    assert reader.holds(fingerprints, no_peer).all()


def test_the_old_entry_counts_while_a_new_one_is_being_written(
    shm_path: Path, writer: PeerSetsWriter
) -> None:
    writer.set_peer(A, 1, "a:1", up=True)
    reader = open_reader(shm_path)
    table = PeersTable.open(shm_path, writable=True)
    assert table is not None
    entry = table.entry(0)
    assert entry is not None
    torn = bytearray(Entry(2, entry.tenancy, replica_files.UP, Peer(0, A, 2, "b:2")).pack())
    torn[100] ^= 1
    at = replica_files._ENTRIES_AT
    table._memory[at : at + len(torn)] = bytes(torn)
    table._versions[0] = 2
    reader.refresh()
    assert reader.peers() == (Peer(0, A, 1, "a:1"),)
    assert open_reader(shm_path).peers() == ()
    writer.set_peer(A, 3, "c:3", up=True)
    reader.refresh()
    assert reader.peers() == (Peer(0, A, 3, "c:3"),)


def test_names_of_any_length_and_no_more_nodes_than_slots(writer: PeerSetsWriter) -> None:
    writer.set_peer(NodeId("n" * 200), 1, "h" * 273 + ":65535", up=True)
    with pytest.raises(PeerError, match="too long"):
        writer.set_peer(NodeId("ü" * 101), 1, "h:1", up=True)
    for number in range(replica_files.SLOTS - 1):
        writer.set_peer(NodeId(f"n{number}"), (1 << 64) - 1, "h:1", up=True)
    with pytest.raises(PeerError, match="no room"):
        writer.set_peer(A, 1, "h:1", up=True)
    writer.reset(SPACE, A, Snapshot(1, 0, pages(3)))
    writer.remove_peer(NodeId("n5"))
    writer.set_peer(A, 1, "h:1", up=True)


def test_a_lookup_opens_no_file_and_no_socket(shm_path: Path, writer: PeerSetsWriter) -> None:
    for node_id in (A, B, C):
        fill(writer, node_id, pages(3000))
    reader, events = open_reader(shm_path), []
    armed = [True]
    sys.addaudithook(lambda event, _: events.append(event) if armed else None)
    for _ in range(20):
        reader.refresh()
        reader.run(pages(128), no_peer)
    armed.clear()
    assert [event for event in events if event.startswith(("socket", "open", "os.", "mmap"))] == []


def test_an_unusable_directory_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PeerError, match="cannot keep the sets of other nodes"):
        PeerSetsWriter(tmp_path / "file" / "run")
