"""The page server: answers reads of pages, and followers' requests, of other nodes. Part of the agent.

One thread owns the ROUTER and never waits for a disk: a second thread reads pages (pages.py), a third builds snapshots
(feeds.py). Read only: no request writes, deletes or names a path. Invalid messages are dropped and counted; requests
before a greeting are refused.

Threads: ``start`` and ``close`` from any; the node's methods are called from the server's threads.
"""

from __future__ import annotations

import errno
import hmac
import logging
import os
import secrets
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress

import zmq

from flexkv_sglang.backends.fleet.server.feeds import ServeFeeds
from flexkv_sglang.backends.fleet.server.pages import ServePages
from flexkv_sglang.backends.fleet.server.queue import QUEUE_MAX, Reader
from flexkv_sglang.backends.fleet.transport import (
    RdmaError,
    RdmaTransport,
    close_transport,
    open_transport,
)
from flexkv_sglang.backends.fleet.vocabulary import (
    BATCH_PAGES,
    PROTOCOL,
    ServedNode,
    namespace_name,
)
from flexkv_sglang.backends.fleet.wire import addresses, answers, curve, protocol, requests
from flexkv_sglang.backends.fleet.wire.auth import ZapAuthenticator
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.threads import JobPool

logger = logging.getLogger(__name__)

READERS_MAX = 4096
"""Connections at most; beyond it the one that was silent for longest has to greet again."""

MESSAGES_PER_ROUND = 64
QUEUE_MESSAGES = QUEUE_MAX * (BATCH_PAGES + 1)
"""Answers that may wait for one reader. A reader with more does not read them, and is forgotten."""

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000
_IDLE_MS, _SENDING_MS, _WAITING_MS = 250, 10, 1
_TURNS_AHEAD, _CONTROL_JOBS = 2, 64
_CLOSE_TIMEOUT_S = 6.0
_PAUSE_S = 0.05


class PageServer:
    """Serves ``node`` from ``start`` to ``close``. ``counts``: of answers by kind; read it from any thread.

    ``transport``: used instead of the one that ``share.engine`` names. ``transports``: names for ``NodeInfo``.
    Raises ``ConfigError``.
    """

    def __init__(
        self,
        share: ShareConfig,
        secret: curve.Secret | None,
        node: ServedNode,
        transport: RdmaTransport | None = None,
    ) -> None:
        self._share, self._secret, self._node = share, secret, node
        self._host, self._port = addresses.listen_address(share, secret)
        self._transport = transport or open_transport(
            share, lambda: addresses.advertised_host(share, self._host)
        )
        self.transports = ("zmq", self._transport.name) if self._transport else ("zmq",)
        self.counts: Counter[str] = Counter()
        self._log = RateLimitedLog(logger)
        self._wake_fd = -1
        self._thread: threading.Thread | None = None

    def start(self, *, listen: bool = True) -> str:
        """Listen. Returns the address to advertise, "host:port"; "" if the port is in use. Raises ``ConfigError``.

        ``listen``: False leaves that to ``bind``. The default port of a node without Redis gives way to another one.
        """
        assert self._thread is None, "started twice"
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=2)
        self._authenticator: ZapAuthenticator | None = None
        if self._secret is not None and curve.uses_curve(self._share, self._secret):
            self._authenticator = ZapAuthenticator(self._context, self._secret)
        self._router = self._open_router()
        self._endpoint = ""
        if listen:
            try:
                self._bind()
            except zmq.ZMQError as error:
                if error.errno != errno.EADDRINUSE:
                    self._close_sockets()
                    raise ConfigError(
                        f"share.listen {self._share.listen!r}: {error.strerror}; valid: a free port of an address"
                        " of this machine"
                    ) from None
        self._calls: deque[Callable[[], None]] = deque()
        self._stop = threading.Event()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._disk = JobPool("flexkv-serve-disk", _TURNS_AHEAD)
        self._control = JobPool("flexkv-serve-control", _CONTROL_JOBS)
        self._feeds = ServeFeeds(self._node, self._control, self._send_tracked)
        self._pages = self._open_pages()
        self._readers: OrderedDict[bytes, Reader] = OrderedDict()
        # a loop over sockets that closes them itself, so no thread of threads.py
        self._thread = threading.Thread(target=self._run, name="flexkv-serve", daemon=True)
        self._thread.start()
        return self.advertised

    @property
    def listens_at(self) -> str:
        """ "host:port" of the listening socket; "": there is none."""
        return self._endpoint.removeprefix("tcp://")

    @property
    def has_fixed_port(self) -> bool:
        """Is the port given, or the default one that others know?"""
        return bool(self._port)

    @property
    def is_idle(self) -> bool:
        """Is no page of a request on its way?"""
        return not self._pages.reserved_bytes

    def bind(self, host: str = "", *, any_port: bool = False) -> str:
        """Listen at another address, or at last. Returns as ``start``, "" also for an address that is not ours.

        ``host``: "" for the one of ``start``. ``any_port``: if the default port is in use.
        """
        done: Future[str] = Future()

        def bind() -> None:
            try:
                self._unbind()
                self._host = host or self._host
                self._router.ipv6 = ":" in self._host
                self._bind(any_port=any_port)
            except zmq.ZMQError as error:
                logger.debug("%s: %s", self._host, error.strerror)
            except Exception as exc:  # noqa: BLE001 - raised where the result is waited for
                done.set_exception(exc)
                return
            done.set_result(self.advertised)

        return self._ask_loop(bind, done)

    def unbind(self) -> None:
        """Listen no more. ZeroMQ ends the connections that came this way with it."""
        done: Future[str] = Future()

        def unbind() -> None:
            self._unbind()
            done.set_result("")

        self._ask_loop(unbind, done)

    def _ask_loop(self, call: Callable[[], None], done: Future[str]) -> str:
        self._calls.append(call)
        os.eventfd_write(self._wake_fd, 1)
        try:
            return done.result(_CLOSE_TIMEOUT_S)
        except TimeoutError:
            return ""

    @property
    def advertised(self) -> str:
        """ "host:port" for other nodes; "" while there is no listening socket."""
        if not self._endpoint:
            return ""
        port = int(self._endpoint.rpartition(":")[2])
        return addresses.advertised(self._share, self._host, port)

    def _unbind(self) -> None:
        endpoint, self._endpoint = self._endpoint, ""
        if endpoint:
            with suppress(zmq.ZMQError):  # its address is gone
                self._router.unbind(endpoint)

    def _bind(self, *, any_port: bool = True) -> None:
        """Take another port if the default port is in use; other nodes cannot know it without Redis."""
        try:
            self._router.bind(f"tcp://{addresses.join_address(self._host, self._port)}")
        except zmq.ZMQError as error:
            is_default = self._share.listen == "auto" and self._port
            if error.errno != errno.EADDRINUSE or not is_default or not any_port:
                raise
            text = "port %d is in use: serving pages on another one. Set share.listen if others name this node"
            logger.warning(text, self._port)
            self._router.bind(f"tcp://{addresses.join_address(self._host, 0)}")
        self._endpoint = bytes(self._router.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()

    def _open_pages(self) -> ServePages:
        try:
            return ServePages(
                self._share, self._node, self._disk, self._send, self.counts, self._transport
            )
        except RdmaError as exc:
            assert self._transport is not None
            self._transport.close()
            self._close_sockets()
            self._disk.close()
            self._control.close()
            raise ConfigError(
                f"share.engine: {self._share.engine!r}: {exc}. Valid without it: 'zmq'"
            ) from exc

    def _open_router(self) -> zmq.Socket[bytes]:
        router = self._context.socket(zmq.ROUTER)
        router.linger = 0
        router.router_mandatory = 1
        router.maxmsgsize = protocol.REQUEST_BYTES_MAX
        router.sndhwm = router.rcvhwm = QUEUE_MESSAGES
        router.heartbeat_ivl, router.heartbeat_timeout = HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS
        router.ipv6 = ":" in self._host
        curve.protect_server(router, self._share, self._secret)
        return router

    def close(self) -> bool:
        """Stop, and drop requests under way. False: a disk hangs, and its thread goes on. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self._calls.append(self._stop.set)
        os.eventfd_write(self._wake_fd, 1)
        thread.join(_CLOSE_TIMEOUT_S)
        if thread.is_alive():
            return False
        os.close(self._wake_fd)
        if self._transport is not None:
            close_transport(self._transport, self._pages)  # before the slabs are freed
        return self._disk.close() & self._control.close()

    # ---- the loop's thread, from here on ----

    def _run(self) -> None:
        poller = zmq.Poller()
        for entry in (self._router, self._disk.fd, self._control.fd, self._wake_fd):
            poller.register(entry, zmq.POLLIN)
        if self._authenticator is not None:
            poller.register(self._authenticator.sock, zmq.POLLIN)
        while not self._stop.is_set():
            try:
                self._round(dict(poller.poll(self._pause_ms())))
            except Exception as exc:  # noqa: BLE001 - the thread's end would end all serving
                self.counts["errors"] += 1
                self._log.log("round", logging.ERROR, "a round of serving failed", exc_info=exc)
                time.sleep(_PAUSE_S)
        self._close_sockets()

    def _round(self, ready: dict[object, int]) -> None:
        """One round of the loop. What raises costs what it was about; the next round goes on with the rest."""
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if self._authenticator is not None and self._authenticator.sock in ready:
            self._authenticator.answer()
            self.counts["refused_connections"] = self._authenticator.refused
        while self._calls:
            self._calls.popleft()()
        if self._stop.is_set():
            return
        self._pages.reap()
        if self._router in ready:
            self._take_messages()
        for worker in (self._disk, self._control):
            for then in worker.results():
                then()
        self._pages.issue()
        self._feeds_left = self._feeds.advance()

    _feeds_left = False

    def _pause_ms(self) -> int:
        """Length of the next poll. It is short while frames leave, as ZeroMQ does not report their release."""
        if self._feeds_left or self._pages.waits_for_memory:
            return _WAITING_MS
        return _SENDING_MS if self._pages.is_sending else _IDLE_MS

    def _take_messages(self) -> None:
        for _ in range(MESSAGES_PER_ROUND):
            try:
                routing, *frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._dispatch(routing, requests.decode_request(frames))
            except protocol.WireError:
                self.counts["invalid_messages"] += 1
            except Exception as exc:  # noqa: BLE001 - a bug costs one message, not the server
                self._log.log(
                    "message", logging.ERROR, "a message could not be answered", exc_info=exc
                )
                self.counts["errors"] += 1

    def _dispatch(self, routing: bytes, ask: requests.Request) -> None:
        reader = self._readers.get(routing)
        if isinstance(ask, requests.Hello):
            self._greet(routing, ask)
        elif isinstance(ask, requests.Proof):
            self._check_proof(reader, ask)
        elif reader is None or not reader.welcomed:
            self._refuse(reader or Reader(routing), answers.Refusal.NO_HELLO)
        else:
            self._readers.move_to_end(routing)
            self._serve(reader, ask)

    def _serve(self, reader: Reader, ask: requests.Request) -> None:
        if isinstance(ask, requests.Read):
            self._pages.read(reader, ask)
        elif isinstance(ask, requests.Offer):
            self._pages.read(reader, ask.read, is_offer=True)
        elif isinstance(ask, requests.Done):
            self._pages.done(reader, ask.lease)
        elif isinstance(ask, requests.Cancel):
            self._pages.cancel(reader, ask.request_id)
        elif isinstance(ask, requests.ReportCorrupt):
            self._report_corrupt(ask)
        elif isinstance(ask, requests.SnapshotRequest):
            self.counts["snapshots_asked"] += 1
            self._feeds.snapshot(reader, ask)
        elif isinstance(ask, requests.Poll):
            self.counts["polls_asked"] += 1
            self._feeds.poll(reader, ask)

    # ---- greeting ----

    def _greet(self, routing: bytes, hello: requests.Hello) -> None:
        self._forget(routing)
        reader = Reader(routing, hello)
        if hello.protocol != PROTOCOL or hello.cluster_id != self._share.cluster_id:
            other = hello.protocol != PROTOCOL
            self._refuse(reader, answers.Refusal.PROTOCOL if other else answers.Refusal.CLUSTER)
            return
        self._readers[routing] = reader
        if len(self._readers) > READERS_MAX:
            self._forget(next(iter(self._readers)))
        if self._secret is not None and self._authenticator is None:
            reader.challenge = secrets.token_bytes(protocol.NONCE_BYTES)
            self._send(reader, answers.pack_challenge(reader.challenge))
        else:
            self._welcome(reader, bytes(protocol.PROOF_BYTES))

    def _check_proof(self, reader: Reader | None, ask: requests.Proof) -> None:
        if reader is None or reader.challenge is None or reader.hello is None:
            self.counts["invalid_messages"] += 1
            return
        challenge, reader.challenge = reader.challenge, None  # one try
        if hmac.compare_digest(ask.proof, self._proof(b"reader", reader.hello, challenge)):
            self._welcome(reader, self._proof(b"server", reader.hello, challenge))
        else:
            self._refuse(reader, answers.Refusal.PROOF)

    def _proof(self, who: bytes, hello: requests.Hello, challenge: bytes) -> bytes:
        assert self._secret is not None
        return curve.proof(self._secret, who, hello.nonce, challenge, self._share.cluster_id)

    def _welcome(self, reader: Reader, proof: bytes) -> None:
        assert reader.hello is not None
        reader.welcomed = True
        limit = self._share.serve_inflight_peer
        self._send(
            reader,
            answers.pack_welcome(answers.Welcome(reader.hello.nonce, proof, self._node.info(), limit, QUEUE_MAX)),
        )  # fmt: skip

    def _refuse(self, reader: Reader, why: answers.Refusal) -> None:
        self.counts["refused_greetings"] += 1
        self._send(reader, answers.pack_refused(why))

    def _report_corrupt(self, ask: requests.ReportCorrupt) -> None:
        self.counts["pages_reported_bad"] += len(ask.keys)

        def verify() -> Callable[[], None]:
            source = self._node.pages_of(namespace_name(ask.namespace))
            if source is not None:
                source.reported_bad(ask.keys)
            return _nothing

        self._control.put(verify, _nothing)  # without room the hint is lost

    # ---- sending ----

    def _send(self, reader: Reader, frames: Sequence[bytes | zmq.Frame]) -> bool:
        """As ``Send``."""
        if reader.gone:
            return False
        try:
            self._router.send_multipart([reader.routing, *frames], zmq.NOBLOCK, copy=False)
        except (
            zmq.ZMQError
        ):  # EHOSTUNREACH: disconnected; EAGAIN: the reader does not read its answers
            reader.gone = True
            self._forget(reader.routing)
            return False
        return True

    def _send_tracked(self, reader: Reader, frames: list[bytes]) -> zmq.MessageTracker | None:
        *heads, last = frames
        data = zmq.Frame(last, track=True, copy=False)
        return data.tracker if self._send(reader, [*heads, data]) else None

    def _forget(self, routing: bytes) -> None:
        reader = self._readers.pop(routing, None)
        if reader is not None:
            reader.gone = True
            self._pages.forget(reader)

    def _close_sockets(self) -> None:
        self._router.close(linger=0)
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()


def _nothing() -> None:
    pass
