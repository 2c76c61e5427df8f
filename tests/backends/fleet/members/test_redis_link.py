"""Connections to Redis: URLs, hidden passwords, the ACL user of the documentation, TLS, Sentinel."""

from __future__ import annotations

import logging
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import redis

from flexkv_sglang.backends.fleet.members.redis_link import (
    RedisAddress,
    RedisLink,
    parse_redis_url,
)
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.printable import redacted
from nodes.fleet_bed import NS, Node, Wires, eventually, fingerprints
from nodes.redis_server import ACL, RedisServer, free_port

SECRET = "correct-horse"


pytestmark = pytest.mark.usefixtures("short_waits")


def meet(share: ShareConfig) -> None:
    """Two nodes find each other and follow each other, over this Redis."""
    wires = Wires()
    share = replace(share, heartbeat_s=0.1, node_ttl_s=0.6)
    with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
        assert eventually(lambda: one.knows(two) and two.knows(one))
        one.logs.log(NS).add(fingerprints(1, 2))
        assert eventually(lambda: one.knows(two) and two.knows(one))
        assert one.counts["share_redis_errors"] == two.counts["share_redis_errors"] == 0


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h", RedisAddress("redis", (("h", 6379),))),
        ("redis://u:p%40@h:1/3", RedisAddress("redis", (("h", 1),), db=3, user="u", password="p@")),
        ("redis://:p@[::1]:7", RedisAddress("redis", (("::1", 7),), password="p")),
        ("rediss://u@h?ssl_ca_certs=/ca",
         RedisAddress("rediss", (("h", 6379),), user="u", tls={"ssl_ca_certs": "/ca"})),
        ("redis+sentinel://a,b:9/main/2",
         RedisAddress("redis+sentinel", (("a", 26379), ("b", 9)), service="main", db=2)),
        ("unix:///run/redis", RedisAddress("unix", (), socket_path="/run/redis")),
    ],
)  # fmt: skip
def test_valid_urls(url: str, address: RedisAddress) -> None:
    assert parse_redis_url(url) == address
    assert "p@" not in str(parse_redis_url(url)).replace("@h", "")


@pytest.mark.parametrize(
    "url",
    ["", "h:1", "http://h", f"redis://u:{SECRET}@", f"redis://u:{SECRET}@h:port", "redis://h/x", "redis://h/1/2",
     f"redis://u:{SECRET}@a,b", f"redis://u:{SECRET}@h?ssl_ca_certs=x", "rediss://h?ssl_cert_reqs=none",
     "redis://h?protocol=4", "redis://h?sentinel_auth=x", "redis+sentinel://h", "redis://h#x", "redis://h:0x1"],
)  # fmt: skip
def test_a_wrong_url_is_refused_and_shows_no_password(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_redis_url(url)
    assert "redis_url" in str(caught.value)
    assert "valid: redis://" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_two_passwords_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="redis_password_file"):
        parse_redis_url("redis://u:p@h", "/secret")


def test_an_authority_is_a_file_of_the_settings_or_of_the_url() -> None:
    address = RedisAddress("rediss", (("h", 6379),), tls={"ssl_ca_certs": "/ca"})
    assert parse_redis_url("rediss://h", None, "/ca") == address
    assert parse_redis_url("rediss://h?ssl_ca_certs=/ca", None, "/ca") == address
    for wrong in ("redis://h", "rediss://h?ssl_ca_certs=/other"):
        with pytest.raises(ConfigError, match="redis_ca_file"):
            parse_redis_url(wrong, None, "/ca")


def test_no_text_shows_a_password() -> None:
    address = parse_redis_url(f"redis://fk:{SECRET}@h:1/0")
    assert SECRET not in f"{address} {address!r} {redacted(f'redis://fk:{SECRET}@h')}"
    assert str(address) == "redis://fk@h:1/0"


def test_a_wrong_password_is_an_outage_until_the_file_is_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "flexkv_sglang")
    file = tmp_path / "password"
    file.touch(mode=0o600)
    file.write_text("wrong-donkey\n")
    with RedisServer(tmp_path, f"requirepass {SECRET}") as server:
        share = ShareConfig(redis_url=server.url, redis_password_file=str(file), heartbeat_s=0.1)
        wires = Wires()
        with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
            assert eventually(lambda: one.counts["share_redis_errors"] > 1)
            (feed,) = one.membership.status()["feeds"]  # type: ignore[misc]
            assert not feed["connected"]
            assert "AuthenticationError" in feed["last_error"]
            file.unlink()
            before = one.counts["share_redis_errors"]
            assert eventually(lambda: one.counts["share_redis_errors"] > before)
            file.write_text(SECRET)  # with mode 0644
            assert eventually(lambda: "0644" in str(one.membership.status()["feeds"]))
            file.chmod(0o600)
            assert eventually(lambda: one.knows(two) and two.knows(one))
            said = caplog.text + str(one.membership.status())
    assert SECRET not in said
    assert "donkey" not in said


@pytest.mark.parametrize("protocol", [2, 3])
def test_the_acl_user_of_the_documentation_has_exactly_the_needed_rights(
    tmp_path: Path, protocol: int
) -> None:
    with RedisServer(tmp_path, ACL.format(password=SECRET)) as server:
        url = f"redis://fk:{SECRET}@127.0.0.1:{server.port}/0?protocol={protocol}"
        meet(ShareConfig(redis_url=url))
        client = RedisLink(parse_redis_url(url)).client()
        for command in (
            ["FLUSHALL"],
            ["KEYS", "*"],
            ["DEL", "fk1:x"],
            ["CONFIG", "GET", "*"],
            ["SET", "x", "y"],
        ):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*command)
        client.close()


def certificates(place: Path) -> tuple[Path, Path, Path]:
    """A CA, and a server's certificate and key for 127.0.0.1 signed by it."""
    ca, ca_key, key, request, certificate = (
        place / name for name in ("ca.crt", "ca.key", "server.key", "server.csr", "server.crt")
    )
    extensions = place / "extensions"
    extensions.write_text("subjectAltName=IP:127.0.0.1\n")
    new = [
        "openssl",
        "req",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-batch",
    ]
    for command in (
        [*new, "-x509", "-subj", "/CN=ca", "-days", "2", "-keyout", str(ca_key), "-out", str(ca)],
        [*new, "-subj", "/CN=server", "-keyout", str(key), "-out", str(request)],
        ["openssl", "x509", "-req", "-in", str(request), "-CA", str(ca), "-CAkey", str(ca_key), "-CAcreateserial",
         "-days", "2", "-extfile", str(extensions), "-out", str(certificate)],
    ):  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
    return ca, certificate, key


def test_tls_with_our_own_authority_and_not_with_a_strangers(tmp_path: Path) -> None:
    ca, certificate, key = certificates(tmp_path)
    (tmp_path / "other").mkdir()
    stranger, _certificate, _key = certificates(tmp_path / "other")
    port = free_port()
    lines = (f"port 0\ntls-port {port}\ntls-auth-clients no",
             f"tls-ca-cert-file {ca}\ntls-cert-file {certificate}\ntls-key-file {key}")  # fmt: skip
    with RedisServer(tmp_path, *lines, port=port):
        url = f"rediss://127.0.0.1:{port}/0?ssl_ca_certs="
        meet(ShareConfig(redis_url=f"{url}{ca}"))
        plain = f"rediss://127.0.0.1:{port}/0"
        meet(ShareConfig(redis_url=plain, redis_ca_file=str(ca)))
        for wrong in (
            f"{url}{stranger}",
            f"rediss://127.0.0.1:{port}",
            f"redis://127.0.0.1:{port}",
        ):
            client = RedisLink(parse_redis_url(wrong)).client()
            with pytest.raises((redis.RedisError, OSError)):
                client.ping()
            client.close()


def test_sentinel_promotes_the_replica(tmp_path: Path) -> None:
    first = RedisServer(tmp_path / "1")
    second = RedisServer(tmp_path / "2", f"replicaof 127.0.0.1 {first.port}")
    watch = "\n".join(
        [f"sentinel monitor main 127.0.0.1 {first.port} 1", "sentinel down-after-milliseconds main 300",
         "sentinel failover-timeout main 1000"]
    )  # fmt: skip
    sentinel = RedisServer(tmp_path / "3", watch, sentinel=True)
    with first, second, sentinel:
        assert eventually(lambda: second.client().info("replication")["master_link_status"] == "up")
        slaves = lambda: sentinel.client().sentinel_slaves("main")  # noqa: E731
        assert eventually(lambda: bool(slaves()), 15)
        url = f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/main/0"
        share = ShareConfig(redis_url=url, heartbeat_s=0.2, node_ttl_s=1.0)
        wires = Wires()
        with Node(share, wires, "a") as one, Node(share, wires, "b") as two:
            assert eventually(lambda: one.knows(two) and two.knows(one))
            first.kill()
            one.logs.log(NS).add(fingerprints(1, 2))
            assert two.sees(one)
            assert eventually(lambda: one.knows(two) and two.knows(one), 30)
        assert not one.peer_sets.was_down - {"b"}
        assert second.client().info("replication")["role"] == "master"
