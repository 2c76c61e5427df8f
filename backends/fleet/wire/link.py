"""One connection to another node's page server: a DEALER socket, its monitor, and the greeting.

A link never reconnects. When the other side goes away, or was never there, the monitor reports it at once and the link
is dead; its owner opens another one. ``READY`` means that the other side has the same protocol and cluster, and the
secret if there is one.

Threads: one at a time.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

from flexkv_sglang.backends.fleet.vocabulary import BATCH_PAGES, PROTOCOL
from flexkv_sglang.backends.fleet.wire import answers, curve, protocol, requests
from flexkv_sglang.config.share import ShareConfig

if TYPE_CHECKING:
    import zmq

CONNECT_TIMEOUT_MS = 500
HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 300, 1000
QUEUE_MESSAGES = 4 * BATCH_PAGES
MESSAGE_BYTES_MIN = 2 << 20
"""Every link accepts messages up to this size: several pages, parts of snapshots, changes."""

_EVENT = struct.Struct("<Hi")


class LinkState(Enum):
    """OPENING -> READY; DEAD from both. REFUSED: dead, and another attempt would be refused too."""

    OPENING = 0
    READY = 1
    DEAD = 2
    REFUSED = 3


class Link:
    """Poll ``sock`` and ``monitor``. ``reason``: of its death. ``welcome``: once READY."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        share: ShareConfig,
        secret: curve.Secret | None,
        page_bytes: int = 0,
    ) -> None:
        import zmq

        self._share, self._secret = share, secret
        self._nonce = secrets.token_bytes(protocol.NONCE_BYTES)
        self._challenge: bytes | None = None
        self.page_bytes = page_bytes
        self.state, self.reason = LinkState.OPENING, ""
        self.welcome: answers.Welcome | None = None
        largest = max(MESSAGE_BYTES_MIN, page_bytes + 4096)
        self.sock: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self.sock.linger = 0
        self.sock.ipv6 = "[" in address
        self.sock.maxmsgsize = largest
        self.sock.rcvhwm = QUEUE_MESSAGES
        self.sock.sndhwm = QUEUE_MESSAGES
        self.sock.connect_timeout = CONNECT_TIMEOUT_MS
        self.sock.heartbeat_ivl = HEARTBEAT_MS
        self.sock.heartbeat_timeout = HEARTBEAT_TIMEOUT_MS
        self.sock.reconnect_ivl = -1
        curve.protect_client(self.sock, share, secret)
        self.monitor: zmq.Socket[bytes] = self.sock.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_CLOSED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        )
        self.monitor.linger = 0
        try:
            self.sock.connect(f"tcp://{address}")
        except zmq.ZMQError as error:
            self.fail(f"cannot connect: {error.strerror}")
            return
        self.send(requests.pack_hello(requests.Hello(self._nonce, share.cluster_id)))

    @property
    def alive(self) -> bool:
        """True while it is opening or ready."""
        return self.state in (LinkState.OPENING, LinkState.READY)

    def fail(self, reason: str, *, refused: bool = False) -> None:
        """Mark it dead."""
        if self.alive:
            self.state, self.reason = LinkState.REFUSED if refused else LinkState.DEAD, reason

    def send(self, frames: Sequence[bytes]) -> None:
        """Queue one small message. A full queue means that the other side does not read: the link dies."""
        import zmq

        try:
            self.sock.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.fail(f"cannot send: {error.strerror}")

    def watch(self) -> None:
        """Read the monitor."""
        import zmq

        while self.alive:
            try:
                frames = self.monitor.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            event = zmq.Event(_EVENT.unpack_from(frames[0])[0])
            self.fail(str(event.name).lower().replace("_", " "))

    def receive(self) -> tuple[answers.Answer, zmq.Frame | None] | None:
        """The next answer that is not part of the greeting, and the bytes behind it; None: nothing more now.

        An answer that cannot be understood makes the link dead.
        """
        import zmq

        while self.alive:
            try:
                frames = self.sock.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            except zmq.ZMQError as error:
                self.fail(f"cannot receive: {error.strerror}")
                return None
            try:
                answer = answers.decode_answer([frame.buffer for frame in frames])
                if not self._greeted(answer):
                    return answer, frames[1] if len(frames) > 1 else None
            except protocol.WireError as error:
                self.fail(f"wire: {error}")
        return None

    def _greeted(self, answer: answers.Answer) -> bool:
        """Was it part of the greeting?"""
        if isinstance(answer, answers.Challenge):
            if self._secret is None or self._challenge is not None or self.state is LinkState.READY:
                raise protocol.WireError("a challenge out of place")
            self._challenge = answer.nonce
            self.send(requests.pack_proof(self._proof(b"reader", answer.nonce)))
            return True
        if isinstance(answer, answers.Welcome):
            self._check_welcome(answer)
            self.welcome, self.state = answer, LinkState.READY
            return True
        if isinstance(answer, answers.Refused):
            # after a restart the server has forgotten us: nothing wrong with it
            self.fail(
                f"refused: {answer.reason.name}",
                refused=answer.reason is not answers.Refusal.NO_HELLO,
            )
            return True
        if self.state is not LinkState.READY:
            raise protocol.WireError("an answer before the greeting")
        return False

    def _check_welcome(self, welcome: answers.Welcome) -> None:
        if welcome.nonce != self._nonce or self.state is LinkState.READY:
            raise protocol.WireError("a welcome out of place")
        if welcome.info.protocol != PROTOCOL:
            raise protocol.WireError(f"protocol {welcome.info.protocol}")
        if self._secret is None or curve.uses_curve(self._share, self._secret):
            return
        if self._challenge is None or welcome.proof != self._proof(b"server", self._challenge):
            raise protocol.WireError("no proof that the other side knows the secret")

    def _proof(self, who: bytes, challenge: bytes) -> bytes:
        assert self._secret is not None
        return curve.proof(self._secret, who, self._nonce, challenge, self._share.cluster_id)

    def close(self) -> None:
        """Nothing that arrives later is looked at. Idempotent."""
        self.fail("closed")
        if not self.sock.closed:
            self.sock.disable_monitor()
            self.monitor.close(linger=0)
            self.sock.close(linger=0)
