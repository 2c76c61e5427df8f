"""``flexkv doctor``: the plug-in, the server, the directory and the disk; and the command itself."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sglang

import flexkv_sglang
from doctor.diagnosis import FITS, causes, doctor, facts_of, names, plain, told, write
from doctor.recorded_sglang import answers, serving
from flexkv_bed.server import free_port
from flexkv_sglang.backends.io.probe import file_system
from flexkv_sglang.cache.health import free_space
from flexkv_sglang.cli.doctor.command import diagnose
from flexkv_sglang.cli.doctor.facts import Plugin, gather
from flexkv_sglang.cli.doctor.server import ask_server
from flexkv_sglang.cli.doctor.setup import network
from models.plain_pools import store_of
from stores.command import die_after_put, flexkv
from stores.engines import wait_until

pytestmark = pytest.mark.sglang
PAGE = 8192


@pytest.fixture(autouse=True)
def prompt_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stats files follow at once."""
    monkeypatch.setattr("flexkv_sglang.cache.stats_file.INTERVAL_S", 0.05)


def test_the_command_on_a_healthy_store(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage, serving(answers(tmp_path, key=True)) as url:
        write(storage, 6)
        assert storage.batch_exists(names(6)) == 6
        assert told(tmp_path, asked_pages=6)
        output = flexkv("doctor", tmp_path)
        assert output.code == 0, output
        assert output.text.startswith(
            "hit rate 100.0 % (6 of 6 pages asked for), 6 KV pages stored"
        )
        assert "\nNothing is wrong.\n" in output.text
        assert f"locked memory of process {os.getpid()}" in output.text
        output = flexkv("doctor", "--url", url, "--json")  # the directory is the server's
        assert output.code == 0, output
        assert output.json["directories"] == [str(tmp_path)]
        assert output.json["hit_rate"] == 1.0
        assert output.json["findings"] == []
        assert output.json["server"]["flags"]["version"] == "0.5.23"


def test_the_command_on_a_store_of_a_dead_server(tmp_path: Path) -> None:
    """Asks the SGLang of the test bed whether the plug-in fits: it does, so that is not the cause."""
    die_after_put(tmp_path, PAGE, 5)
    output = flexkv("doctor", tmp_path, "--json")
    assert output.code == 1
    (finding,) = output.json["findings"]
    assert finding["what"] == "not_running"
    assert "1 owner, no lock is held; the counters are" in finding["evidence"]
    expected = {"sglang": sglang.__version__, "entry_point": True, "listed": True, "misfit": None}
    assert expected.items() <= output.json["plugin"].items()


def test_a_stopped_server_that_was_well_is_a_note(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        assert storage.batch_exists(names(6)) == 6
    found = doctor(tmp_path)
    assert list(found) == ["not_running"]
    assert causes(found) == []


@pytest.mark.parametrize(
    "words", [("--url", "127.0.0.1:30000"), ("--url", "ftp://x"), ("--what",), (__file__,)]
)
def test_usage_errors(words: tuple[str, ...]) -> None:
    assert flexkv("doctor", *words).code == 2


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    assert causes(doctor(tmp_path / "typo")) == ["no_directory"]


def test_a_directory_that_no_server_used(tmp_path: Path) -> None:
    found = doctor(tmp_path)
    assert causes(found) == ["not_running"]
    assert found["not_running"].title == "There is nothing of ours in this directory"
    assert "compare it with 'path'" in found["not_running"].remedy
    assert "last run" not in found["not_running"].remedy


def _fit(**environment: str) -> Plugin:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flexkv_sglang.cli.doctor.plugin_check"],
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
        text=True,
    )
    return Plugin(**json.loads(done.stdout.splitlines()[-1]))


def _verdict(tmp_path: Path, plugin: Plugin) -> Any:
    (tmp_path / "pages").mkdir(exist_ok=True)
    return diagnose(gather([tmp_path / "pages"], None, plugin, 0.0))[0]


def test_sglangs_white_list(tmp_path: Path) -> None:
    finding = _verdict(tmp_path, _fit(SGLANG_PLUGINS="other,kernels"))
    assert finding.what == "plugin_not_listed"
    assert "SGLANG_PLUGINS='other,kernels'" in finding.evidence


@pytest.fixture
def strange_sglang(tmp_path: Path) -> Path:
    """Another release of SGLang: its real plug-in framework, and a controller that attaches in another way."""
    real, place = Path(sglang.__file__).parent, tmp_path / "site"
    (place / "sglang/srt/managers").mkdir(parents=True)
    (place / "sglang/__init__.py").write_text('__version__ = "9.9.9"\n')
    shutil.copytree(real / "srt/plugins", place / "sglang/srt/plugins")
    shutil.copy(real / "srt/environ.py", place / "sglang/srt/environ.py")
    (place / "sglang/srt/managers/cache_controller.py").write_text(
        "class HiCacheController:\n    def attach_storage_backend(self, backend):\n        pass\n"
    )
    return place


def test_a_release_that_the_plugin_does_not_fit(tmp_path: Path, strange_sglang: Path) -> None:
    finding = _verdict(tmp_path, _fit(PYTHONPATH=str(strange_sglang)))
    assert finding.what == "plugin_misfit"
    assert "SGLang 9.9.9" in finding.evidence
    assert "has no parameter storage_backend" in finding.evidence


def test_a_plugin_that_does_not_load(tmp_path: Path, strange_sglang: Path) -> None:
    (strange_sglang / "sglang/srt/environ.py").write_text("raise OSError('planted')\n")
    finding = _verdict(tmp_path, _fit(PYTHONPATH=str(strange_sglang)))
    assert finding.what == "plugin_broken"
    assert "OSError: planted" in finding.evidence


def test_an_environment_without_the_plugin(tmp_path: Path, strange_sglang: Path) -> None:
    """The package is on the path, and not installed: nothing announces it to SGLang."""
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "flexkv_sglang").symlink_to(Path(flexkv_sglang.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-P", "-m", "flexkv_sglang.cli.doctor.plugin_check"],
        env={**os.environ, "PYTHONPATH": f"{bare}:{strange_sglang}"},
        capture_output=True,
        check=True,
        text=True,
    )
    finding = _verdict(tmp_path, Plugin(**json.loads(done.stdout.splitlines()[-1])))
    assert finding.what == "plugin_missing"


SLOTS = "sglang:flexkv_slots_total"


def test_a_server_without_the_backend(tmp_path: Path) -> None:
    found = doctor(tmp_path, answers(tmp_path, {"hicache_storage_backend": None}, scraped=False))
    assert causes(found) == ["not_attached"]
    assert "hicache_storage_backend is not set" in found["not_attached"].evidence
    for scraped in ({"metrics": {SLOTS: 0}}, {"scraped": False}):
        found = doctor(tmp_path, answers(tmp_path, {"hicache_storage_backend": "file"}, **scraped))
        assert "hicache_storage_backend is 'file'" in found["not_attached"].evidence
    found = doctor(tmp_path, answers(tmp_path, key=True, detached=True))
    assert causes(found) == ["not_attached"]
    assert "hicache_storage_backend is not set" in found["not_attached"].evidence


def test_one_of_two_servers_let_go_of_the_store(tmp_path: Path) -> None:
    """The other one holds the directory, and without the admin key only the series tell."""
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        assert storage.batch_exists(names(6)) == 6
        assert told(tmp_path, asked_pages=6)
        assert causes(doctor(tmp_path, answers(tmp_path))) == []
        found = doctor(tmp_path, answers(tmp_path, metrics={SLOTS: 0}))
    assert causes(found) == ["not_attached"]
    assert "sglang:flexkv_slots_total is 0" in found["not_attached"].evidence


def test_a_server_that_attached_at_run_time_is_not_reproached(tmp_path: Path) -> None:
    """Its flags do not say so, and the backend's status is not told without the admin key."""
    with closing(plain(tmp_path)) as storage:
        write(storage, 6)
        assert storage.batch_exists(names(6)) == 6
        assert told(tmp_path, asked_pages=6)
        for scraped in (True, False):
            flags = {"hicache_storage_backend": None}
            assert causes(doctor(tmp_path, answers(tmp_path, flags, scraped=scraped))) == []


def test_the_dynamic_backend_is_ours_only_with_our_class(tmp_path: Path) -> None:
    with closing(plain(tmp_path)):
        flags = {"hicache_storage_backend": "dynamic"}
        ours = answers(tmp_path, flags, {"class_name": "FlexKVStorage"}, key=True)
        assert "not_attached" not in doctor(tmp_path, ours)
        theirs = answers(tmp_path, flags, {"class_name": "Other"}, key=True)
        assert causes(doctor(tmp_path, theirs))[0] == "not_attached"


def test_a_server_with_another_path(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    found = doctor(tmp_path / "mine", answers(tmp_path / "theirs"))
    assert causes(found) == ["other_path"]
    assert f"the server's path: {tmp_path / 'theirs'}" in found["other_path"].evidence


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    facts = gather([tmp_path], ask_server(f"http://127.0.0.1:{free_port()}"), FITS, 0.0)
    assert facts.server is not None
    assert "refused" in facts.server.error
    with serving({"/server_info": (401, '{"error":"Unauthorized"}')}) as url:
        assert "HTTP 401" in ask_server(url).error
    with serving({"/get_server_info": (200, '{"version": "0.5.11"}')}) as url:
        assert ask_server(url).flags == {"version": "0.5.11"}
    assert causes(doctor(tmp_path, {})) == ["server_unreachable"]


def test_a_directory_that_was_given_up(tmp_path: Path) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 4)
        engine = store_of(storage, "kv").tiers[0]
        found: dict[str, Any] = {}

        def noticed() -> bool:
            if not engine._tier.stores[0].breaker.is_open:  # a probe closes it after a second
                engine._tier.stores[0].breaker.trip("planted")
            found.clear()
            found.update(doctor(tmp_path))
            return "breaker_open" in found

        assert wait_until(noticed)
    assert causes(found)[0] == "breaker_open"
    assert f"{tmp_path} is bypassed" in found["breaker_open"].evidence


def test_a_disk_that_others_fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(plain(tmp_path)) as storage:
        write(storage, 4)
        found = doctor(tmp_path, answers(tmp_path, extra={"min_free": "900TB"}))
        assert causes(found)[0] == "disk_full"
        assert "free, min_free is 818.5 TiB; 0 slots given back" in found["disk_full"].evidence
        monkeypatch.setattr(free_space, "floor_bytes", lambda *_: 10 * 4096)
        monkeypatch.setattr(free_space, "free_bytes", lambda *_: 0)
        engine = store_of(storage, "kv").tiers[0]
        for directory in engine._upkeep.directories:
            engine._free_space.keep_floor(directory)
        monkeypatch.undo()
        assert wait_until(lambda: "disk_full" in doctor(tmp_path))
        assert "slots given back" in doctor(tmp_path)["disk_full"].evidence


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as another user")


@needs_root
def test_files_of_another_user(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 2)
    for path in (tmp_path / "ns").glob("*.slots"):
        os.chown(path, 4321, -1)
    found = doctor(tmp_path)
    assert causes(found)[0] == "foreign_files"
    assert "belongs to user 4321, the folder to user 0" in found["foreign_files"].evidence


_AS_NOBODY = """
import os, sys
import flexkv_sglang.cli.doctor.command  # while the interpreter's files can still be read
from flexkv_sglang.cli.main import main
os.setgid(65534); os.setuid(65534)
sys.exit(main(sys.argv[1:]))
"""
_WITHOUT_RING = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
# Load the number of the system call; io_uring_setup (425) is answered EPERM, everything else is allowed.
code = b"".join(struct.pack("<HBBI", *step) for step in (
    (0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)))
memory = ctypes.create_string_buffer(code)
class Program(ctypes.Structure):
    _fields_ = [("count", ctypes.c_ushort), ("steps", ctypes.c_void_p)]
program = Program(4, ctypes.addressof(memory))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program), 0, 0) == 0, ctypes.get_errno()
from flexkv_sglang.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def _run(code: str, *words: object) -> tuple[int, Any]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, words), "--json"],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@needs_root
def test_a_directory_this_user_may_not_read(tmp_path: Path) -> None:
    die_after_put(tmp_path, PAGE, 2)
    code, fields = _run(_AS_NOBODY, "doctor", tmp_path)
    assert code == 1
    (finding,) = fields[
        "findings"
    ]  # of the plug-in nothing is known: a server may hold the directory
    assert finding["what"] == "no_access"
    assert os.strerror(errno.EACCES) in finding["evidence"]


def test_io_uring_that_the_kernel_refuses(tmp_path: Path) -> None:
    if file_system(str(tmp_path)) == "tmpfs":
        pytest.skip("the test's directory is memory: there is no ring to refuse")
    with closing(plain(tmp_path)) as storage:
        write(storage, 4)
        assert storage.batch_exists(names(4)) == 4
        assert told(tmp_path, asked_pages=4)
        code, fields = _run(_WITHOUT_RING, "doctor", tmp_path)
    assert code == 0, "slower, not wrong"
    (finding,) = fields["findings"]
    assert (finding["what"], finding["severity"]) == ("slow_io", "note")
    assert "io_engine=threads o_direct=true" in finding["evidence"]
    assert os.strerror(errno.EPERM) in finding["evidence"]


def test_a_network_file_system(tmp_path: Path) -> None:
    """Nothing can be mounted here, so the mount table alone is another."""
    device = os.stat(tmp_path).st_dev
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        f"22 1 {os.major(device)}:{os.minor(device)} / /data rw shared:1 - nfs4 host:/export rw,vers=4.2\n"
    )
    kind = file_system(str(tmp_path), mounts)
    assert kind == "nfs4"
    facts = facts_of(tmp_path)
    (place,) = facts.places
    assert place.disk is not None
    assert network(facts) is None
    far = replace(facts, places=(replace(place, disk=replace(place.disk, file_system=kind)),))
    finding = network(far)
    assert finding is not None
    assert "nfs4" in finding.evidence
