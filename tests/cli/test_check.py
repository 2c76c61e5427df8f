"""``flexkv check``, as a command, on directories that real engines made and something damaged."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexkv_sglang.backends.slots.journal import JournalWriter, keys_field, new_records, recover
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.backends.slots.records import RecordOp
from stores.command import die_after_put, flexkv
from stores.engines import keys, open_engine, page_memory, soon

PAGE = 8192


def only(directory: Path, pattern: str) -> Path:
    (path,) = (directory / "ns").glob(pattern)
    return path


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def slot_of(directory: Path, key: bytes) -> int:
    (owner,) = owners(directory / "ns")
    state = recover(directory / "ns", owner, "ns")
    return int(state.records["slot"][state.records["key"].tolist().index(key)])


def found(fields: Any) -> set[str]:
    return {item["what"] for owner in fields["owners"] for item in owner["findings"]}


def assert_healed(directory: Path, pages: int) -> None:
    """Nothing left to say, and an engine serves exactly the pages that were kept."""
    after = flexkv("check", directory, "--json")
    assert after.code == 0, after.text
    assert found(after.json) == set()
    assert after.json["owners"][0]["pages"] == pages
    engine = open_engine(directory, PAGE, 64 * PAGE)
    assert engine.page_count() == pages
    engine.check()
    engine.close()


def test_a_clean_directory_has_no_problems(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    output = flexkv("check", tmp_path)
    assert output.code == 0
    assert "1 owner, 20 pages" in output.text
    assert "0 problems" in output.text
    assert flexkv("check", tmp_path / "ns", "--json").json["owners"][0]["pages"] == 20


@pytest.mark.parametrize("verify", ["full", "sampled"])
def test_corrupt_pages_are_found_and_dropped_and_the_others_stay(
    tmp_path: Path, verify: str
) -> None:
    die_after_put(tmp_path, PAGE, 20, verify=verify)
    for row in (3, 11):
        damage(only(tmp_path, "*.slots"), slot_of(tmp_path, keys(20)[row]) * PAGE + 100)
    before = {path: path.read_bytes() for path in (tmp_path / "ns").iterdir()}
    output = flexkv("check", tmp_path, "--json")
    assert output.code == 1
    assert found(output.json) == {"corrupt_pages"}
    assert output.json["owners"][0]["bad_pages"] == 2
    assert {path: path.read_bytes() for path in (tmp_path / "ns").iterdir()} == before
    assert flexkv("check", tmp_path, "--repair", "--json").code == 0
    after = flexkv("check", tmp_path, "--json")
    assert after.code == 0
    engine = open_engine(tmp_path, PAGE, 64 * PAGE, verify=verify)
    assert engine.page_count() == 18
    assert [engine.prefix([key]) for key in keys(20)] == [int(i not in (3, 11)) for i in range(20)]
    engine.close()


def test_exchanged_slots_are_found_although_every_byte_is_a_page_of_ours(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 4)
    path = only(tmp_path, "*.slots")
    data = bytearray(path.read_bytes())
    data[0:PAGE], data[PAGE : 2 * PAGE] = data[PAGE : 2 * PAGE], data[0:PAGE]
    path.write_bytes(data)
    assert flexkv("check", tmp_path, "--json").json["owners"][0]["bad_pages"] == 2


def test_a_torn_tail_is_cut_off(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    with only(tmp_path, "*.journal").open("ab") as file:
        file.write(b"\x01" * 100)
    output = flexkv("check", tmp_path, "--json")
    assert (output.code, found(output.json)) == (1, {"torn_tail"})
    assert flexkv("check", tmp_path, "--repair").code == 0
    assert_healed(tmp_path, 20)


def test_a_flipped_bit_inside_the_journal_says_what_is_lost(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    damage(only(tmp_path, "*.journal"), 4096 + 64 * 15 + 40)
    output = flexkv("check", tmp_path)
    assert output.code == 1
    assert "4 whole records behind the first wrong one are lost" in output.text
    assert flexkv("check", tmp_path, "--repair").code == 0
    assert_healed(tmp_path, 15)


def test_leftovers_are_notes_and_repair_removes_what_is_ours(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 8)
    first = only(tmp_path, "*.journal")
    old = first.read_bytes()
    open_engine(tmp_path, PAGE, 64 * PAGE).close()  # adopts: generation 1
    first.write_bytes(old)  # as if generation 0 had not been unlinked
    owner = owners(tmp_path / "ns")[0]
    (tmp_path / "ns" / f"{owner}.2.snap.tmp").write_bytes(b"half")
    (tmp_path / "ns" / "readme.txt").write_text("mine")
    (tmp_path / "other.txt").write_text("mine")
    output = flexkv("check", tmp_path, "--json")
    assert output.code == 0
    assert found(output.json) == {"stale_generation", "temporary"}
    assert len(output.json["findings"]) == 2  # the two files that are not ours
    assert flexkv("check", tmp_path, "--repair").code == 0
    assert not list(tmp_path.rglob("*.tmp"))
    assert not first.exists()
    assert (tmp_path / "ns" / "readme.txt").exists()
    assert_healed(tmp_path, 8)


def test_a_newer_generation_that_is_not_valid_is_a_problem(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 8)
    journal = only(tmp_path, "*.0.journal")
    shutil.copy(journal, journal.with_name(journal.name.replace(".0.", ".7.")))
    assert found(flexkv("check", tmp_path, "--json").json) == {"bad_generation", "stale_generation"}
    assert flexkv("check", tmp_path, "--repair").code == 0
    assert_healed(tmp_path, 8)


def test_a_journal_of_another_model_is_not_ours(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 8)
    (tmp_path / "ns").rename(tmp_path / "copied")
    output = flexkv("check", tmp_path, "--json")
    assert (output.code, found(output.json)) == (1, {"no_valid_journal"})
    assert flexkv("check", tmp_path, "--repair").code == 1  # nothing to repair it with


def test_a_slot_file_that_was_cut_keeps_the_pages_it_still_has(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    with only(tmp_path, "*.slots").open("r+b") as file:
        file.truncate(12 * PAGE + 5)
    output = flexkv("check", tmp_path, "--json")
    assert found(output.json) == {"short_slot_file", "unreadable_pages"}
    assert output.json["owners"][0]["bad_pages"] == 8
    assert flexkv("check", tmp_path, "--repair").code == 0
    with only(tmp_path, "*.slots").open("r+b") as file:
        file.truncate(12 * PAGE)  # the half slot at the end is only a note
    assert_healed(tmp_path, 12)


def test_a_key_in_two_slots_is_dropped_once(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 4)
    (owner,) = owners(tmp_path / "ns")
    state = recover(tmp_path / "ns", owner, "ns")
    path = only(tmp_path, "*.slots")
    data = bytearray(path.read_bytes())
    data[10 * PAGE : 11 * PAGE] = data[:PAGE]
    path.write_bytes(data)
    journal = JournalWriter(tmp_path / "ns", state.header, position=state.end, seq=state.seq)
    again = new_records(RecordOp.PUT, 1)
    again[:] = state.records[state.records["slot"] == 0]
    again["slot"] = 10
    journal.append(again)
    journal.close(clean=False)
    output = flexkv("check", tmp_path, "--json")
    assert found(output.json) == {"double_keys"}
    assert output.json["owners"][0]["bad_pages"] == 1
    assert flexkv("check", tmp_path, "--repair").code == 0
    assert_healed(tmp_path, 4)


def test_records_for_slots_that_do_not_exist(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 4)
    (owner,) = owners(tmp_path / "ns")
    state = recover(tmp_path / "ns", owner, "ns")
    journal = JournalWriter(tmp_path / "ns", state.header, position=state.end, seq=state.seq)
    wild = new_records(RecordOp.PUT, 1)
    wild["slot"], wild["key"], wild["len"] = 1000, keys_field(keys(1, 9)), PAGE
    journal.append(wild)
    journal.close(clean=False)
    assert found(flexkv("check", tmp_path, "--json").json) == {"records_out_of_range"}


def test_a_live_owner_is_checked_but_never_repaired(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    _, buffers = page_memory(20, PAGE, seed=0)
    assert all(engine.put(keys(20), buffers, None, soon()))
    clean = flexkv("check", tmp_path, "--repair", "--json")
    assert clean.code == 0
    assert clean.json["owners"][0]["alive"] is True
    damage(only(tmp_path, "*.slots"), slot_of(tmp_path, keys(20)[5]) * PAGE)
    journal = only(tmp_path, "*.journal").read_bytes()
    output = flexkv("check", tmp_path, "--repair")
    assert output.code == 1
    assert "1 page with wrong bytes" in output.text
    assert "a live process holds it: not repaired" in output.text
    assert only(tmp_path, "*.journal").read_bytes() == journal
    engine.close()


def test_a_live_owner_that_evicts_all_the_time_has_no_problems(tmp_path: Path) -> None:
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    stop = threading.Event()

    def churn() -> None:
        seed = 0
        while not stop.is_set():
            seed += 1
            _, buffers = page_memory(32, PAGE, seed=seed)
            engine.put(keys(32, seed), buffers, None, soon())

    worker = threading.Thread(target=churn)
    worker.start()
    try:
        outputs = [flexkv("check", tmp_path, "--json") for _ in range(4)]
    finally:
        stop.set()
        worker.join()
        engine.close()
    assert [output.code for output in outputs] == [0] * 4, outputs
    assert engine._metrics.snapshot()["evicted_pages"] > 64


def test_a_neighbour_that_tails_the_owner_follows_a_repair(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 20)
    dead = owners(tmp_path / "ns")[0]
    damage(only(tmp_path, "*.slots"), slot_of(tmp_path, keys(20)[19]) * PAGE)
    neighbour = open_neighbour(tmp_path, dead)
    assert neighbour.prefix(keys(20)) == 20
    assert flexkv("check", tmp_path, "--repair").code == 0
    neighbour.scan()
    assert neighbour.prefix(keys(20)) == 19
    neighbour.close()


def open_neighbour(directory: Path, owner: str) -> Any:
    """A reader of the namespace that owns nothing."""
    from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
    from flexkv_sglang.backends.io.probe import IoMode
    from flexkv_sglang.backends.slots.neighbours import NeighbourStore

    mode = IoMode("threads", True, 4096)
    store = NeighbourStore([(directory / "ns", mode)], "ns", PAGE, [], ACCEPTED_KINDS["full"])
    store.scan()
    assert owner in owners(directory / "ns")
    return store


def test_unreadable_arguments_are_usage_errors(tmp_path: Path) -> None:
    assert flexkv("check", tmp_path / "none").code == 2
    assert flexkv("check").code == 2
    assert flexkv("repair", tmp_path).code == 2


def test_random_bytes_in_any_file_never_end_in_a_traceback(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 8)
    open_engine(tmp_path, PAGE, 64 * PAGE).close()
    random = np.random.default_rng(1)
    whole = tmp_path / "ns"
    for name in sorted(path.name for path in whole.iterdir() if path.stat().st_size):
        copy = tmp_path / name / "ns"
        shutil.copytree(whole, copy)
        (copy / name).write_bytes(random.bytes(5000))
        first, second = flexkv("check", copy, "--repair", "--json"), flexkv("stats", copy)
        assert first.code in (0, 1)
        assert second.code in (0, 1)
