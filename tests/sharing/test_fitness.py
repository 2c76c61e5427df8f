"""Which agent fits: each way to be unfit, from the card in its lock."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.sharing.lifecycle import fitness
from flexkv_sglang.sharing.lifecycle.fitness import (
    Fitness,
    is_local,
    is_older,
    new_card,
    settings_digest,
)

NOW = 1000.0


def share(**settings: Any) -> ShareConfig:
    return FlexKVConfig.parse({"share": {"peers": ["127.0.0.1:9"], **settings}}).share


def card(**changes: Any) -> dict[str, Any]:
    """Of an agent that fits ``share()`` at ``NOW``."""
    fresh = new_card(share(), "", by_hand=False)
    return {**fresh, "started": NOW - 5, "ready": True, "addresses": ["127.0.0.1:5"], **changes}


def test_an_agent_that_fits() -> None:
    assert Fitness(share()).unfit(card(), 0.2, NOW) is None
    assert Fitness(share()).unfit({}, 0.2, NOW) is None  # it has just taken its lock
    assert Fitness(share()).unfit(card(ready=False), 90.0, NOW) is None  # it has just started


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol": 9}, "protocol"),
        ({"replica": 2}, "replica"),
        ({"share": "of others"}, "settings"),
        ({"secret": "3f3f3f3f3f3f3f3f"}, "secret"),
        ({"ready": False, "started": NOW - 61}, "not_ready"),
    ],
)
def test_an_agent_that_cannot_be_used(changes: dict[str, Any], reason: str) -> None:
    unfit = Fitness(share()).unfit(card(**changes), 0.2, NOW)
    assert unfit is not None
    assert (unfit.reason, unfit.usable) == (reason, False)


def test_an_agent_that_is_used_until_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "RELEASE", "0.3.0")
    older = Fitness(share()).unfit(card(release="0.2.9"), 0.2, NOW)
    assert older is not None
    assert (older.reason, older.usable) == ("release", True)
    assert Fitness(share()).unfit(card(release="0.4.0"), 0.2, NOW) is None  # newer is no harm
    silent = Fitness(share()).unfit(card(release="0.3.0"), 11.0, NOW)
    assert silent is not None
    assert (silent.reason, silent.usable) == ("silent", True)


def test_an_agent_of_version_0_1() -> None:
    same = Fitness(share()).unfit({"pid": 5, "settings": settings_digest(share())}, 0.2, NOW)
    assert same is not None
    assert (same.reason, same.usable) == ("release", True)
    other = Fitness(share()).unfit({"pid": 5, "settings": "of others"}, 0.2, NOW)
    assert other is not None
    assert (other.reason, other.usable) == ("settings", False)


def test_an_agent_whose_address_is_gone_for_10_s() -> None:
    gone, wanted = card(addresses=["192.0.2.7:7400"]), Fitness(share())
    assert wanted.unfit(gone, 0.2, NOW) is None
    assert wanted.unfit(gone, 0.2, NOW + 9) is None
    unfit = wanted.unfit(gone, 0.2, NOW + 11)
    assert unfit is not None
    assert unfit.reason == "address"
    assert wanted.unfit(card(), 0.2, NOW + 12) is None
    assert wanted.unfit(gone, 0.2, NOW + 13) is None  # counted from here again
    elsewhere = {**gone, "net_ns": "net:[1]"}  # of another container, which has that address
    assert wanted.unfit(elsewhere, 0.2, NOW + 30) is None


def test_releases() -> None:
    assert is_older("0.9.1", "0.10")
    assert is_older("0.1.0", "0.1.1.dev3")
    for theirs, ours in [("0.2", "0.1"), ("0.1", "0.1"), ("", "0.1"), ("0.1", ""), ("x", "0.1")]:
        assert not is_older(theirs, ours)


def test_local_addresses() -> None:
    assert is_local("127.0.0.1:7400")
    assert is_local("0.0.0.0:1")
    assert not is_local("192.0.2.7:7400")
    assert is_local("a-name:1")  # whether it is ours cannot be said


def write_secret(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)


def test_the_content_of_the_secret(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "secret"
    write_secret(path, bytes(range(32)))
    wanted = Fitness(share(secret_file=str(path)))
    first, kid = wanted.secret.current, wanted.secret.kid
    assert len(kid) == 16
    assert not wanted.secret.changed()
    theirs = {
        **card(),
        "share": fitness.share_digest(share(secret_file="/elsewhere")),
        "secret": kid,
    }
    assert wanted.unfit(theirs, 0.2, NOW) is None  # the same content at another path
    write_secret(path, bytes(range(1, 33)))
    assert wanted.secret.changed()
    assert wanted.secret.current != first
    unfit = wanted.unfit(theirs, 0.2, NOW)
    assert unfit is not None
    assert unfit.reason == "secret"
    os.utime(path)
    assert not wanted.secret.changed()  # the same bytes, written again
    second = wanted.secret.kid
    path.unlink()
    assert not wanted.secret.changed()
    write_secret(path, b"short")
    assert not wanted.secret.changed()
    assert wanted.secret.kid == second
    assert "the former secret stays in use" in caplog.text
    assert "short" not in caplog.text


def test_a_name_of_a_secret_depends_on_the_cluster(tmp_path: Path) -> None:
    write_secret(tmp_path / "secret", bytes(range(32)))
    kids = [
        Fitness(share(secret_file=str(tmp_path / "secret"), cluster_id=name)).secret.kid
        for name in ("red", "blue", "red")
    ]
    assert kids[0] == kids[2] != kids[1]
