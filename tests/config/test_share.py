"""Settings of sharing: valid ones are parsed; an error names the key, the value and the valid values."""

from __future__ import annotations

from typing import Any

import pytest

from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.config.share import parse_share
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.printable import redacted


def share(**given: Any) -> Any:
    return FlexKVConfig.parse({"share": given}).share


def test_nothing_is_shared_by_default() -> None:
    assert not FlexKVConfig.parse({}).share.wanted
    assert not share(cluster_id="blue").wanted


def test_one_url_is_enough_and_so_are_peers() -> None:
    assert (
        FlexKVConfig.parse({"redis_url": "redis://r:6379/0"}).share.redis_url == "redis://r:6379/0"
    )
    found = FlexKVConfig.parse({"peers": ["10.0.0.5:7400"], "share": {"cluster_id": "blue"}}).share
    assert (found.peers, found.cluster_id, found.wanted) == (("10.0.0.5:7400",), "blue", True)


@pytest.mark.parametrize(("total_mb", "reader_mb"), [(8, 8), (100, 64), (256, 64), (1024, 256)])
def test_one_reader_gets_a_quarter_of_the_serving_memory(total_mb: int, reader_mb: int) -> None:
    found = share(serve_inflight_mb=total_mb)
    assert (found.serve_inflight, found.serve_inflight_peer) == (total_mb << 20, reader_mb << 20)


def test_pod_is_the_former_name_of_share_group() -> None:
    assert share(pod="rack-1").share_group == share(share_group="rack-1").share_group == "rack-1"
    with pytest.raises(ConfigError, match=r"share\.pod: .*share\.share_group"):
        share(pod="rack-1", share_group="rack-1")


@pytest.mark.parametrize(
    "key",
    [
        "heartbeat_s",
        "node_ttl_s",
        "remote_deadline_ms",
        "serve_inflight_peer_mb",
        "serve_depth",
        "publish_flush_ms",
        "replica_ttl_s",
        "agent_linger_s",
    ],
)
def test_a_removed_setting_is_refused_with_advice(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"^share\.{key}: .+, but it is no longer a setting: remove it\. .+\.$"
    ):
        share(**{key: 1})


def test_the_json_sets_only_settings() -> None:
    assert share(redis_url="redis://r").settings().keys() == {
        "redis_url",
        "redis_password_file",
        "redis_ca_file",
        "peers",
        "cluster_id",
        "node_id",
        "listen",
        "advertise",
        "secret_file",
        "auth",
        "insecure",
        "share_group",
        "engine",
        "promote",
        "recompute_tokens_per_s",
        "serve_inflight",
        "run_dir",
    }


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
        (
            {"recompute_tokens_per_s": -1},
            ["share.recompute_tokens_per_s", "-1", "tokens per second"],
        ),
        ({"recompute_tokens_per_s": True}, ["share.recompute_tokens_per_s"]),
        ({"serve_inflight_mb": "8"}, ["share.serve_inflight_mb", "MiB"]),
    ],
)
def test_an_error_names_key_value_and_valid_values(given: dict[str, Any], names: list[str]) -> None:
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
    assert redacted("fk:se:cret@r:6379/0") == "fk:***@r:6379/0", "also without a scheme"


@pytest.mark.parametrize("name", ["zmq", "nixl", "mooncake"])
def test_engines_have_names(name: str) -> None:
    assert share(engine=name).engine == name


def test_the_description_names_keys_that_can_be_given() -> None:
    given = {"nid": "x", "pod": "rack", "serve_inflight_mb": 64}
    config = parse_share("share", {"peers": ["h:1"], **given})
    assert config.describe() == (
        "{'peers': ('h:1',), 'nid': 'x', 'share_group': 'rack', 'serve_inflight_mb': 64}"
    )
