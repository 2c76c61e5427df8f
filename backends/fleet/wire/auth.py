"""Admits connections to the page server: with ``auth: curve`` only those that have the derived client key."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from flexkv_sglang.backends.fleet.wire.curve import ZAP_DOMAIN, Secret

if TYPE_CHECKING:
    import zmq

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class ZapAuthenticator:
    """Answers ZeroMQ's question about each new connection (ZAP, RFC 27).

    Make it before the server's socket is bound, in the same context. ``refused``: connections, so far. One thread uses
    ``sock`` and ``answer``.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], secret: Secret) -> None:
        import zmq
        from zmq.utils import z85

        self._allowed = z85.decode(secret.client_public)
        self.refused = 0
        self.sock: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.sock.linger = 0
        self.sock.bind(_ZAP_ENDPOINT)

    def answer(self) -> None:
        """Answer one request that has arrived."""
        version, request, domain, _, _, mechanism, *credentials = self.sock.recv_multipart()
        good = (
            (version, domain, mechanism) == (b"1.0", ZAP_DOMAIN, b"CURVE")
            and len(credentials) == 1
            and hmac.compare_digest(credentials[0], self._allowed)
        )
        self.refused += not good
        verdict = [b"200", b"OK", b"reader", b""] if good else [b"400", b"no", b"", b""]
        self.sock.send_multipart([b"1.0", request, *verdict])

    def close(self) -> None:
        """Close its socket."""
        self.sock.close()
