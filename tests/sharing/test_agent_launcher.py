"""AgentLauncher in one process: it starts an agent, waits longer after each failure, and outlives its own failures."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.sharing import agent_launcher
from flexkv_sglang.sharing.agent_launcher import AgentLauncher
from flexkv_sglang.sharing.run_dir import RunDir
from stores.engines import wait_until


@pytest.fixture
def config(tmp_path: Path) -> FlexKVConfig:
    share = {"peers": ["127.0.0.1:9"], "run_dir": str(tmp_path / "run")}
    return FlexKVConfig.parse({"path": str(tmp_path / "pages"), "share": share})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Times at which an agent was started; none of them lives."""
    at: list[float] = []
    monkeypatch.setattr(agent_launcher, "_IDLE_S", 0.01)
    monkeypatch.setattr(agent_launcher, "launch_agent", lambda *_: at.append(time.monotonic()))
    return at


def test_pauses_grow_while_no_agent_lives(
    config: FlexKVConfig, launches: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_launcher, "_PAUSE_S", 0.05)
    launcher = AgentLauncher(config, RunDir.of(config), check_s=0.01)
    launcher.start()
    try:
        assert wait_until(lambda: len(launches) == 4)
    finally:
        launcher.close()
    launcher.close()
    pauses = [later - at for at, later in pairwise(launches)]
    assert pauses[0] >= 0.8 * 0.05
    assert pauses[1] >= 0.8 * 0.1
    assert pauses[2] >= 0.8 * 0.2


def test_while_an_agent_lives_none_is_started_and_other_settings_are_logged_once(
    config: FlexKVConfig, launches: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = RunDir.of(config)
    agent = run_dir.take_agent_lock({"pid": 1, "settings": "of others", "by_hand": True})
    assert agent is not None
    idle: list[int] = []
    launcher = AgentLauncher(config, run_dir, lambda: idle.append(1), check_s=0.01)
    launcher.start()
    assert wait_until(lambda: len(idle) > 5)
    launcher.close()
    agent.close()
    assert not launches
    assert not launcher.usable
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "other settings of share" in caplog.text


def test_a_failure_of_idle_is_logged_and_the_thread_goes_on(
    config: FlexKVConfig, launches: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[int] = []

    def idle() -> None:
        calls.append(1)
        raise ValueError("bad")

    launcher = AgentLauncher(config, RunDir.of(config), idle)
    launcher.start()
    assert wait_until(lambda: len(calls) == 2)
    launcher.close()
    assert [record.getMessage() for record in caplog.records] == [
        "flexkv: the replica cannot be followed"
    ]


def test_a_removed_run_directory_is_made_again_and_the_report_written_again(
    config: FlexKVConfig, launches: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_launcher, "_PAUSE_S", 0.01)
    monkeypatch.setattr(agent_launcher, "_PAUSE_MAX_S", 0.05)
    run_dir = RunDir.of(config)
    reported = [{"usable": True}]
    launcher = AgentLauncher(config, run_dir, lambda: launcher.report(reported[0]), check_s=0.01)
    launcher.start()
    try:
        assert wait_until(lambda: list(run_dir.reports().values()) == reported)
        shutil.rmtree(run_dir.path)
        assert wait_until(lambda: list(run_dir.reports().values()) == reported)
    finally:
        launcher.close()
    assert run_dir.ranks() == 0
