"""Files that appear whole or not at all, and planted links that lead nowhere."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_sglang.backends import safe_files
from flexkv_sglang.backends.safe_files import publish, remove_temporaries, replacing

FIXED = "0123456789abcdef"


@pytest.fixture
def umask() -> Iterator[None]:
    old = os.umask(0o022)
    yield
    os.umask(old)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """A file elsewhere that a planted link points to."""
    path = tmp_path / "elsewhere"
    path.write_text("precious")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def test_a_file_is_replaced_whole_and_belongs_to_this_user_alone(folder: Path, umask: None) -> None:
    publish(folder, "name", [b"a long first text"])
    publish(folder, "name", [b"another ", memoryview(b"text")], sync=True)
    assert (folder / "name").read_bytes() == b"another text"
    assert stat.S_IMODE((folder / "name").stat().st_mode) == 0o600
    assert names(folder) == ["name"]


def test_a_file_for_others_has_the_mode_that_was_asked_for(folder: Path, umask: None) -> None:
    publish(folder, "name", [b"text"], mode=0o666)
    assert stat.S_IMODE((folder / "name").stat().st_mode) == 0o644


def test_nothing_is_in_place_before_the_block_ends_and_the_temporary_is_random(
    folder: Path,
) -> None:
    seen = set()
    for text in (b"one", b"two"):
        with replacing(folder, "name") as fd:
            os.write(fd, text)
            (temporary,) = set(names(folder)) - {"name"}
            seen.add(temporary)
            assert not (folder / "name").exists() or (folder / "name").read_bytes() == b"one"
        assert (folder / "name").read_bytes() == text
    assert len(seen) == 2


@pytest.mark.parametrize("error", [OSError(28, "full"), KeyboardInterrupt()])
def test_after_a_failure_the_old_file_is_there_and_no_temporary(
    folder: Path, error: BaseException
) -> None:
    publish(folder, "name", [b"old"])

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise error

    with pytest.raises(type(error)):
        publish(folder, "name", parts())
    assert (folder / "name").read_bytes() == b"old"
    assert names(folder) == ["name"]


def test_a_failed_rename_leaves_no_temporary(folder: Path) -> None:
    (folder / "name").mkdir()
    with pytest.raises(IsADirectoryError):
        publish(folder, "name", [b"text"])
    assert names(folder) == ["name"]


def test_a_link_planted_at_the_temporary_name_is_not_followed_and_not_removed(
    folder: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_files.secrets, "token_hex", lambda count: FIXED)
    planted = folder / f"name.{FIXED}.tmp"
    planted.symlink_to(victim)
    with pytest.raises(FileExistsError):
        publish(folder, "name", [b"text"])
    assert victim.read_text() == "precious"
    assert planted.is_symlink()
    planted.unlink()
    planted.symlink_to(folder / "not there")  # a dangling one neither
    with pytest.raises(FileExistsError):
        publish(folder, "name", [b"text"])
    assert not (folder / "not there").exists()


def test_a_link_planted_at_the_target_name_is_replaced_and_not_followed(
    folder: Path, victim: Path
) -> None:
    (folder / "name").symlink_to(victim)
    publish(folder, "name", [b"text"])
    assert victim.read_text() == "precious"
    assert not (folder / "name").is_symlink()
    assert (folder / "name").read_bytes() == b"text"


def test_a_link_in_the_place_of_the_directory_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(OSError, match="link"):
        publish(tmp_path / "link", "name", [b"text"])
    assert names(folder) == []


def test_a_directory_that_is_replaced_meanwhile_gets_nothing(folder: Path, victim: Path) -> None:
    moved = folder.with_name("moved")
    with replacing(folder, "name") as fd:
        os.write(fd, b"text")
        folder.rename(moved)
        folder.symlink_to(victim.parent)
    assert (moved / "name").read_bytes() == b"text"
    assert not (victim.parent / "name").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_without_replace_the_first_file_stays_and_a_planted_link_is_not_followed(
    folder: Path, victim: Path, dangling: bool
) -> None:
    publish(folder, "name", [b"first"], replace=False)
    with pytest.raises(FileExistsError):
        publish(folder, "name", [b"second"], replace=False)
    assert (folder / "name").read_bytes() == b"first"
    if dangling:
        victim.unlink()
    (folder / "planted").symlink_to(victim)
    with pytest.raises(FileExistsError):
        publish(folder, "planted", [b"text"], replace=False)
    assert dangling != victim.exists()
    assert names(folder) == ["name", "planted"]


def test_only_temporaries_of_the_prefix_are_removed(folder: Path, victim: Path) -> None:
    stay = [
        "name",
        f"other.{FIXED}.tmp",
        f"name.{FIXED}.tmp.x",
    ]
    for name in stay:
        (folder / name).touch()
    (folder / f"name.{FIXED}.tmp").touch()
    (folder / "name.tmp").touch()  # of version 0.1
    (folder / f"name.1.{FIXED}.tmp").symlink_to(victim)
    remove_temporaries(folder, "name.")
    assert names(folder) == sorted(stay)
    assert victim.read_text() == "precious"
