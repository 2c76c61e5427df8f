"""Where an agent listens when nobody says: on an address that its peers can reach, or on loopback."""

from __future__ import annotations

import logging
import socket
from urllib.parse import urlsplit

from flexkv_sglang.share_settings import ShareConfig

logger = logging.getLogger(__name__)

DEFAULT_PORT = 7400
"""With ``peers`` and without Redis a port must be known beforehand."""

_REDIS_PORT = 6379


def listen_address(share: ShareConfig) -> str:
    """``share.listen``, or what "auto" stands for: loopback as long as strangers could read pages (no
    ``secret_file`` and not ``insecure``), else the address that packets to Redis or the first peer leave from.
    """
    if share.listen != "auto":
        return share.listen
    port = 0 if share.redis_url else DEFAULT_PORT
    host = _own_address(*_other_side(share))
    if host is None or host.startswith("127."):
        return f"127.0.0.1:{port}"
    if share.secret_file is None and not share.insecure:
        logger.warning(
            "flexkv: other machines cannot read pages from this one, because share.secret_file is not set; "
            "listening on 127.0.0.1 only, not on %s",
            host,
        )
        return f"127.0.0.1:{port}"
    return f"{host}:{port}"


def _other_side(share: ShareConfig) -> tuple[str, int]:
    if share.redis_url is None:
        host, _, port = share.peers[0].rpartition(":")
        return host.strip("[]"), int(port)
    where = urlsplit(share.redis_url).netloc.rpartition("@")[2].split(",")[0]
    found = urlsplit(f"redis://{where}")
    return found.hostname or "127.0.0.1", found.port or _REDIS_PORT


def _own_address(host: str, port: int) -> str | None:
    """No packet is sent: the kernel only looks the route up."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            name = str(probe.getsockname()[0])
    except OSError as exc:
        logger.warning("flexkv: no route to %s (%s); listening on loopback only", host, exc)
        return None
    return f"[{name}]" if ":" in name else name
