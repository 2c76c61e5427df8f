"""Who may talk to whom: keys from one secret file, the door of the page server, where it may listen.

Everybody of a cluster has the same secret. From it come both key pairs of CURVE (``auth: curve``: encrypted,
and only the derived client key is let in) and the key of the proofs of ``auth: hmac`` (plain text on the wire;
keeps strangers out, not somebody who can change what is on the wire). Nothing in Redis needs to be trusted.
Without a secret the server listens on loopback only, unless ``insecure`` says otherwise in plain words.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import os
import socket
import stat
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flexkv_sglang.backends.fleet.vocabulary import ShareConfig
from flexkv_sglang.errors import ConfigError

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

SECRET_BYTES_MIN, SECRET_BYTES_MAX = 32, 4096
LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 7400
"""Without Redis the port must be known beforehand: others name it in ``peers``."""

_DOMAIN = b"fk1"
_ZAP = "inproc://zeromq.zap.01"


@dataclass(frozen=True, slots=True)
class Secret:
    """Keys of a cluster, all derived from its secret. Public and secret keys of CURVE are in Z85, 40 bytes."""

    server_public: bytes
    server_secret: bytes = field(repr=False)
    client_public: bytes
    client_secret: bytes = field(repr=False)
    proof_key: bytes = field(repr=False)


def load_secret(share: ShareConfig) -> Secret | None:
    """The keys of ``share.secret_file``; None without one. Raises ``ConfigError``."""
    if share.secret_file is None:
        return None
    valid = f"a file of {SECRET_BYTES_MIN} random bytes or more that only its owner may read"
    try:
        fd = os.open(share.secret_file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            about = os.fstat(fd)
            data = os.read(fd, SECRET_BYTES_MAX + 1)
        finally:
            os.close(fd)
    except OSError as error:
        raise ConfigError(
            f"share.secret_file {share.secret_file!r}: {error.strerror}; valid: {valid}"
        ) from None
    if not stat.S_ISREG(about.st_mode) or stat.S_IMODE(about.st_mode) & 0o077:
        raise ConfigError(
            f"share.secret_file {share.secret_file!r}: mode {stat.S_IMODE(about.st_mode):04o} lets others"
            f" read it; valid: {valid}"
        )
    if not SECRET_BYTES_MIN <= len(data) <= SECRET_BYTES_MAX:
        raise ConfigError(f"share.secret_file {share.secret_file!r}: its size; valid: {valid}")
    return derive(data)


def derive(secret: bytes) -> Secret:
    """Keys of a secret of any length."""
    import zmq
    from zmq.utils import z85

    seed = blake2b(secret, digest_size=32).digest()

    def part(purpose: bytes) -> bytes:
        return blake2b(purpose, key=seed, digest_size=32).digest()

    server, client = z85.encode(part(b"fk1 curve server")), z85.encode(part(b"fk1 curve client"))
    return Secret(
        zmq.curve_public(server), server, zmq.curve_public(client), client, part(b"fk1 hmac")
    )


def uses_curve(share: ShareConfig, secret: Secret | None) -> bool:
    """Is what goes over the wire encrypted?"""
    return secret is not None and share.auth == "curve"


def proof(secret: Secret, who: bytes, hello: bytes, challenge: bytes, cluster_id: str) -> bytes:
    """32 bytes that only somebody with the secret can make for these two nonces. ``who``: b"reader" or b"server"."""
    cluster = cluster_id.encode()
    told = b"".join([b"fk1 ", who, b"\0", hello, challenge, cluster])
    return hmac.digest(secret.proof_key, told, "sha256")


def protect_server(sock: zmq.Socket[bytes], share: ShareConfig, secret: Secret | None) -> None:
    """Options of a listening socket, before it is bound. Its context needs a ``ZapAuthenticator`` with CURVE."""
    if secret is not None and uses_curve(share, secret):
        sock.curve_server = True
        sock.curve_publickey, sock.curve_secretkey = secret.server_public, secret.server_secret
        sock.zap_domain = _DOMAIN


def protect_client(sock: zmq.Socket[bytes], share: ShareConfig, secret: Secret | None) -> None:
    """Options of a connecting socket, before it connects: it talks to nobody but the derived server key."""
    if secret is not None and uses_curve(share, secret):
        sock.curve_serverkey = secret.server_public
        sock.curve_publickey, sock.curve_secretkey = secret.client_public, secret.client_secret


class ZapAuthenticator:
    """ZeroMQ asks here about every connection (ZAP, RFC 27): only the derived client key is let in.

    Made before the server's socket is bound, in the same context. One thread uses ``sock`` and ``answer``.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], secret: Secret) -> None:
        import zmq
        from zmq.utils import z85

        self._allowed = z85.decode(secret.client_public)
        self.refused = 0
        self.sock: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.sock.linger = 0
        self.sock.bind(_ZAP)

    def answer(self) -> None:
        """Answer one request that has arrived."""
        version, request, domain, _, _, mechanism, *credentials = self.sock.recv_multipart()
        good = (
            (version, domain, mechanism) == (b"1.0", _DOMAIN, b"CURVE")
            and len(credentials) == 1
            and hmac.compare_digest(credentials[0], self._allowed)
        )
        self.refused += not good
        verdict = [b"200", b"OK", b"reader", b""] if good else [b"400", b"no", b"", b""]
        self.sock.send_multipart([b"1.0", request, *verdict])

    def close(self) -> None:
        """Close its socket."""
        self.sock.close()


def listen_address(share: ShareConfig, secret: Secret | None) -> tuple[str, int]:
    """(host, port) to bind; port 0: any. Raises ``ConfigError`` for a place that would be open to strangers."""
    if share.listen == "auto":
        host, port = _auto_host(share, secret), 0 if share.redis_url else DEFAULT_PORT
    else:
        host, port = split_address(share.listen, "share.listen")
    if _is_loopback(host):
        return host, port
    if secret is None and not share.insecure:
        raise ConfigError(
            f"share.listen {share.listen!r} can be reached from other machines and there is no secret; valid:"
            ' secret_file, an address of 127.0.0.0/8, or "insecure": true if every machine that can reach it'
            " may read cached pages"
        )
    if _is_wildcard(host) and share.advertise is None:
        raise ConfigError(
            f"share.listen {share.listen!r} is no address that others can connect to; valid: an address of"
            " this machine, or this one and share.advertise"
        )
    if secret is None:
        logger.warning(
            "pages are served at %s without a secret: whoever can reach it may read them", host
        )
    return host, port


def _auto_host(share: ShareConfig, secret: Secret | None) -> str:
    """Loopback as long as strangers could read pages."""
    host = outward_host(share)
    if _is_loopback(host) or secret is not None or share.insecure:
        return host
    logger.warning(
        "other machines cannot read pages from this one, because share.secret_file is not set: listening on %s,"
        " not on %s",
        LOOPBACK,
        host,
    )
    return LOOPBACK


def advertised(share: ShareConfig, host: str, port: int) -> str:
    """ "host:port" that others are told, for a server bound to ``host`` and ``port``."""
    if share.advertise is None:
        return join_address(host, port)
    if share.advertise.rpartition(":")[1] and not share.advertise.endswith("]"):
        told_host, told_port = split_address(share.advertise, "share.advertise")
        return join_address(told_host, told_port or port)
    return join_address(share.advertise.strip("[]"), port)


def advertised_host(share: ShareConfig, host: str) -> str:
    """The host in that, for an engine with ports of its own."""
    return split_address(advertised(share, host, 0), "share.advertise")[0]


def split_address(address: str, key: str) -> tuple[str, int]:
    """("host", port) of "host:port", "host" or "[v6]:port". Raises ``ConfigError`` naming ``key``."""
    host, colon, digits = address.rpartition(":")
    if not colon or address.endswith("]"):
        host, digits = address, "0"
    host = host.strip("[]")
    if not host or not digits.isdecimal() or int(digits) > 65535:
        raise ConfigError(f'{key} {address!r}; valid: "host:port", "host"')
    return host, int(digits)


def join_address(host: str, port: int) -> str:
    """ "host:port", with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def outward_host(share: ShareConfig) -> str:
    """The address this machine would reach Redis, else its first peer, from. No packet is sent."""
    if share.redis_url:
        url = urlsplit(share.redis_url)
        host, port = url.hostname or LOOPBACK, 6379
    elif share.peers:
        host, port = split_address(share.peers[0], "share.peers")
    else:
        return LOOPBACK
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host, port or 1, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        logger.warning("no way to %s: pages are served on loopback only", host)
        return LOOPBACK


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_wildcard(host: str) -> bool:
    if host == "*":
        return True
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False
