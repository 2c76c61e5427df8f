"""Settings of sharing: what is accepted; everything else is refused with key, value and what is valid."""

from __future__ import annotations

from typing import Any

import pytest

from flexkv_sglang.config.parsers import redacted
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError


def share(**given: Any) -> Any:
    return FlexKVConfig.parse({"share": given}).share


def test_nothing_is_shared_unless_asked_for() -> None:
    assert not FlexKVConfig.parse({}).share.wanted
    assert not share(cluster_id="blue").wanted


def test_one_url_is_enough_and_so_are_peers() -> None:
    assert (
        FlexKVConfig.parse({"redis_url": "redis://r:6379/0"}).share.redis_url == "redis://r:6379/0"
    )
    found = FlexKVConfig.parse({"peers": ["10.0.0.5:7400"], "share": {"cluster_id": "blue"}}).share
    assert (found.peers, found.cluster_id, found.wanted) == (("10.0.0.5:7400",), "blue", True)


def test_units_are_those_of_the_keys_names() -> None:
    found = share(remote_deadline_ms=400, serve_inflight_mb=8, publish_flush_ms=20)
    assert found.remote_deadline_s == pytest.approx(0.4)
    assert (found.serve_inflight, found.publish_flush_s) == (8 << 20, pytest.approx(0.02))


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"redis": "x"}, ["share.redis", "redis_url"]),
        ({"redis_url": "http://x"}, ["share.redis_url", "http://x", "redis://"]),
        ({"redis_url": ""}, ["share.redis_url"]),
        ({"peers": "10.0.0.5:7400"}, ["share.peers", "list"]),
        ({"peers": ["10.0.0.5"]}, ["share.peers[0]", "host:port"]),
        ({"peers": ["10.0.0.5:99999"]}, ["share.peers[0]", "99999"]),
        ({"listen": "0.0.0.0"}, ["share.listen", "host:port"]),
        ({"cluster_id": "a b"}, ["share.cluster_id", "a b"]),
        ({"nid": ""}, ["share.nid"]),
        ({"auth": "none"}, ["share.auth", "curve", "hmac"]),
        ({"insecure": 1}, ["share.insecure", "true or false"]),
        ({"engine": "rdma"}, ["share.engine", "zmq, nixl, mooncake"]),
        ({"heartbeat_s": 0}, ["share.heartbeat_s", "seconds"]),
        ({"heartbeat_s": True}, ["share.heartbeat_s"]),
        ({"heartbeat_s": 2, "node_ttl_s": 3}, ["share.node_ttl_s", "heartbeat", "4"]),
        ({"serve_inflight_mb": "8"}, ["share.serve_inflight_mb", "MiB"]),
    ],
)
def test_errors_name_key_value_and_what_is_valid(given: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        share(**given)
    for name in names:
        assert name in str(caught.value)


def test_given_twice() -> None:
    with pytest.raises(ConfigError, match=r"redis_url.*twice.*share\.redis_url"):
        FlexKVConfig.parse({"redis_url": "redis://a", "share": {"redis_url": "redis://b"}})


def test_a_password_is_never_shown() -> None:
    url = "rediss://fk:s3cret@redis.example:6379/0"
    assert redacted(url) == "rediss://fk:***@redis.example:6379/0"
    assert "s3cret" not in FlexKVConfig.parse({"redis_url": url}).describe()
    with pytest.raises(ConfigError) as caught:
        share(redis_url="https://fk:s3cret@redis.example/0")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {"redis_url": "redis://fk:s3cret@a", "share": {"redis_url": "redis://fk:s3cret@b"}},
        {"redis_urll": "redis://fk:s3cret@a"},
        {"share": {"redis": "redis://:s3cret@a"}},
        {"share": "redis://:s3cret@a"},
        {"redis_url": ["redis://fk:s3cret@a"]},
        {"redis_url": "redis://fk:s3cret@[::1"},
        {"redis_url": "http://fk:s3cret#1@a"},
        {"redis_url": "http://fk:1/s3cret@a"},
    ],
)
def test_errors_show_no_password(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        FlexKVConfig.parse(given)
    assert "s3cret" not in str(caught.value)


def test_a_password_with_any_character_is_redacted() -> None:
    for password in ("s3cret#1", "1/s3cret", "s3@cret", "?s3cret"):
        assert redacted(f"redis://fk:{password}@r:6379/0") == "redis://fk:***@r:6379/0"
    assert redacted("redis://fk@r:6379/0") == "redis://fk@r:6379/0"
    assert redacted("redis://r:6379/0") == "redis://r:6379/0"


@pytest.mark.parametrize("name", ["zmq", "nixl", "mooncake"])
def test_engines_have_names(name: str) -> None:
    assert share(engine=name).engine == name
