"""An agent that is of no use is replaced: real agents, and the launcher of one rank process that looks often."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.backends.fleet.wire.curve import Secret
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing import agent_launcher
from flexkv_sglang.sharing.agent_launcher import AgentLauncher
from flexkv_sglang.sharing.lifecycle.fitness import new_card, settings_digest, share_digest
from flexkv_sglang.sharing.run_dir import RunDir
from stores.engines import wait_until

START_S = 15.0
_AGENT = Path(__file__).parents[1] / "support" / "nodes" / "fleet_agent.py"
FLEXKV = (sys.executable, "-P", str(_AGENT), json.dumps({"heartbeat_s": 0.3}))

Launch = Callable[..., AgentLauncher]


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    """Whatever agent lives there at the end, or is about to, is killed."""
    found = RunDir(tmp_path / "run")
    found.make()
    yield found
    word = os.fsencode(found.path)
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if word in (process / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)


def config_of(tmp_path: Path, **share: Any) -> FlexKVConfig:
    given = {"peers": ["127.0.0.1:9"], "listen": "127.0.0.1:0", "run_dir": str(tmp_path / "run")}
    return FlexKVConfig.parse({"path": str(tmp_path / "pages"), "share": {**given, **share}})


@pytest.fixture
def launch(run_dir: RunDir, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launch]:
    """Launchers of this process, which look ten times a second; closed at the end."""
    monkeypatch.setattr(agent_launcher, "_IDLE_S", 0.05)
    monkeypatch.setattr(agent_launcher, "_PAUSE_S", 0.5)
    with ExitStack() as stack:

        def make(config: FlexKVConfig, **more: Any) -> AgentLauncher:
            Path(config.tiers[0].path[0]).mkdir(exist_ok=True)
            launcher = AgentLauncher(config, run_dir, check_s=0.1, flexkv=FLEXKV, **more)
            stack.callback(launcher.close)
            launcher.start()
            return launcher

        yield make


def ready(run_dir: RunDir, **fields: object) -> bool:
    card = run_dir.agent() or {}
    return bool(card.get("ready")) and fields.items() <= card.items()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_other_settings_and_a_port_that_passes_on(
    tmp_path: Path, run_dir: RunDir, launch: Launch
) -> None:
    port = free_port()
    first = config_of(tmp_path, listen=f"127.0.0.1:{port}")
    launcher = launch(first)
    assert wait_until(lambda: ready(run_dir), START_S), run_dir.log_path.read_text()
    former = run_dir.agent()
    launcher.close()
    second = config_of(tmp_path, listen=f"127.0.0.1:{port}", promote=False)
    metrics = Metrics()
    lost = []
    launch(second, metrics=metrics)
    digest = share_digest(second.share)
    assert wait_until(
        lambda: lost.append(run_dir.agent() is None) or ready(run_dir, share=digest), START_S
    ), run_dir.log_path.read_text()
    now = run_dir.agent()
    assert former is not None
    assert now is not None
    assert now["pid"] != former["pid"]
    assert now["addresses"] == [f"127.0.0.1:{port}"]
    assert now["succeeds"] == former["instance"]
    assert wait_until(lambda: metrics.gauges().get(("agent_unfit", "settings")) == 0.0)
    assert wait_until(lambda: metrics.gauges()["agent_up", ""] == 1.0)


def test_another_content_of_the_secret_is_noticed_while_servers_run(
    tmp_path: Path, run_dir: RunDir, launch: Launch
) -> None:
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_bytes(secrets.token_bytes(32))
    renewed: list[Secret | None] = []
    launch(config_of(tmp_path, secret_file=str(path)), new_secret=renewed.append)
    assert wait_until(lambda: ready(run_dir), START_S), run_dir.log_path.read_text()
    kid = (run_dir.agent() or {})["secret"]
    path.write_bytes(secrets.token_bytes(33))
    assert wait_until(
        lambda: ready(run_dir) and (run_dir.agent() or {}).get("secret") not in (None, kid), START_S
    ), run_dir.log_path.read_text()
    assert len(renewed) == 1


def test_an_agent_that_others_need_stays_until_they_have_gone(
    tmp_path: Path, run_dir: RunDir, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(config_of(tmp_path)).close()
    assert wait_until(lambda: ready(run_dir), START_S), run_dir.log_path.read_text()
    former = run_dir.agent()
    assert former is not None
    other = run_dir.take_rank_lock()
    other.write(json.dumps({"fits": former["instance"], "usable": True}))
    second = config_of(tmp_path, promote=False)
    launcher = launch(second)
    assert wait_until(lambda: "is not replaced" in caplog.text, START_S)
    assert f"server processes {os.getpid()} use it" in caplog.text
    assert "Give all servers of a node the same settings" in caplog.text
    assert not launcher.usable
    assert (run_dir.agent() or {})["pid"] == former["pid"]
    other.close()
    assert wait_until(lambda: ready(run_dir, share=share_digest(second.share)), START_S)
    assert wait_until(lambda: launcher.usable)


def test_an_agent_started_by_hand_stays(
    tmp_path: Path, run_dir: RunDir, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    card = {**new_card(config_of(tmp_path).share, "", by_hand=True), "protocol": 1, "ready": True}
    lock = run_dir.take_agent_lock(card)
    assert lock is not None
    launch(config_of(tmp_path))
    assert wait_until(lambda: "it was started by hand" in caplog.text)
    assert run_dir.agent() == card
    lock.close()


_OLD = """
import json, os, sys, time
from pathlib import Path
from flexkv_sglang.backends.file_lock import FileLock
lock = FileLock.take(Path(sys.argv[1]) / "agent.lock", os.O_CREAT)
lock.write(json.dumps({"pid": os.getpid(), "settings": sys.argv[2]}))
print("held", flush=True)
time.sleep(600)
"""


def test_an_agent_of_version_0_1_is_ended(tmp_path: Path, run_dir: RunDir, launch: Launch) -> None:
    config = config_of(tmp_path)
    words = [str(run_dir.path), settings_digest(config.share), "agent", "--for-ranks"]
    with subprocess.Popen(
        [sys.executable, "-P", "-c", _OLD, *words], stdout=subprocess.PIPE, text=True
    ) as old:
        assert old.stdout is not None
        assert old.stdout.readline() == "held\n"
        launch(config)
        assert old.wait(START_S) == -signal.SIGTERM
    assert wait_until(lambda: ready(run_dir), START_S), run_dir.log_path.read_text()


def test_a_successor_that_dies_changes_nothing(
    tmp_path: Path, run_dir: RunDir, launch: Launch
) -> None:
    launcher = launch(config_of(tmp_path))
    assert wait_until(lambda: ready(run_dir), START_S), run_dir.log_path.read_text()
    former = run_dir.agent()
    assert former is not None
    heir = run_dir.take_agent_lock({"succeeds": former["instance"], "ready": False}, "agent.next")
    assert heir is not None
    written = run_dir.status().get("written_at")
    assert wait_until(lambda: run_dir.status().get("written_at", 0) > (written or 0) + 1)
    heir.write(json.dumps({"succeeds": "another", "ready": True}))
    heir.close()
    assert (run_dir.agent() or {})["pid"] == former["pid"]
    assert launcher.usable


def test_why_an_agent_cannot_start_is_in_the_servers_log(
    tmp_path: Path, run_dir: RunDir, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    launch(config_of(tmp_path, listen="192.0.2.7:7400", insecure=True))
    assert wait_until(lambda: "flexkv: agent: it could not start" in caplog.text, START_S)
    assert "192.0.2.7:7400" in caplog.text


def test_a_port_in_use_is_said_and_taken_when_it_is_free(
    tmp_path: Path, run_dir: RunDir, launch: Launch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        launch(config_of(tmp_path, listen=f"127.0.0.1:{port}"))
        assert wait_until(lambda: "the port is in use" in caplog.text, START_S)
        assert "flexkv: agent:" in caplog.text
        assert ready(run_dir, addresses=[])
    assert wait_until(lambda: ready(run_dir, addresses=[f"127.0.0.1:{port}"]), START_S)


def test_threads_end(tmp_path: Path, run_dir: RunDir, launch: Launch) -> None:
    before = threading.active_count()
    launch(config_of(tmp_path)).close()
    assert threading.active_count() <= before
    assert wait_until(lambda: ready(run_dir), START_S), run_dir.log_path.read_text()
