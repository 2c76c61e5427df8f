"""The space of a directory: dead owners make room, those that live are waited for, refusals name what takes it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS
from flexkv_sglang.backends.slots.opening import Recovered, open_tier
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.backends.slots.slot_file import SlotFileTier
from flexkv_sglang.backends.slots.space import memory_limit, places, room
from flexkv_sglang.backends.slots.space.allocation import fill_holes, holes
from flexkv_sglang.backends.slots.space.memory_limit import mount_of, tightest
from flexkv_sglang.backends.slots.space.places import open_places, prepare_directory
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.siblings import are_siblings

PAGE = 8192
SIZE = 64 * PAGE


class Disk:
    """A directory whose file system has ``left`` bytes beyond the owners that lie there."""

    def __init__(self, root: Path, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.left = root, left
        monkeypatch.setattr(places, "free_bytes", lambda _: self.left - self.taken())
        monkeypatch.setattr(places, "floor_bytes", lambda *_: 0)

    def taken(self) -> int:
        """Bytes of all slot files."""
        return sum(path.stat().st_size for path in self.root.glob("*/*.slots"))

    def start(
        self,
        namespace: str,
        size: int | None = SIZE,
        fields: Mapping[str, object] | None = None,
        share: int | None = None,
        **also: int,
    ) -> tuple[SlotFileTier, Recovered]:
        """Open a namespace as a server does. ``share``: of this process, if it is not the only one."""
        mode = prepare_directory(str(self.root), "auto")
        opened = open_places({str(self.root): mode}, namespace, fields or {})
        bytes_ = size if share is None else share
        return open_tier(
            opened,
            namespace,
            PAGE,
            bytes_,
            accepted=ACCEPTED_KINDS["full"],
            whole_bytes=size,
            **also,
        )


def end(tier: SlotFileTier) -> None:
    """The server ends."""
    for store in tier.stores:
        store.close()


def test_namespaces_of_former_models_stay_within_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 1 << 30, monkeypatch)
    for day in range(4):
        tier, _ = disk.start(f"model{day}")
        assert tier.slot_count == 64
        assert disk.taken() == SIZE
        end(tier)
        for path in tmp_path.rglob("*"):  # a week passes
            os.utime(path, (1, 1))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model3"]


def test_the_oldest_dead_owners_make_room_and_only_as_many_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 3 * SIZE, monkeypatch)
    for number, name in enumerate(("b", "a", "c")):
        tier, _ = disk.start(name, 1 << 40, share=SIZE)
        end(tier)
        for path in (tmp_path / name).iterdir():
            os.utime(path, (number, number))
    tier, _ = disk.start("new", 1 << 40, share=SIZE)
    assert tier.slot_count == 64
    assert [owners(tmp_path / name) != [] for name in ("a", "c")] == [True, True]
    assert not (tmp_path / "b").exists()
    end(tier)


def test_what_is_alive_of_another_user_or_of_another_format_makes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, 4 * SIZE, monkeypatch)
    alive, _ = disk.start("alive", 1 << 40, share=SIZE)
    for name in ("foreign", "format", "link"):
        tier, _ = disk.start(name, 1 << 40, share=SIZE)
        end(tier)
    (other,) = (tmp_path / "foreign").glob("*.slots")
    if os.geteuid() == 0:
        os.chown(other, 65534, 65534)
    else:
        monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    (journal,) = (tmp_path / "format").glob("*.journal")
    journal.write_bytes(b"FKJRNL99" + journal.read_bytes()[8:])
    (tmp_path / "link").rename(tmp_path.with_name("elsewhere"))
    (tmp_path / "link").symlink_to(tmp_path.with_name("elsewhere"))
    with pytest.raises(ConfigError, match="a size that fits"):
        disk.start("new", 2 * SIZE)
    assert all(owners(tmp_path / name) for name in ("alive", "foreign", "format", "link"))
    end(alive)


def test_a_refusal_names_the_files_and_the_command_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(tmp_path, SIZE, monkeypatch)
    tier, _ = disk.start("format")
    end(tier)
    (journal,) = (tmp_path / "format").glob("*.journal")
    journal.write_bytes(b"FKJRNL99" + journal.read_bytes()[8:])
    with pytest.raises(ConfigError) as caught:
        disk.start("new")
    text = str(caught.value)
    assert text.startswith("size: ")
    assert str(tmp_path / "format" / owners(tmp_path / "format")[0]) in text
    assert f"flexkv gc {tmp_path} --older-than" in text
    assert not (tmp_path / "new").exists()


def test_beside_a_server_that_lives_a_start_takes_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk(tmp_path, SIZE + 10 * PAGE, monkeypatch)
    old, _ = disk.start("ns")
    with caplog.at_level(logging.WARNING):
        new, recovered = disk.start("ns")
    assert new.slot_count == 10
    assert [short.byte_count for short in recovered.short] == [54 * PAGE]
    assert "in use by a running server" in caplog.text
    third, recovered = disk.start("ns")
    assert third.slot_count == 0  # it reads its neighbours
    assert [short.byte_count for short in recovered.short] == [SIZE]
    end(old)
    end(third)
    third, recovered = disk.start("ns")
    assert third.slot_count == 64
    assert not recovered.short
    end(third)
    end(new)


def test_a_rank_does_not_take_the_files_of_another_rank_that_has_not_started_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = [{"model": "m", "pool": "kv", "tp": [rank, 2]} for rank in range(2)]
    disk = Disk(tmp_path, SIZE + SIZE // 4, monkeypatch)
    for rank in range(2):
        tier, _ = disk.start(f"r{rank}", SIZE, fields[rank], share=SIZE // 2)
        end(tier)
    with pytest.raises(ConfigError, match="a size that fits"):  # twice the size as before
        disk.start("r0", 2 * SIZE, fields[0], share=SIZE)
    assert owners(tmp_path / "r1")


def test_siblings_are_what_one_server_uses_side_by_side() -> None:
    kv = {
        "model": "m",
        "settings": {},
        "pool": "kv",
        "dtype": "bf16",
        "page_size": 64,
        "tp": (0, 2),
    }
    assert are_siblings(kv, json.loads(json.dumps({**kv, "tp": (1, 2)})))
    assert are_siblings(kv, {**kv, "pool": "mamba", "dtype": "fp32", "tp": (0, 1)})
    for other in ({"tp": (1, 4)}, {"dtype": "fp8"}, {"page_size": 1}, {"model": "n"}):
        assert not are_siblings(kv, {**kv, **other})
    assert not are_siblings({}, {})


def test_the_share_of_a_lost_directory_is_not_put_on_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier, _ = Disk(tmp_path, 1 << 30, monkeypatch).start("ns", directories=2)
    assert tier.slot_count == 32
    end(tier)


def test_the_holes_of_a_sparse_copy_are_found_and_filled(tmp_path: Path) -> None:
    path = tmp_path / "copy"
    path.write_bytes(b"page")
    os.truncate(path, 8 << 20)
    assert holes(path) > 7 << 20
    if not fill_holes(path):
        pytest.skip("this file system has no fallocate")
    assert holes(path) == 0
    assert path.read_bytes()[:5] == b"page\0"


def group(proc: Path, name: str, version: int, limit: str, used: int, spare: int) -> None:
    """Write the files of one memory cgroup."""
    folder = proc / "cg" / name
    folder.mkdir(parents=True)
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    (folder / names[0]).write_text(limit)
    (folder / names[1]).write_text(str(used))
    (folder / "memory.stat").write_text(f"cache 5\n{names[2]} {spare}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_limit_of_a_cgroup_and_its_ancestors_counts(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limit, "_whole_memory", lambda: 1 << 40)
    (tmp_path / "self").mkdir()
    kind = "cgroup2 cgroup2 rw" if version == 2 else "cgroup cgroup rw,memory"
    point = tmp_path / "cg"
    (tmp_path / "self/mountinfo").write_text(f"30 1 0:26 / {point} rw shared:4 - {kind}\n")
    (tmp_path / "self/cgroup").write_text(
        "0::/pod/app\n" if version == 2 else "4:memory:/pod/app\n"
    )
    group(tmp_path, "pod", version, str(1 << 30), 900 << 20, 100 << 20)
    group(tmp_path, "pod/app", version, "max" if version == 2 else str(1 << 60), 800 << 20, 0)
    limit = tightest(tmp_path)
    assert limit is not None
    assert limit.limit == 1 << 30
    assert limit.left == (1 << 30) - (800 << 20)
    assert str(point / "pod") in limit.place


def test_a_tier_in_memory_beyond_the_limit_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = memory_limit.MemoryLimit("/cg/memory.max", 1 << 20, 40 * PAGE, 4 * PAGE)
    monkeypatch.setattr(room, "tightest", lambda: limit)
    monkeypatch.setattr(room, "is_memory", lambda _: True)
    disk = Disk(tmp_path, 1 << 30, monkeypatch)
    with pytest.raises(ConfigError, match=r"lies in memory.*/cg/memory.max is 1048576 bytes"):
        disk.start("ns")
    assert not (tmp_path / "ns").exists()
    tier, _ = disk.start("ns", 36 * PAGE)
    assert tier.slot_count == 36
    end(tier)


def test_a_directory_on_the_root_file_system_is_refused_where_a_mount_is_required(
    tmp_path: Path,
) -> None:
    mount = mount_of(tmp_path / "not" / "made" / "yet")
    assert mount is not None
    if mount.point != Path("/"):
        pytest.skip(f"{tmp_path} lies on {mount.point}")
    with pytest.raises(ConfigError, match=r"require_mount: .*no disk is mounted there"):
        prepare_directory(str(tmp_path / "kv"), "auto", require_mount=True)
    assert not (tmp_path / "kv").exists()
    shm = mount_of(Path("/dev/shm"))
    assert shm is not None
    assert shm.point == Path("/dev/shm")
