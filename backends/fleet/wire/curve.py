"""Keys of a cluster, all derived from one secret file that every member has.

``auth: curve`` encrypts, and admits only the derived client key (auth.py asks). ``auth: hmac`` exchanges proofs over
plain text: it keeps strangers out, but not somebody who can change bytes on the wire. Redis is not trusted with keys.
Threads: any.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from flexkv_sglang.backends.safe_files import read_secret
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError

if TYPE_CHECKING:
    import zmq

SECRET_BYTES_MIN, SECRET_BYTES_MAX = 32, 4096
_DISTINCT_MIN = 8  # 32 zeros are no secret
ZAP_DOMAIN = b"fk1"


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
        data = read_secret(Path(share.secret_file), SECRET_BYTES_MAX)
    except OSError as error:
        raise ConfigError(
            f"share.secret_file {share.secret_file!r}: {error.strerror}; valid: {valid}"
        ) from None
    if len(data) < SECRET_BYTES_MIN or len(set(data)) < _DISTINCT_MIN:
        raise ConfigError(
            f"share.secret_file {share.secret_file!r}: {len(data)} bytes, {len(set(data))} of them different;"
            f" valid: {valid}"
        )
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
    """True if connections are encrypted."""
    return secret is not None and share.auth == "curve"


def proof(secret: Secret, who: bytes, hello: bytes, challenge: bytes, cluster_id: str) -> bytes:
    """32 bytes that prove knowledge of the secret for these two nonces. ``who``: b"reader" or b"server"."""
    cluster = cluster_id.encode()
    message = b"".join([b"fk1 ", who, b"\0", hello, challenge, cluster])
    return hmac.digest(secret.proof_key, message, "sha256")


def protect_server(sock: zmq.Socket[bytes], share: ShareConfig, secret: Secret | None) -> None:
    """Set options of a listening socket before it is bound. With CURVE its context needs a ``ZapAuthenticator``."""
    if secret is not None and uses_curve(share, secret):
        sock.curve_server = True
        sock.curve_publickey, sock.curve_secretkey = secret.server_public, secret.server_secret
        sock.zap_domain = ZAP_DOMAIN


def protect_client(sock: zmq.Socket[bytes], share: ShareConfig, secret: Secret | None) -> None:
    """Set options of a socket before it connects: it accepts only the derived server key."""
    if secret is not None and uses_curve(share, secret):
        sock.curve_serverkey = secret.server_public
        sock.curve_publickey, sock.curve_secretkey = secret.client_public, secret.client_secret
