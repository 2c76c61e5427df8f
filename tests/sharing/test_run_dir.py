"""The run directory: one agent per directory, rank locks; all of it among several processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.sharing.lifecycle.fitness import new_card, settings_digest, share_digest
from flexkv_sglang.sharing.run_dir import RunDir, needing


@pytest.fixture
def config(tmp_path: Path) -> FlexKVConfig:
    given = {
        "path": str(tmp_path / "pages"),
        "share": {"peers": ["127.0.0.1:7400"], "run_dir": str(tmp_path / "run")},
    }
    return FlexKVConfig.parse(given)


def test_one_agent_and_its_settings(config: FlexKVConfig) -> None:
    run_dir = RunDir.of(config)
    assert run_dir.agent() is None
    card = new_card(config.share, "", by_hand=False)
    lock = run_dir.take_agent_lock(card)
    assert lock is not None
    assert run_dir.take_agent_lock(card) is None
    assert run_dir.agent() == card
    assert card["pid"] == os.getpid()
    assert card["settings"] == settings_digest(config.share)
    lock.close()
    assert run_dir.agent() is None


def test_a_rank_that_is_killed_is_no_rank_any_more(config: FlexKVConfig, tmp_path: Path) -> None:
    run_dir = RunDir.of(config)
    code = (
        "import sys; from pathlib import Path; from flexkv_sglang.sharing.run_dir import RunDir\n"
        "lock = RunDir(Path(sys.argv[1])).take_rank_lock(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(run_dir.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        assert run_dir.ranks() == 1
        child.kill()
        child.wait()
    assert run_dir.ranks() == 0
    assert list((run_dir.path / "ranks").iterdir()) == []


def test_places_of_all_configurations(config: FlexKVConfig, tmp_path: Path) -> None:
    run_dir = RunDir.of(config)
    run_dir.add_places(config)
    run_dir.add_places(FlexKVConfig.parse({"path": ["/x/a", "/x/b"], "io_engine": "threads"}))
    (run_dir.path / "places" / ".half").write_text("{")
    (run_dir.path / "places" / "0bad").write_text("{")
    assert run_dir.places() == {
        str(tmp_path / "pages"): "auto",
        "/x/a": "threads",
        "/x/b": "threads",
    }


def test_an_agent_starts_with_the_given_configuration(config: FlexKVConfig) -> None:
    run_dir = RunDir.of(config)
    run_dir.write_config(config)
    assert run_dir.config_path.stat().st_mode & 0o77 == 0  # there may be a password in it
    assert FlexKVConfig.parse(json.loads(run_dir.config_path.read_text())) == config


def test_settings_that_differ_without_harm() -> None:
    def digest(**share: object) -> str:
        return settings_digest(FlexKVConfig.parse({"share": share}).share)

    assert digest(listen="127.0.0.1:1") == digest(nid="x") == digest()
    assert digest(cluster_id="blue") != digest()
    assert digest(secret_file="/s") != digest()


def test_settings_that_an_agent_and_its_servers_must_have_in_common() -> None:
    def digest(**share: object) -> str:
        return share_digest(FlexKVConfig.parse({"share": share}).share)

    assert digest(nid="x", run_dir="/r") == digest()
    assert digest(secret_file="/s") == digest(secret_file="/t")  # compared by content
    different = [{}, {"secret_file": "/s"}, {"listen": "127.0.0.1:1"}, {"advertise": "h:1"}]
    different += [{"redis_url": "redis://h"}, {"cluster_id": "blue"}, {"serve_inflight_mb": 8}]
    assert len({digest(**share) for share in different}) == len(different)


def test_ranks_that_keep_an_agent_alive() -> None:
    reports = {
        "1-a": {"fits": "mine", "usable": True},
        "2-b": {"fits": "other", "usable": True},
        "3-c": {"unfit": "runs with other settings", "usable": False},
        "7-g": {"unfit": "is of release 0.1", "usable": True},  # until it is replaced
        "4-d": {},  # has not decided yet
        "5-e": {"usable": True, "breakers": {}},  # of version 0.1, which uses it
        "6-f": {"usable": False, "breakers": {}},  # of version 0.1, which refuses it
    }
    assert needing("mine", reports) == ["1-a", "4-d", "5-e"]


def test_an_agent_of_version_0_1_has_the_same_settings() -> None:
    """Its digests, computed by version 0.1: an old agent may outlive the upgrade of the servers beside it."""
    plain = FlexKVConfig.parse({"redis_url": "redis://127.0.0.1:6379/0"})
    assert settings_digest(plain.share) == "ef352a6d605589f5"
    more = FlexKVConfig.parse(
        {"peers": ["10.0.0.5:7400"], "share": {"pod": "rack", "promote": False}}
    )
    assert settings_digest(more.share) == "29c6cffd048a2088"


def test_a_run_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = FlexKVConfig.parse(
        {"path": str(tmp_path / "p"), "share": {"run_dir": str(tmp_path / "file" / "run")}}
    )
    with pytest.raises(ConfigError, match=r"share\.run_dir.*file/run"):
        RunDir.of(config)


def test_a_rank_lock_appears_held(config: FlexKVConfig) -> None:
    """The agent looks at all locks every second, and removes those without a holder."""
    run_dir = RunDir.of(config)
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            run_dir.ranks()
            run_dir.breakers()

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for thread in lookers:
        thread.start()
    try:
        for _ in range(300):
            lock = run_dir.take_rank_lock()
            assert lock.in_place
            lock.close()
    finally:
        done.set()
        for thread in lookers:
            thread.join()


def test_a_lock_whose_file_was_removed_is_not_in_place(config: FlexKVConfig) -> None:
    run_dir = RunDir.of(config)
    lock = run_dir.take_agent_lock({})
    assert lock is not None
    assert lock.in_place
    shutil.rmtree(run_dir.path)
    assert not lock.in_place
    run_dir.make()
    other = run_dir.take_agent_lock({})
    assert other is not None
    assert not lock.in_place
    lock.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        lock.write("")  # not into a file that has this number by now
    assert other.in_place


def test_a_run_directory_that_others_can_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/shm is open to all users: the owner of the directory above ours could read the password in agent.json."""
    monkeypatch.setattr("flexkv_sglang.sharing.run_dir._MEMORY", tmp_path / "shm")
    above = tmp_path / "shm" / f"flexkv-{os.getuid()}"
    above.mkdir(parents=True)
    above.chmod(0o777)
    config = FlexKVConfig.parse({"path": str(tmp_path / "p"), "peers": ["127.0.0.1:7400"]})
    run_dir = RunDir.of(config)
    assert run_dir.path.parent == above
    assert [path.stat().st_mode & 0o777 for path in (above, run_dir.path)] == [0o700, 0o700]
    shutil.move(above, tmp_path / "elsewhere")
    above.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="is a link"):
        RunDir.of(config)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a directory away")
def test_a_run_directory_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flexkv_sglang.sharing.run_dir._MEMORY", tmp_path / "shm")
    above = tmp_path / "shm" / "flexkv-0"
    above.mkdir(parents=True)
    os.chown(above, 65534, 65534)
    config = FlexKVConfig.parse({"path": str(tmp_path / "p"), "peers": ["127.0.0.1:7400"]})
    with pytest.raises(ConfigError, match="belongs to another user"):
        RunDir.of(config)
