"""Directories at start-up: what can be used, what is adopted, what is left alone, what is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.io import probe
from flexkv_sglang.backends.slots.opening import open_tier
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.backends.slots.slot_file import SlotFileTier
from flexkv_sglang.backends.slots.space import places
from flexkv_sglang.backends.slots.space.places import open_places, prepare_directory
from flexkv_sglang.errors import ConfigError
from stores.engines import keys, open_engine, page_memory, soon


def close(tier: SlotFileTier) -> None:
    """Close all its stores."""
    for store in tier.stores:
        store.close()


FULL = ACCEPTED_KINDS["full"]
PAGE = 8192
SIZE = 16 * PAGE

WRITER = """
import sys, os
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from stores.engines import keys, open_engine, page_memory, soon
engine = open_engine(Path(sys.argv[1]), 8192, 16 * 8192)
source, buffers = page_memory(10, 8192, seed=5)
assert engine.put(keys(10), buffers, None, soon()) == [True] * 10
print("stored", flush=True)
sys.stdin.read()
"""


@pytest.mark.crash
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_pages_of_a_killed_process_are_adopted_whole(
    tmp_path: Path, how: signal.Signals
) -> None:
    support = str(Path(__file__).parents[2] / "support")
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), support],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline().strip() == "stored"
        live = open_engine(tmp_path, PAGE, SIZE)
        assert live.page_count() == 0  # the owner lives: its pages are a neighbour's
        assert live.prefix(keys(10)) == 10
        live.close()
        child.send_signal(how)
        child.wait()
    engine = open_engine(tmp_path, PAGE, SIZE)
    source, _ = page_memory(10, PAGE, seed=5)
    target, buffers = page_memory(10, PAGE)
    assert engine.get(keys(10), buffers, soon()) == [True] * 10
    assert (source == target).all()
    engine.check()
    engine.close()


def test_two_processes_never_own_the_same_files(tmp_path: Path) -> None:
    first = open_engine(tmp_path, PAGE, SIZE)
    second = open_engine(tmp_path, PAGE, SIZE)
    names = [engine._tier.stores[0].lock.owner for engine in (first, second)]
    assert names[0] != names[1]
    for name in names:
        assert OwnerLock.try_take(tmp_path / "ns", name) is None
    first.close()
    second.close()
    lock = OwnerLock.try_take(tmp_path / "ns", names[0])
    assert lock is not None
    lock.close()


def test_a_namespace_folder_may_be_a_link_to_another_disk(tmp_path: Path) -> None:
    (tmp_path / "path").mkdir()
    (tmp_path / "other disk").mkdir()
    (tmp_path / "path" / "ns").symlink_to(tmp_path / "other disk")
    for _ in range(2):  # the second time its files are adopted
        tier = open_engine(tmp_path / "path", PAGE, SIZE)
        assert tier.slot_count == 16
        tier.close()
    assert len(list((tmp_path / "other disk").glob("*.slots"))) == 1


def test_adoption_removes_what_a_crash_left_of_new_files(tmp_path: Path) -> None:
    open_engine(tmp_path, PAGE, SIZE).close()
    (owner,) = owners(tmp_path / "ns")
    stale = tmp_path / "ns" / f"{owner}.7.snap.0123456789abcdef.tmp"
    other = tmp_path / "ns" / "NAMESPACE.json.0123456789abcdef.tmp"  # may be being written
    for path in (stale, other):
        path.write_bytes(b"half")
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert engine._tier.stores[0].lock.owner == owner
    assert not stale.exists()
    assert other.exists()
    engine.close()


def test_files_of_an_owner_that_died_while_it_was_made_are_removed(tmp_path: Path) -> None:
    open_engine(tmp_path, PAGE, SIZE).close()
    with OwnerLock.create(tmp_path / "ns") as half_made:
        (tmp_path / "ns" / f"{half_made.owner}.8192.slots").write_bytes(bytes(PAGE * 64))
    engine = open_engine(tmp_path, PAGE, SIZE)
    assert half_made.owner not in owners(tmp_path / "ns")
    engine.close()


def test_an_owner_with_an_unknown_journal_is_left_alone_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_engine(tmp_path, PAGE, SIZE).close()
    journal = next(tmp_path.rglob("*.journal"))
    journal.write_bytes(b"FKJRNL99" + journal.read_bytes()[8:])
    with caplog.at_level(logging.WARNING):
        engine = open_engine(tmp_path, PAGE, SIZE)
    assert "is left alone" in caplog.text
    assert journal.exists()
    assert engine.page_count() == 0
    engine.close()


def test_the_namespace_says_what_it_is_for(tmp_path: Path) -> None:
    mode = prepare_directory(str(tmp_path / "made" / "on" / "demand"), "auto")
    found = open_places({str(tmp_path / "made" / "on" / "demand"): mode}, "abc", {"dtype": "bf16"})
    assert json.loads((found[0].directory / "NAMESPACE.json").read_text()) == {
        "namespace": "abc",
        "dtype": "bf16",
    }


def test_several_directories_share_the_size_and_all_are_used(tmp_path: Path) -> None:
    modes = {
        str(tmp_path / name): prepare_directory(str(tmp_path / name), "auto") for name in ("a", "b")
    }
    tier, _ = open_tier(open_places(modes, "ns", {}), "ns", PAGE, SIZE, accepted=FULL)
    sizes = [path.stat().st_size for path in sorted(tmp_path.rglob("*.slots"))]
    assert sizes == [SIZE // 2, SIZE // 2]
    assert tier.slot_count == 16
    close(tier)


def test_without_a_size_an_earlier_run_decides_then_the_free_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "free_bytes", lambda _directory: 40 * PAGE)
    place = open_places(
        {str(tmp_path): prepare_directory(str(tmp_path), "auto")}, "ns", {}, min_free=0
    )
    for _ in range(2):
        tier, _ = open_tier(place, "ns", PAGE, None, accepted=FULL)
        assert tier.slot_count == 10
        close(tier)
        monkeypatch.setattr(places, "free_bytes", lambda _directory: 8 * PAGE)


def test_a_rank_that_only_reads_owns_no_files(tmp_path: Path) -> None:
    place = open_places({str(tmp_path): prepare_directory(str(tmp_path), "auto")}, "ns", {})
    tier, _ = open_tier(place, "ns", PAGE, 0, accepted=FULL)
    assert tier.slot_count == 0
    assert not owners(tmp_path / "ns")
    close(tier)


def test_a_path_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"path: cannot use '.*file.*Valid: a directory"):
        prepare_directory(str(tmp_path / "file" / "below"), "auto")


def test_an_unwritable_directory_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"path: cannot use '/proc/flexkv'.*Valid: a directory"):
        prepare_directory("/proc/flexkv", "auto")


def test_a_file_system_that_takes_o_direct_in_open_and_refuses_the_write_falls_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = probe._try

    def refuse(directory: str, engine: str, direct: bool) -> int:
        if direct:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return original(directory, engine, direct)

    monkeypatch.setattr(probe, "_try", refuse)
    with caplog.at_level(logging.INFO):
        mode = prepare_directory(str(tmp_path), "auto")
    assert (mode.engine, mode.o_direct) == ("buffered", False)
    assert "io_engine=buffered o_direct=false" in caplog.text
    assert "not better because io_uring: Invalid argument; threads: Invalid argument" in caplog.text
    with pytest.raises(
        ConfigError, match=r"io_engine='io_uring'.*Invalid argument.*Valid: io_engine 'auto'"
    ):
        prepare_directory(str(tmp_path), "io_uring")


def test_a_kernel_that_refuses_io_uring_falls_back_to_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_args: object, **_kwargs: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(probe, "Ring", refused)
    assert prepare_directory(str(tmp_path), "auto").engine == "threads"


def test_a_probe_that_is_killed_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = probe._round_trip, []

    def look(*args: Any, **kwargs: Any) -> None:
        seen.append(os.listdir(tmp_path))
        original(*args, **kwargs)

    monkeypatch.setattr(probe, "_round_trip", look)
    prepare_directory(str(tmp_path), "auto")
    assert seen
    assert not any(seen)
