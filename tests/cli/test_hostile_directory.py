"""Commands on directories that somebody made or changed on purpose, as root and as other users."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.backends.slots.journal import recover
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.backends.slots.records import JOURNAL_MAGIC
from flexkv_sglang.cli.directory import patience
from flexkv_sglang.cli.directory.acting import acting_as
from flexkv_sglang.cli.doctor import facts, files, setup
from flexkv_sglang.cli.main import main
from stores.command import Output, die_after_put, flexkv
from stores.engines import open_engine

PAGE = 8192
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be several users")
USER = 1000
ALL = ("--older-than", "0s", "--yes")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Output]:
    """A command in this process; doctor does not ask SGLang, which takes seconds."""
    monkeypatch.setattr(facts, "look_at_plugin", facts.Plugin)

    def call(*arguments: object) -> Output:
        code = main([str(item) for item in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        assert "\x1b" not in out + err
        return Output(code, out, err)

    return call


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored")
    die_after_put(path, PAGE, 8)
    return path


@pytest.fixture
def folder(stored: Path, tmp_path: Path) -> Path:
    """A namespace folder with 8 pages of a dead owner."""
    shutil.copytree(stored / "ns", tmp_path / "d" / "ns")
    return tmp_path / "d" / "ns"


def only(folder: Path, ending: str) -> Path:
    (path,) = folder.glob(f"*.{ending}")
    return path


def rewrite_header(folder: Path, **changes: Any) -> None:
    """A header with a right CRC that says something else."""
    path = only(folder, "journal")
    raw = path.read_bytes()
    fields = json.loads(raw[20 : 20 + int.from_bytes(raw[12:16], "little")])
    fields |= changes
    body = json.dumps(fields, sort_keys=True).encode()
    head = JOURNAL_MAGIC + b"".join(
        number.to_bytes(4, "little") for number in (1, len(body), __import__("zlib").crc32(body))
    )
    path.write_bytes((head + body).ljust(4096, b"\0") + raw[4096:])


def files_of(**changes: Any) -> list[dict[str, Any]]:
    return [{"slot_bytes": PAGE, "payload_bytes": PAGE, "slot_count": 64} | changes]


def lock_directory(folder: Path) -> None:
    path = only(folder, "lock")
    path.unlink()
    path.mkdir()


def fifo(ending: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        path = folder / ending if ending == "NAMESPACE.json" else only(folder, ending)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return make


def manifest(text: str) -> Callable[[Path], None]:
    return lambda folder: void((folder / "NAMESPACE.json").write_text(text))


def stats_file(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / f"{owners(folder)[0]}.stats.json").write_text(text)

    return write


def void(_: object) -> None:
    return None


def header(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: rewrite_header(folder, **changes)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no files": header(files=[]),
    "1e13 slots": header(files=files_of(slot_count=10**13)),
    "1e9 slots": header(files=files_of(slot_count=10**9)),
    "minus 3 slots": header(files=files_of(slot_count=-3)),
    "slots as text": header(files=files_of(slot_count="3")),
    "slots as a fraction": header(files=files_of(slot_count=3.5)),
    "true slots": header(files=files_of(slot_count=True)),
    "payload beyond its slot": header(files=files_of(payload_bytes=PAGE * 1000)),
    "slots of no bytes": header(files=files_of(slot_bytes=0, payload_bytes=0)),
    "slots of a huge size": header(files=files_of(slot_bytes=1 << 62)),
    "seed as text": header(epoch="x"),
    "base as text": header(base_seq="1"),
    "base below zero": header(base_seq=-7),
    "base without end": header(base_seq=1e30),
    "files of another kind": header(files=7),
    "lock is a directory": lock_directory,
    "lock is a FIFO": fifo("lock"),
    "journal is a FIFO": fifo("journal"),
    "slot file is a FIFO": fifo("slots"),
    "NAMESPACE.json is a FIFO": fifo("NAMESPACE.json"),
    "NAMESPACE.json of wrong types": manifest('{"buffer_bytes": [1, "x"], "model": 5, "tp": 3.5}'),
    "NAMESPACE.json is deep": manifest('{"a":' * 900 + "1" + "}" * 900),
    "NAMESPACE.json never ends": lambda folder: os.truncate(
        os.open(folder / "NAMESPACE.json", os.O_CREAT | os.O_WRONLY), 6 << 30
    ),
    "journal never ends": lambda folder: os.truncate(only(folder, "journal"), 200 << 30),
    "stats is deep": stats_file("[" * 200_000),
    "stats of wrong types": stats_file('{"process": [], "counters": 7, "written_at": "x"}'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_one_damaged_owner_is_one_line_and_hides_nothing(
    folder: Path, run: Callable[..., Output], how: str
) -> None:
    whole = folder.parent / "whole"
    shutil.copytree(folder, whole)
    rewrite_header(whole, namespace="whole")
    DAMAGE[how](folder)
    checked = run("check", folder.parent)
    assert checked.code == 1
    assert "  8    0         0" in checked.text, "the other namespace"
    assert checked.text.count("problem:") == 1
    shown = run("stats", folder.parent, "--json").json
    assert [item["pages"] for item in shown["namespaces"][1]["owners"]] == [8]
    for command in (
        ("stats",),
        ("gc",),
        ("check", "--json"),
        ("check", "--repair"),
        ("doctor", "--json"),
    ):
        assert run(command[0], folder.parent, *command[1:]).code in (0, 1)


def test_odd_contents_of_the_right_files_are_left_out(
    folder: Path, run: Callable[..., Output]
) -> None:
    manifest(
        json.dumps({"model": "\x1b[31mred", "tp": [1], "pools": 3, "buffer_bytes": [-4, PAGE + 4]})
    )(folder)
    stats_file(
        json.dumps(
            {
                "process": "p",
                "counters": {"asked_pages": 4, "found_pages": "x", "\x1b": 1e400},
                "written_at": 5,
                "gauges": [],
                "histograms": {"a": {"bounds": [1], "counts": [1, "x"]}},
                "pid": "x",
            }
        )
    )(folder)
    (folder / "\x1b]0;owned\x07\nfine").touch()
    (folder / os.fsdecode(b"\xff\xfe")).touch()
    for command in ("check", "stats", "doctor"):
        for more in ((), ("--json",)):
            out = run(command, folder.parent, *more)
            assert out.code in (0, 1)
            if more:
                json.loads(out.text, parse_constant=pytest.fail)
    assert "\\x1b[31mred" in run("stats", folder.parent).text


def test_links_are_never_followed(folder: Path, run: Callable[..., Output], tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    owner = owners(folder)[0]
    with only(folder, "journal").open("ab") as file:
        file.write(b"torn")
    (folder / f"{owner}.1.snap.tmp").symlink_to(precious)
    out = run("check", folder.parent, "--repair", "--json")
    assert out.code == 1
    assert {item["what"] for item in out.json["owners"][0]["findings"]} == {"foreign_file"}
    assert precious.read_text() == "mine"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "linked").symlink_to(folder)
    (folder / f"{owner}.1.snap.tmp").unlink()
    before = sorted(folder.iterdir())
    for command in (("gc", *ALL), ("check", "--repair"), ("stats",)):
        out = run(command[0], elsewhere, *command[1:])
        assert (out.code, "is a link" in out.text) == (1, True)
    assert sorted(folder.iterdir()) == before


def give(folder: Path, uid: int) -> None:
    for path in (folder.parent, folder, *folder.iterdir()):
        os.chown(path, uid, uid)


@needs_root
def test_what_root_repairs_stays_its_users(folder: Path, run: Callable[..., Output]) -> None:
    with only(folder, "journal").open("ab") as file:
        file.write(b"torn")
    give(folder, USER)
    for above in folder.parents:
        if above != Path("/tmp"):
            above.chmod(above.stat().st_mode | 0o755) if above.stat().st_uid == 0 else None
        if above == Path("/tmp"):
            break
    assert run("check", folder.parent, "--repair").code == 0
    assert {(path.stat().st_uid, path.stat().st_gid) for path in folder.iterdir()} == {(USER, USER)}
    with acting_as(USER, USER):
        assert len(recover(folder, owners(folder)[0], "ns").records) == 8
    assert os.geteuid() == 0


@needs_root
@pytest.mark.parametrize("command", [("check", "--repair"), ("gc", *ALL)])
def test_files_of_another_user_are_refused(
    folder: Path, run: Callable[..., Output], command: tuple[str, ...]
) -> None:
    os.chown(only(folder, "slots"), USER, USER)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out = run(command[0], folder.parent, *command[1:])
    assert out.code == 1
    assert "belongs to user 1000" in out.text
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@needs_root
def test_another_user_is_told_whose_files_they_are(folder: Path) -> None:
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    program = (
        "import os, sys\nfrom flexkv_sglang.cli.main import main\n"
        "import locale, shutil, flexkv_sglang.cli.directory.check, flexkv_sglang.cli.directory.gc\n"
        "import flexkv_sglang.cli.directory.stats\n"
        "os.chdir(sys.argv[2]); sys.argv[2] = '.'\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\nsys.exit(main(sys.argv[1:]))"
    )
    for command in (["check"], ["gc", *ALL], ["stats"], ["check", "--repair"]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, command[0], str(folder.parent), *command[1:]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        if command != ["stats"]:
            assert "ns belongs to user 0" in done.stdout


def test_an_owner_without_its_lock_file_is_alive_while_its_process_is(
    tmp_path: Path, run: Callable[..., Output]
) -> None:
    engine = open_engine(tmp_path, PAGE, 64 * PAGE)
    try:
        only(tmp_path / "ns", "lock").unlink()
        assert run("stats", tmp_path, "--json").json["namespaces"][0]["owners"][0]["alive"]
        assert run("gc", tmp_path, *ALL, "--json").json["removed"] == []
        assert run("check", tmp_path, "--repair").code in (0, 1)
        assert only(tmp_path / "ns", "slots").exists()
    finally:
        engine.close()


@pytest.mark.parametrize("command", [("check", "--repair"), ("gc", *ALL)])
def test_what_is_left_without_a_lock_file_can_be_taken(
    folder: Path, run: Callable[..., Output], command: tuple[str, ...]
) -> None:
    only(folder, "lock").unlink()
    assert "without a lock" in run("check", folder.parent).text
    assert run(command[0], folder.parent, *command[1:]).code == 0
    left = sorted(path.suffix for path in folder.iterdir())
    if command[0] == "gc":
        assert left == [".json"]
    else:
        assert run("check", folder.parent).code == 0
        assert ".lock" in left


def test_files_dated_in_the_future_are_named(folder: Path, run: Callable[..., Output]) -> None:
    for path in folder.iterdir():
        os.utime(path, (1_930_000_000, 1_930_000_000))
    out = run("gc", folder.parent, *ALL)
    assert "1 dead owner dated in the future, up to 2031-02-27" in out.text
    assert run("gc", folder.parent, "--namespace", "ns", "--yes").text.startswith("owner")
    assert list(folder.glob("*.slots")) == []


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "mount"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "x", path], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("this machine mounts nothing")
    yield path
    subprocess.run(["umount", path], check=True)


def test_read_only_media_are_looked_at(
    mounted: Path, folder: Path, run: Callable[..., Output]
) -> None:
    with only(folder, "journal").open("ab") as file:
        file.write(b"torn")
    shutil.copytree(folder, mounted / "ns")
    subprocess.run(["mount", "-o", "remount,ro", mounted], check=True)
    for command in (("check", "--repair"), ("check",), ("gc", *ALL)):
        out = run(command[0], mounted, *command[1:])
        assert out.code == 1
        assert ("read-only" in out.text) == (command != ("check",))
    assert run("stats", mounted, "--json").json["namespaces"][0]["owners"][0]["pages"] == 8
    assert run("gc", mounted).code == 0
    found = run("doctor", mounted, "--json").json["findings"]
    assert "read_only" in [item["what"] for item in found]
    assert "no_access" not in [item["what"] for item in found]


@pytest.mark.parametrize("target", ["/dev/full", "closed"])
def test_an_output_that_fails_is_no_traceback(folder: Path, target: str) -> None:
    where = ">&-" if target == "closed" else f"> {target}"
    line = f"{sys.executable} -P -m flexkv_sglang.cli stats {folder.parent} {where}"
    done = subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == (0 if target == "closed" else 1)


def test_passwords_in_a_configuration_are_not_shown(tmp_path: Path) -> None:
    config = tmp_path / "c.json"
    config.write_text('{"share": {"redis_urls": "redis://fk:hunter2@h:1"}}')
    for command in (
        ("agent", "--config", config),
        ("doctor", "--url", "ftp://fk:hunter2@h"),
        ("doctor", "--url", "http://fk:hunter2@h:1"),
        ("stats", tmp_path / "x\x1b[31m"),
    ):
        out = flexkv(*command)
        assert out.code == 2
        assert "hunter2" not in out.text + out.errors
        assert "\x1b" not in out.text + out.errors


STATUS = {
    "feeds": '{"feeds": 3}',
    "a time": '{"written_at": "x"}',
    "members": '{"peers": [1], "feeds": [2], "served_pages": []}',
    "depth": "[" * 100_000,
    "texts": '{"cluster_id": "\\u001b[2J", "feeds": [{"last_error": "redis://a:hunter2@h"}]}',
    "a FIFO": "",
}


@pytest.mark.parametrize("text", STATUS.values(), ids=STATUS)
def test_a_report_of_an_agent_may_hold_anything(
    tmp_path: Path, run: Callable[..., Output], text: str
) -> None:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "agent.lock").touch()
    if text:
        (tmp_path / "status.json").write_text(text)
    else:
        os.mkfifo(tmp_path / "status.json")
    for more in ((), ("--json",)):
        out = run("nodes", "--run-dir", tmp_path, *more)
        assert out.code == 1
        assert "hunter2" not in out.text


def test_more_dead_owners_than_descriptors(folder: Path) -> None:
    for number in range(42):
        copy = folder.parent / f"n{number}"
        shutil.copytree(folder, copy)
        rewrite_header(copy, namespace=copy.name)
        with only(copy, "journal").open("ab") as file:
            file.write(b"torn")
    program = (
        "import resource, sys\nfrom flexkv_sglang.cli.main import main\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\nsys.exit(main(sys.argv[1:]))"
    )
    for command in (["check", "--repair"], ["stats"], ["gc", *ALL]):
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, command[0], str(folder.parent), *command[1:]],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert done.returncode == 0, done.stdout[-500:] + done.stderr
    assert not list(folder.parent.rglob("*.slots"))


def test_a_directory_without_an_answer_is_named(
    folder: Path, run: Callable[..., Output], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child that asks hangs; the command goes on without it."""
    monkeypatch.setattr(patience, "_ask", lambda _: signal.pause())
    monkeypatch.setattr(facts, "answers", lambda path: patience.answers(path, 0.1))
    found = run("doctor", folder.parent, "--json")
    assert found.code == 1
    assert next(item["what"] for item in found.json["findings"]) == "hung_directory"


def test_dead_files_that_fill_the_disk_are_named(folder: Path) -> None:
    seen = facts.gather([folder.parent], None, facts.Plugin(), time.time())
    (place,) = seen.places
    assert place.disk is not None
    full = replace(seen, places=(replace(place, disk=replace(place.disk, free_bytes=4096)),))
    finding = files.dead_files(full)
    assert finding is not None
    assert f"flexkv gc {folder.parent} --older-than 0s --yes" in finding.remedy
    assert "1 dead owner with 5" in finding.evidence
    assert files.dead_files(seen) is None


@pytest.mark.parametrize(
    ("release", "isolates"),
    [("0.5.11", False), ("0.5.19", False), ("0.5.20", True), ("0.5.10", True)],
)
def test_releases_whose_salts_isolate_nothing_are_named(
    folder: Path, release: str, isolates: bool
) -> None:
    seen = facts.gather([folder.parent], None, facts.Plugin(sglang=release), time.time())
    assert (setup.salts(seen) is None) == isolates
