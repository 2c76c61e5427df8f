"""Addresses of the page server: where it may listen, and what it advertises to other nodes.

Without a secret it listens on loopback only, unless ``share.insecure`` allows strangers to read cached pages.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from urllib.parse import urlsplit

from flexkv_sglang.backends.fleet.wire.curve import Secret
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
DEFAULT_PORT = 7400
"""Port without Redis, where other nodes must know it beforehand: they name it in ``share.peers``."""


def listen_address(share: ShareConfig, secret: Secret | None) -> tuple[str, int]:
    """(host, port) to bind; port 0: any. Raises ``ConfigError`` for an address that strangers could reach."""
    if share.listen == "auto":
        host, port = _auto_host(share, secret), 0 if share.redis_url else DEFAULT_PORT
    else:
        host, port = split_address(share.listen, "share.listen")
    if is_loopback(host):
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
            "pages are served at %s without a secret: any machine that can reach them may read them",
            host,
        )
    return host, port


def _auto_host(share: ShareConfig, secret: Secret | None) -> str:
    """The outward host, or loopback if strangers could read pages there."""
    host = outward_host(share)
    if is_loopback(host) or secret is not None or share.insecure:
        return host
    logger.warning(
        "other machines cannot read pages from this one, because share.secret_file is not set: listening on %s,"
        " not on %s",
        LOOPBACK,
        host,
    )
    return LOOPBACK


def advertised(share: ShareConfig, host: str, port: int) -> str:
    """ "host:port" for other nodes to connect to a server bound to ``host`` and ``port``."""
    if share.advertise is None:
        return join_address(host, port)
    if share.advertise.rpartition(":")[1] and not share.advertise.endswith("]"):
        advertised_to, other_port = split_address(share.advertise, "share.advertise")
        return join_address(advertised_to, other_port or port)
    return join_address(share.advertise.strip("[]"), port)


def advertised_host(share: ShareConfig, host: str) -> str:
    """The host in ``advertised``, for an RDMA transport with ports of its own."""
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


def outward_host(share: ShareConfig, *, quiet: bool = False) -> str:
    """This machine's address on the route to Redis, else to its first peer. No packet is sent.

    ``quiet``: log nothing if there is no way.
    """
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
        if not quiet:
            logger.warning("no way to %s: pages are served on loopback only", host)
        return LOOPBACK


def is_loopback(host: str) -> bool:
    """Is this a name or an address of this machine alone?"""
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
