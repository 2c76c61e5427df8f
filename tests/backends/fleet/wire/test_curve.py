"""Secrets: members are admitted and strangers get nothing; valid secret files; where a server may listen."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from flexkv_sglang.backends.fleet.members.peer_control import PeerControl
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.backends.fleet.wire import addresses, answers, curve, requests
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError, PeerError
from nodes.page_servers import EPOCH, NAME, NID, SPACE, begin, reading, serving, write_secret
from nodes.page_sources import MemorySource, PageMemory, keys_of
from nodes.raw_peer import RawPeer

KEYS = keys_of(3)


def config(tmp_path: Path, auth: str, name: str = "secret") -> ShareConfig:
    path = tmp_path / name
    secret = str(path) if path.exists() else write_secret(path)
    return ShareConfig(listen="127.0.0.1:0", secret_file=secret, auth=auth)


@pytest.mark.parametrize("auth", ["curve", "hmac"])
def test_the_right_secret_is_let_in(tmp_path: Path, auth: str) -> None:
    share = config(tmp_path, auth)
    source = MemorySource(KEYS, 8192)
    memory = PageMemory(3, [8192])
    with serving(source, share) as (_, address), reading(share) as client:
        assert begin(client, address, KEYS, memory).wait() == [PageOutcome.OK] * 3
        assert memory.page(1) == source.pages[KEYS[1]]
        control = PeerControl(share, curve.load_secret(share))
        assert control.hello(address, 5).node_id == NID
        control.close()


@pytest.mark.parametrize("auth", ["curve", "hmac"])
@pytest.mark.parametrize("other", ["another secret", "none"])
def test_strangers_get_nothing(tmp_path: Path, auth: str, other: str) -> None:
    share = config(tmp_path, auth)
    stranger = ShareConfig() if other == "none" else config(tmp_path, auth, "other")
    memory = PageMemory(3, [8192])
    with serving(MemorySource(KEYS, 8192), share) as (server, address):
        with reading(stranger) as client:
            outcomes = begin(client, address, KEYS, memory, 1.0).wait()
            assert PageOutcome.OK not in outcomes
            assert all(memory.untouched(i) for i in range(3))
        control = PeerControl(stranger, curve.load_secret(stranger))
        with pytest.raises(PeerError):
            control.hello(address, 0.5)
        with pytest.raises(PeerError):
            control.snapshot(address, NAME, 0.5)
        control.close()
        assert server.counts["pages_sent"] == 0
        with reading(share) as client:  # and members are still served
            assert begin(client, address, KEYS, memory).wait() == [PageOutcome.OK] * 3


def _curve_client(
    context: zmq.Context, address: str, server_key: bytes, pair: tuple[bytes, bytes]
) -> zmq.Socket:
    sock = context.socket(zmq.DEALER)
    sock.linger = 0
    sock.curve_serverkey = server_key
    sock.curve_publickey, sock.curve_secretkey = pair
    sock.connect(f"tcp://{address}")
    sock.send_multipart(requests.pack_hello(requests.Hello(bytes(16), "default")))
    return sock


def test_curve_lets_in_the_derived_key_only(tmp_path: Path) -> None:
    """Rejects a client with the server's public key but without the secret, and one with a wrong server key."""
    share = config(tmp_path, "curve")
    secret = curve.load_secret(share)
    assert secret is not None
    own = (secret.client_public, secret.client_secret)
    with serving(MemorySource(KEYS, 8192), share) as (server, address), zmq.Context() as context:
        good = _curve_client(context, address, secret.server_public, own)
        assert good.poll(10_000)
        foreign = _curve_client(context, address, secret.server_public, zmq.curve_keypair())
        mistaken = _curve_client(context, address, zmq.curve_keypair()[0], own)
        assert not foreign.poll(300)
        assert not mistaken.poll(100)
        for sock in (good, foreign, mistaken):
            sock.close(0)
    assert server.counts["refused_connections"] >= 1


def test_hmac_takes_one_proof_for_one_challenge(tmp_path: Path) -> None:
    share = config(tmp_path, "hmac")
    secret = curve.load_secret(share)
    assert secret is not None
    with serving(MemorySource(KEYS, 8192), share) as (_, address), RawPeer(address) as peer:
        challenge = peer.greeting
        assert isinstance(challenge, answers.Challenge)
        peer.say(requests.pack_read(requests.Read(1, SPACE, 1000, 1, tuple(KEYS))))
        assert peer.hear() == answers.Refused(answers.Refusal.NO_HELLO)
        peer.say(requests.pack_proof(bytes(32)))
        assert peer.hear() == answers.Refused(answers.Refusal.PROOF)
        right = curve.proof(secret, b"reader", bytes(16), challenge.nonce, "default")
        peer.say(requests.pack_proof(right))  # too late for that challenge
        peer.say(requests.pack_read(requests.Read(1, SPACE, 1000, 1, tuple(KEYS))))
        assert peer.hear() == answers.Refused(answers.Refusal.NO_HELLO)


def test_hmac_requires_a_proof_of_the_server_too(tmp_path: Path) -> None:
    """A server without a secret welcomes all clients; a client with a secret rejects that server."""
    memory = PageMemory(3, [8192])
    with (
        serving(MemorySource(KEYS, 8192)) as (_, address),
        reading(config(tmp_path, "hmac")) as client,
    ):
        outcomes = begin(client, address, KEYS, memory, 5.0).wait()
        assert outcomes[0] is PageOutcome.FAILED
        assert "proof" in client.is_open(NID)
        assert client.usable(NID, EPOCH + 1, address)


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (bytes(range(31)), 0o600, "31 bytes"),
        (bytes(range(250)) * 20, 0o600, "more than 4096 bytes"),
        (b"1234567" * 9, 0o600, "63 bytes, 7 of them different"),
        (bytes(32), 0o600, "32 bytes, 1 of them different"),
        (bytes(range(32)), 0o620, "mode 0620"),
        (bytes(range(32)), 0o604, "mode 0604"),
    ],
)
def test_bad_secret_files(tmp_path: Path, content: bytes, mode: int, why: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(content)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=why) as caught:
        curve.load_secret(ShareConfig(secret_file=str(path)))
    assert "share.secret_file" in str(caught.value)
    assert "valid" in str(caught.value)


def test_no_secret_file(tmp_path: Path) -> None:
    assert curve.load_secret(ShareConfig()) is None
    with pytest.raises(ConfigError, match="No such file"):
        curve.load_secret(ShareConfig(secret_file=str(tmp_path / "none")))


def test_keys_are_a_function_of_the_secret() -> None:
    one, same, other = curve.derive(b"a" * 32), curve.derive(b"a" * 32), curve.derive(b"b" * 32)
    assert one == same
    assert (
        len({one.server_secret, one.client_secret, other.server_secret, other.client_secret}) == 4
    )
    assert one.client_secret.decode() not in repr(one)
    assert one.server_public == zmq.curve_public(one.server_secret)


@pytest.mark.parametrize("listen", ["10.1.2.3:5", "0.0.0.0:5", "[::]:5", "some-host:5", "*:5"])
def test_an_address_that_strangers_can_reach_needs_a_secret(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"share\.listen"):
        addresses.listen_address(ShareConfig(listen=listen, advertise="h:1"), None)


def test_where_servers_listen(caplog: pytest.LogCaptureFixture) -> None:
    secret = curve.derive(b"s" * 32)
    plain = ShareConfig(listen="10.1.2.3:5")
    assert addresses.listen_address(ShareConfig(), None) == ("127.0.0.1", 7400)
    redis = ShareConfig(redis_url="redis://127.0.0.1")
    assert addresses.listen_address(redis, None) == ("127.0.0.1", 0)
    assert addresses.listen_address(ShareConfig(listen="127.0.0.9"), None) == ("127.0.0.9", 0)
    assert addresses.listen_address(ShareConfig(listen="[::1]:7"), None) == ("::1", 7)
    assert addresses.listen_address(plain, secret) == ("10.1.2.3", 5)
    assert not caplog.records
    assert addresses.listen_address(replace(plain, insecure=True), None) == ("10.1.2.3", 5)
    assert "without a secret" in caplog.text
    with pytest.raises(ConfigError, match="advertise"):
        addresses.listen_address(ShareConfig(listen="0.0.0.0:5"), secret)
    to_peer = ShareConfig(peers=("127.0.0.1:99",))
    assert addresses.listen_address(to_peer, secret) == ("127.0.0.1", 7400)


@pytest.mark.parametrize("address", ["127.0.0.1:x", ":5", "127.0.0.1:70000"])
def test_invalid_addresses(address: str) -> None:
    with pytest.raises(ConfigError, match=r"share\.listen"):
        addresses.listen_address(ShareConfig(listen=address), None)


def test_the_advertised_address() -> None:
    assert addresses.advertised(ShareConfig(), "::1", 5) == "[::1]:5"
    assert addresses.advertised(ShareConfig(advertise="node7"), "0.0.0.0", 5) == "node7:5"
    assert addresses.advertised(ShareConfig(advertise="node7:9"), "0.0.0.0", 5) == "node7:9"
    assert addresses.advertised(ShareConfig(advertise="[fd00::1]"), "0.0.0.0", 5) == "[fd00::1]:5"


@pytest.mark.parametrize(
    ("advertise", "host"),
    [(None, "10.0.0.5"), ("node7", "node7"), ("node7:9", "node7"), ("[fd00::1]:9", "fd00::1")],
)
def test_the_advertised_host(advertise: str | None, host: str) -> None:
    assert addresses.advertised_host(ShareConfig(advertise=advertise), "10.0.0.5") == host


def test_ipv6_loopback_serves() -> None:
    if not socket.has_ipv6:
        pytest.fail("the machine has no IPv6 loopback")
    with (
        serving(MemorySource(KEYS, 8192), ShareConfig(listen="[::1]:0")) as (_, address),
        reading() as client,
    ):
        memory = PageMemory(3, [8192])
        assert begin(client, address, KEYS, memory).wait() == [PageOutcome.OK] * 3
