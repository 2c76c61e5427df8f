"""FileLock: one holder, none left behind by a dead process, and a lock on a replaced file counts for nothing."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from flexkv_sglang.backends.file_lock import FileLock


def taken(path: Path, flags: int = os.O_CREAT, *, tries: int = 1) -> FileLock:
    lock = FileLock.take(path, flags, tries=tries)
    assert lock is not None
    return lock


def test_a_lock_has_one_holder_until_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    assert not FileLock.is_held(path), "there is none"
    lock = taken(path)
    assert lock.held
    assert FileLock.is_held(path)
    assert FileLock.take(path, os.O_CREAT) is None
    lock.close()
    lock.close()
    assert not lock.held
    assert not FileLock.is_held(path)
    taken(path, 0).close()


def test_without_create_a_missing_file_is_none_and_with_create_a_missing_directory_is_an_error(
    tmp_path: Path,
) -> None:
    assert FileLock.take(tmp_path / "a.lock") is None
    assert FileLock.take(tmp_path / "no" / "a.lock") is None
    with pytest.raises(FileNotFoundError):
        FileLock.take(tmp_path / "no" / "a.lock", os.O_CREAT)


def test_with_exclusive_create_an_existing_file_is_none(tmp_path: Path) -> None:
    taken(tmp_path / "a.lock", os.O_CREAT | os.O_EXCL).close()
    assert FileLock.take(tmp_path / "a.lock", os.O_CREAT | os.O_EXCL) is None


def test_the_death_of_its_process_releases_a_lock(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    program = (
        "import fcntl, os, sys\n"
        "fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(fd, fcntl.LOCK_EX)\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        assert FileLock.take(path) is None
        child.kill()
        child.wait(10)
    taken(path, 0).close()


def test_a_lock_on_a_file_that_was_replaced_between_open_and_flock_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.lock"
    path.touch()
    real = fcntl.flock

    def replaced(fd: int, how: int) -> None:
        path.rename(tmp_path / "old")  # kept, so the inode is not used again
        path.touch()
        real(fd, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", replaced)
        assert FileLock.take(path) is None
    taken(path, 0).close()


def test_a_failure_of_flock_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, how: int) -> None:
        raise OSError(37, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    for attempt in (lambda path: FileLock.take(path, os.O_CREAT), FileLock.make):
        with pytest.raises(OSError, match="no locks"):
            attempt(tmp_path / "a.lock")
    assert len(os.listdir("/proc/self/fd")) == before


def test_tries_outlast_a_process_that_only_asks(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)  # as ``is_held`` does, for a moment
    threading.Timer(0.03, os.close, [fd]).start()
    taken(path, 0, tries=100).close()


def test_two_that_ask_do_not_see_each_other(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_SH)
    assert not FileLock.is_held(path)
    os.close(fd)


def test_a_made_lock_appears_held_and_its_content_can_be_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    lock = FileLock.make(path)
    assert FileLock.is_held(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.lock"]
    assert lock.in_place
    lock.write("a long text")
    lock.write("short")
    assert path.read_text() == "short"
    path.rename(tmp_path / "old")
    assert not lock.in_place
    path.touch()
    assert not lock.in_place, "another file has its name"
    lock.close()
    assert not lock.in_place
    with pytest.raises(OSError, match="descriptor"):
        lock.write("late")


def test_a_lock_that_is_not_free_is_not_waited_for_longer_than_its_tries(tmp_path: Path) -> None:
    lock = taken(tmp_path / "a.lock")
    begun = time.monotonic()
    assert FileLock.take(tmp_path / "a.lock", tries=3) is None
    assert 0.03 < time.monotonic() - begun < 5.0
    lock.close()
