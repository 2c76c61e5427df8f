"""Files of another user, of another kind, or with numbers that cannot be: left alone, never believed."""

from __future__ import annotations

import json
import os
import resource
import stat
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.backends.safe_files import (
    ForeignFileError,
    open_own,
    own_folder,
    read_own,
    read_secret,
)
from flexkv_sglang.backends.slots.records import HEADER_BYTES, JOURNAL_MAGIC, Header
from flexkv_sglang.errors import ConfigError, JournalError
from stores.engines import keys, open_engine, page_memory, soon

PAGE, SIZE = 8192, 64 * 8192
OTHER = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")


def filled(tmp_path: Path) -> Path:
    """A namespace folder with one dead owner of eight pages."""
    engine = open_engine(tmp_path, PAGE, SIZE)
    _memory, buffers = page_memory(8, PAGE, seed=1)
    assert all(engine.put(keys(8), buffers, None, soon()))
    engine.close()
    return next(path for path in tmp_path.iterdir() if path.is_dir())


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def pages_after_a_start(tmp_path: Path) -> int:
    engine = open_engine(tmp_path, PAGE, SIZE)
    try:
        _memory, buffers = page_memory(2, PAGE, seed=5)
        assert all(engine.put(keys(2, seed=5), buffers, None, soon()))
        return engine.prefix(keys(8))
    finally:
        engine.close()


def by_other(path: Path) -> None:
    os.chown(path, OTHER, OTHER)


def writable(path: Path) -> None:
    path.chmod(0o666)


def a_link(path: Path) -> None:
    path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(path.with_suffix(".elsewhere"))


def a_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("pattern", ["*.lock", "*.journal", "*.slots"])
@pytest.mark.parametrize(
    "plant", [pytest.param(by_other, marks=as_root), writable, a_link, a_fifo, a_folder]
)
def test_an_owner_with_such_a_file_is_left_alone_and_the_server_starts(
    tmp_path: Path, pattern: str, plant: Callable[[Path], None]
) -> None:
    path = one(filled(tmp_path), pattern)
    plant(path)
    # A lock says nothing about pages: they are read as a neighbour's, and nobody writes there.
    assert pages_after_a_start(tmp_path) == (8 if pattern == "*.lock" else 0)
    assert path.is_symlink() or path.exists()


def test_without_a_plant_all_pages_are_there(tmp_path: Path) -> None:
    filled(tmp_path)
    assert pages_after_a_start(tmp_path) == 8


@as_root
def test_a_namespace_folder_of_another_user_is_refused_with_path_uid_and_remedy(
    tmp_path: Path,
) -> None:
    folder = filled(tmp_path)
    os.chown(folder, OTHER, OTHER)
    with pytest.raises(ConfigError, match=f"{folder}.*uid {OTHER}.*Valid:"):
        open_engine(tmp_path, PAGE, SIZE)


@as_root
def test_a_link_of_another_user_is_no_namespace_folder(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    os.lchown(folder, OTHER, OTHER)
    with pytest.raises(ConfigError, match=f"uid {OTHER}"):
        open_engine(tmp_path, PAGE, SIZE)


def test_a_folder_that_others_can_write_is_closed_for_them(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    folder.chmod(0o777)
    assert pages_after_a_start(tmp_path) == 8
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_new_folder_is_for_this_user_alone(tmp_path: Path) -> None:
    assert stat.S_IMODE(filled(tmp_path).stat().st_mode) == 0o700


def test_a_file_that_is_opened_is_never_created_or_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with pytest.raises(ForeignFileError, match="is a link"):
        open_own(tmp_path / "link", os.O_RDWR | os.O_CREAT)
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(FileNotFoundError):
        open_own(tmp_path / "missing")


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "long").open("wb") as file:
        file.truncate(200 << 30)
    (tmp_path / "long").chmod(0o600)
    with pytest.raises(OSError, match="plausible"):
        read_own(tmp_path / "long", 100)


def test_a_link_of_this_user_to_a_folder_is_resolved(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("disk")
    assert own_folder(tmp_path / "link") == tmp_path / "disk"


@as_root
@pytest.mark.parametrize(
    ("mode", "gid", "why"), [(0o440, 0, None), (0o440, 4242, "group 4242"), (0o644, 0, "0644")]
)
def test_a_secret_may_be_read_by_a_group_of_this_process(
    tmp_path: Path, mode: int, gid: int, why: str | None
) -> None:
    path = tmp_path / "secret"
    path.write_bytes(b"secret")
    os.chown(path, 0, gid)
    path.chmod(mode)
    (tmp_path / "link").symlink_to(path)  # secret volumes are links
    if why is None:
        assert read_secret(tmp_path / "link", 100) == b"secret"
    else:
        with pytest.raises(OSError, match=why):
            read_secret(tmp_path / "link", 100)


def test_a_fifo_is_no_secret_and_nobody_waits_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "secret", 0o600)
    with pytest.raises(OSError, match="regular"):
        read_secret(tmp_path / "secret", 100)


GOOD: dict[str, Any] = {
    "namespace": "ns", "owner": "0123456789ab", "epoch": 5, "generation": 0, "base_seq": 0, "boot_id": "b",
    "record_count": 0, "body_crc": 0, "files": [{"slot_bytes": 8192, "payload_bytes": 8192, "slot_count": 64}],
}  # fmt: skip


def header(fields: object) -> bytes:
    body = json.dumps(fields).encode()
    head = struct.pack("<8sIII", JOURNAL_MAGIC, 1, len(body), zlib.crc32(body))
    return (head + body).ljust(HEADER_BYTES, b"\0")


def crafted() -> list[Any]:
    """Headers with a right CRC and a field that cannot be."""
    numbers: list[Any] = [-1, -7, 1 << 63, 1e30, 3.0, "3", True, None, [], {}]
    found = [
        {**GOOD, name: value} for name in ("epoch", "generation", "base_seq") for value in numbers
    ]
    sizes: list[Any] = [1 << 32, 10**13, -3, "3", 3.0, 1e30, False, None]
    slots = GOOD["files"][0]
    found += [{**GOOD, "files": [{**slots, "slot_count": value}]} for value in sizes]
    found += [
        {**GOOD, "files": [{**slots, "slot_bytes": value}]}
        for value in (0, 4095, 1 << 33, "8192", None)
    ]
    found += [
        {**GOOD, "files": [{**slots, "payload_bytes": value}]} for value in (0, 8193, -1, 1.5)
    ]
    found += [
        {**GOOD, "files": value} for value in ([], [slots] * 17, None, 7, "x", [7], {"a": 1}, [[]])
    ]
    found += [
        {**GOOD, name: value} for name in ("namespace", "owner", "boot_id") for value in (7, None)
    ]
    found += [
        [],
        7,
        "x",
        None,
        {},
        {**GOOD, "more": 1},
        {k: v for k, v in GOOD.items() if k != "owner"},
    ]
    return found


def test_a_right_header_is_read() -> None:
    assert Header.unpack(header(GOOD), JOURNAL_MAGIC).files[0].slot_count == 64


@pytest.mark.parametrize("fields", crafted(), ids=repr)
def test_a_header_with_a_right_checksum_and_a_wrong_field_is_refused(fields: object) -> None:
    with pytest.raises(JournalError):
        Header.unpack(header(fields), JOURNAL_MAGIC)


def test_deep_json_in_a_header_is_refused() -> None:
    body = b"[" * 4000
    head = struct.pack("<8sIII", JOURNAL_MAGIC, 1, len(body), zlib.crc32(body))
    with pytest.raises(JournalError):
        Header.unpack((head + body).ljust(HEADER_BYTES, b"\0"), JOURNAL_MAGIC)


def test_a_header_that_names_more_slots_than_the_file_has_costs_no_memory(tmp_path: Path) -> None:
    folder = filled(tmp_path)
    journal = one(folder, "*.journal")
    found = Header.unpack(journal.read_bytes()[:HEADER_BYTES], JOURNAL_MAGIC)
    fields = {
        **GOOD,
        "namespace": found.namespace,
        "owner": found.owner,
        "generation": found.generation,
    }
    fields["files"] = [{"slot_bytes": 8192, "payload_bytes": PAGE, "slot_count": (1 << 32) - 3}]
    journal.write_bytes(header(fields) + bytes(6400))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pages_after_a_start(tmp_path) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


@pytest.mark.parametrize("pattern", ["*.journal", "*.snap"])
def test_a_sparse_journal_is_not_read(tmp_path: Path, pattern: str) -> None:
    filled(tmp_path)
    pages_after_a_start(tmp_path)  # a generation with a snapshot
    path = one(next(p for p in tmp_path.iterdir() if p.is_dir()), pattern)
    os.truncate(path, 200 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert pages_after_a_start(tmp_path) == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10
