"""Sharing in one process: refused settings, and attaching again and again."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.sharing.node_identity import node_name
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.sharing.run_dir import RunDir
from stores.engines import wait_until

NAMESPACE = "a" * 26


def config(tmp_path: Path, **share: Any) -> FlexKVConfig:
    told = {"peers": ["127.0.0.1:9"], "listen": "127.0.0.1:0", "run_dir": str(tmp_path / "run")}
    return FlexKVConfig.parse({"path": str(tmp_path / "pages"), "share": {**told, **share}})


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[RunDir]:
    """Whatever agent lives there at the end is killed."""
    found = RunDir(tmp_path / "run")
    yield found
    assert wait_until(lambda: (found.agent() or {}).get("pid") is not None)
    agent = found.agent()
    assert agent is not None
    os.kill(agent["pid"], signal.SIGKILL)


@pytest.mark.parametrize(
    ("share", "names"),
    [
        ({"redis_url": "redis://h/not-a-number"}, "redis_url"),
        ({"redis_url": "redis://h", "redis_ca_file": "/ca"}, "redis_ca_file"),
        ({"redis_url": "redis://u:p@h", "redis_password_file": "/p"}, "redis_password_file"),
        ({"listen": "10.0.0.5:7400"}, "secret"),
        ({"listen": "0.0.0.0:7400", "insecure": True}, "advertise"),
        ({"secret_file": "/nowhere"}, "secret_file"),
    ],
)
def test_what_an_agent_would_refuse_the_server_refuses(
    tmp_path: Path, share: dict[str, Any], names: str
) -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match=names):
        Sharing(config(tmp_path, **share), Metrics())
    assert threading.active_count() == before


def test_attached_again_and_again(tmp_path: Path, run_dir: RunDir) -> None:
    """Detaching leaves no thread, no descriptor and no lock; the agent stays, and is found again."""
    pids, counts = set(), []
    gc.collect()  # of earlier tests
    for _ in range(4):
        sharing = Sharing(config(tmp_path), Metrics())
        pages = sharing.pages(NAMESPACE, {"page_size": 16}, 4096, Metrics())
        assert pages is not None
        assert pages.prefix([]) == 0
        assert wait_until(lambda: (run_dir.agent() or {}).get("pid") is not None)
        assert run_dir.ranks() == 1
        pids.add((run_dir.agent() or {})["pid"])
        pages.close()
        sharing.close()
        sharing.close()
        assert run_dir.ranks() == 0
        counts.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    assert len(pids) == 1
    # Descriptors of earlier tests may end meanwhile; one that each round leaves would make the count grow.
    assert counts[3][0] <= counts[1][0], counts
    assert {threads for _, threads in counts} == {counts[0][1]}


def test_weights_without_a_name_are_not_shared(tmp_path: Path, run_dir: RunDir) -> None:
    sharing = Sharing(config(tmp_path), Metrics())
    assert sharing.pages(NAMESPACE, {"epoch": "nonce", "page_size": 16}, 4096, Metrics()) is None
    sharing.close()


def test_relative_paths_are_those_of_the_server(
    tmp_path: Path, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(range(32)))
    (tmp_path / "secret").chmod(0o600)
    told = config(tmp_path, run_dir="run", secret_file="secret", auth="hmac").given
    here = FlexKVConfig.parse({**told, "path": "pages"})
    sharing = Sharing(here, Metrics())
    try:
        assert wait_until(lambda: "nid" in run_dir.status())
        assert run_dir.status()["nid"] == node_name(here)
        assert run_dir.status()["directories"] == [str(tmp_path / "pages")]
        assert not Path("/pages").exists()
    finally:
        sharing.close()
