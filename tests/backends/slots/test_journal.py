"""One owner's journal: append, rotate, recover, and what a reader makes of broken files."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexkv_sglang.backends.slots import journal as journal_module
from flexkv_sglang.backends.slots.journal import (
    JournalWriter,
    LiveState,
    generations,
    journal_path,
    keys_field,
    last_words,
    new_records,
    recover,
    snapshot_path,
)
from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    RECORD,
    RECORD_BYTES,
    RecordOp,
    Records,
    SlotClass,
)
from flexkv_sglang.errors import JournalError
from flexkv_sglang.types import PageKey
from stores.engines import keys

OWNER = "0123456789ab"
SLOTS = (SlotClass(4096, 4096, 8),)
KEYS = keys(16)


def put(slot: int, key: PageKey) -> Records:
    record = new_records(RecordOp.PUT, 1)
    record["slot"], record["key"], record["len"] = slot, keys_field([key]), 4096
    return record


def delete(slot: int, key: PageKey) -> Records:
    record = new_records(RecordOp.DEL, 1)
    record["slot"], record["key"] = slot, keys_field([key])
    return record


def writer(directory: Path) -> JournalWriter:
    return JournalWriter.create(directory, "ns", OWNER, SLOTS)


def holds(state: LiveState) -> dict[int, bytes]:
    return dict(zip(state.records["slot"].tolist(), state.records["key"].tolist(), strict=True))


def test_what_was_appended_is_recovered(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    journal.append(np.concatenate([put(0, KEYS[0]), put(1, KEYS[1]), put(2, KEYS[2])]))
    journal.append(np.concatenate([delete(1, KEYS[1]), put(1, KEYS[3])]))
    journal.append(delete(2, KEYS[2]))
    state = recover(tmp_path, OWNER, "ns")
    assert holds(state) == {0: KEYS[0], 1: KEYS[3]}
    assert not state.clean
    journal.close(clean=True)
    journal.close(clean=True)
    state = recover(tmp_path, OWNER, "ns")
    assert state.clean
    assert holds(state) == {0: KEYS[0], 1: KEYS[3]}


def test_clear_forgets_what_came_before(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    journal.append(
        np.concatenate([put(0, KEYS[0]), new_records(RecordOp.CLEAR, 1), put(1, KEYS[1])])
    )
    assert holds(recover(tmp_path, OWNER, "ns")) == {1: KEYS[1]}


def test_files_can_be_read_by_their_user_alone(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    journal.rotate(put(0, KEYS[0]))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_rotation_keeps_the_state_and_two_files(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    journal.append(np.concatenate([put(0, KEYS[0]), put(1, KEYS[1])]))
    for round_ in range(3):
        journal.rotate(recover(tmp_path, OWNER, "ns").records)
        journal.append(put(2 + round_, KEYS[2 + round_]))
    assert generations(tmp_path, OWNER) == [3]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{OWNER}.3.journal",
        f"{OWNER}.3.snap",
    }
    assert holds(recover(tmp_path, OWNER, "ns")) == {slot: KEYS[slot] for slot in range(5)}


@pytest.mark.parametrize("stop_at", ["snapshot", "journal", "seal", "unlink"])
def test_a_crash_inside_a_rotation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    journal = writer(tmp_path)
    journal.append(put(0, KEYS[0]))
    live = recover(tmp_path, OWNER, "ns").records
    steps = {
        "snapshot": (journal_module, "write_snapshot"),
        "journal": (journal_module, "_publish"),
        "seal": (JournalWriter, "append"),
        "unlink": (journal_module, "_unlink"),
    }

    def crash(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*steps[stop_at], crash)
        with pytest.raises(KeyboardInterrupt):
            journal.rotate(live)
    assert holds(recover(tmp_path, OWNER, "ns")) == {0: KEYS[0]}


def test_a_newer_generation_without_a_whole_snapshot_is_passed_over(tmp_path: Path) -> None:
    journal = writer(tmp_path)
    journal.append(put(0, KEYS[0]))
    old = journal_path(tmp_path, OWNER, 0).read_bytes()
    journal.rotate(recover(tmp_path, OWNER, "ns").records)
    journal_path(tmp_path, OWNER, 0).write_bytes(old)
    path = snapshot_path(tmp_path, OWNER, 1)
    damaged = bytearray(path.read_bytes())
    damaged[HEADER_BYTES + 9] ^= 1
    path.write_bytes(damaged)
    state = recover(tmp_path, OWNER, "ns")
    assert state.header.generation == 0
    assert holds(state) == {0: KEYS[0]}


def test_another_namespace_or_owner_is_refused(tmp_path: Path) -> None:
    writer(tmp_path).append(put(0, KEYS[0]))
    with pytest.raises(JournalError, match="belongs to ns"):
        recover(tmp_path, OWNER, "other")
    journal_path(tmp_path, OWNER, 0).rename(journal_path(tmp_path, "ba9876543210", 0))
    with pytest.raises(JournalError, match="belongs to ns"):
        recover(tmp_path, "ba9876543210", "ns")


@given(cut=st.integers(0, 6 * RECORD_BYTES))
def test_a_journal_cut_anywhere_is_recovered_and_written_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    directory = tmp_path_factory.mktemp("cut")
    journal = writer(directory)
    for slot in range(6):
        journal.append(put(slot, KEYS[slot]))
    os.truncate(journal.path, HEADER_BYTES + cut)
    state = recover(directory, OWNER, "ns")
    whole = cut // RECORD_BYTES
    assert holds(state) == {slot: KEYS[slot] for slot in range(whole)}
    again = JournalWriter(directory, state.header, position=state.end, seq=state.seq)
    again.append(put(7, KEYS[7]))
    assert holds(recover(directory, OWNER, "ns")) == {
        **{slot: KEYS[slot] for slot in range(whole)},
        7: KEYS[7],
    }


@contextmanager
def file_size_limit(bytes_: int) -> Iterator[None]:
    """Real short and failing writes: beyond this size write() is cut, then fails with EFBIG."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("room", [0, 1, RECORD_BYTES, RECORD_BYTES + 5])
def test_a_write_that_does_not_fit_leaves_none_of_its_records(tmp_path: Path, room: int) -> None:
    journal = writer(tmp_path)
    journal.append(put(0, KEYS[0]))
    with file_size_limit(journal.size + room), pytest.raises(JournalError):
        journal.append(np.concatenate([put(1, KEYS[1]), put(2, KEYS[2])]))
    assert journal.path.stat().st_size == journal.size
    assert holds(recover(tmp_path, OWNER, "ns")) == {0: KEYS[0]}
    journal.append(put(3, KEYS[3]))
    assert holds(recover(tmp_path, OWNER, "ns")) == {0: KEYS[0], 3: KEYS[3]}


def test_a_journal_that_cannot_be_cut_back_takes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = writer(tmp_path)

    def refuse(*_args: object) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        with file_size_limit(journal.size + 5), pytest.raises(JournalError):
            journal.append(put(0, KEYS[0]))
    with pytest.raises(JournalError, match="given up"):
        journal.append(put(0, KEYS[0]))
    assert holds(recover(tmp_path, OWNER, "ns")) == {}


commands = st.lists(
    st.tuples(
        st.sampled_from([RecordOp.PUT, RecordOp.DEL, RecordOp.CLEAR, RecordOp.CLOSE]),
        st.integers(0, 9),
        st.integers(0, 5),
    ),
    max_size=40,
)


@given(commands)
def test_last_words_are_those_of_a_reader_who_goes_record_by_record(
    script: list[tuple[RecordOp, int, int]],
) -> None:
    records = np.zeros(len(script), RECORD)
    expected: dict[int, bytes] = {}
    for row, (op, slot, key) in enumerate(script):
        records[row]["op"], records[row]["slot"] = op, slot
        records[row]["key"] = np.void(KEYS[key])
        if op == RecordOp.CLEAR:
            expected.clear()
        elif slot < SLOTS[0].slot_count and op in (RecordOp.PUT, RecordOp.DEL):
            expected.pop(slot, None)  # a later PUT is the younger one
            if op == RecordOp.PUT:
                expected[slot] = KEYS[key]
    header = journal_module.Header("ns", OWNER, 1, 0, 0, "", SLOTS)
    live = last_words(records, header)
    got = list(zip(live["slot"].tolist(), live["key"].tolist(), strict=True))
    assert got == list(expected.items())
