"""Reads pages of other nodes for one rank process. One thread owns all sockets; it starts with the first read.

Whatever that thread meets (no descriptor, no memory left), the reads under way fail, and later ones are tried again.

``usable`` and ``seconds_for`` read memory only. A read ends by its deadline, and nothing is written to its targets
after ``wait`` has returned (read.py). A peer that is gone, silent or breaks the protocol is not read from until a
greeting in the background succeeds (health.py).

Threads: any. ``count`` is called with names of ``METRICS``, from the client's thread and from callers of ``begin``.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from flexkv_sglang.backends.fleet.reader.channel import Count, PeerChannel
from flexkv_sglang.backends.fleet.reader.health import PeerHealth
from flexkv_sglang.backends.fleet.reader.rdma_channel import RdmaChannel
from flexkv_sglang.backends.fleet.reader.rdma_memory import RdmaMemory
from flexkv_sglang.backends.fleet.reader.read import PageOutcome, Pending, RemoteRead
from flexkv_sglang.backends.fleet.transport import RdmaTransport
from flexkv_sglang.backends.fleet.vocabulary import NodeId
from flexkv_sglang.backends.fleet.wire import curve
from flexkv_sglang.backends.fleet.wire.link import Link
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import PeerError
from flexkv_sglang.log_limit import RateLimitedLog

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

METRICS = ("remote_read_bytes", "remote_breaker_trips", "remote_engine_failures")
CHANNELS_MAX = 64
IDLE_S = 60.0
IO_THREADS = 2
_PEERS_MAX = 4096
_ROUND_S = 0.25
_PAUSE_S = 0.05
_CLOSE_TIMEOUT_S = 5.0
_LARGE_PIECE_BYTES = (32 << 20) - (64 << 10)


class PeerClient:
    """One per rank process, used by its transfer threads.

    ``transport``: used instead of the one that ``share.engine`` names. Raises ``ConfigError`` for a bad secret file or
    a missing transport.
    """

    def __init__(
        self, share: ShareConfig, count: Count, transport: RdmaTransport | None = None
    ) -> None:
        import zmq  # noqa: F401 - here and not at the first read, which must not wait for it

        self._share, self._secret = share, curve.load_secret(share)
        self._log = RateLimitedLog(logger)
        self._rdma = RdmaMemory.of(share, transport)
        self._count = count
        self._lock = threading.Lock()
        self._healths: dict[NodeId, PeerHealth] = {}  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._thread: threading.Thread | None = None  # guarded by _lock
        self._wake_fd = -1
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._todo: deque[Callable[[], None]] = deque()
        self._channels: dict[NodeId, PeerChannel] = {}  # the thread's, like all below
        self._polled: dict[zmq.Socket[bytes], tuple[PeerChannel, Link]] = {}

    def usable(self, node_id: NodeId, epoch: int, address: str) -> bool:
        """True if this peer may be read from now."""
        health = self._healths.get(node_id)
        if health is None or (health.epoch, health.address) != (epoch, address):
            return True
        return health.usable()

    def is_open(self, node_id: NodeId) -> str:
        """The reason for which this peer's breaker is open; "": it is closed."""
        health = self._healths.get(node_id)
        return health.reason or "open" if health is not None and health.is_open else ""

    def seconds_for(self, node_id: NodeId, byte_count: int) -> float:
        """Seconds for a read of ``byte_count`` bytes at the rates of the last half minute; 0.0: unknown."""
        health = self._healths.get(node_id)
        return health.seconds_for(byte_count) if health is not None else 0.0

    def begin(self, read: RemoteRead) -> Pending:
        """Start a read; call ``wait`` on the result. Pages that would miss the deadline are not requested."""
        pending = Pending(read, self._abandon)
        health = self._health(read)
        if not read.keys:
            pending.cut(0)
            return pending
        if not health.usable():
            pending.fail(0, PageOutcome.FAILED if health.is_open else PageOutcome.BUSY)
            return pending
        seconds = read.deadline - time.monotonic()
        pages = min(float(len(read.keys)), health.bytes_within(seconds) // pending.page_bytes)
        if pages < 1:
            pending.fail(0, PageOutcome.LATE if seconds <= 0 else PageOutcome.BUSY)
            return pending
        pending.cut(int(pages))
        if not self._start():
            pending.fail(0, PageOutcome.FAILED)
            return pending
        self._post(lambda: self._channel(health).begin(pending))
        return pending

    def set_secret(self, secret: curve.Secret | None) -> None:
        """Connect with these keys from now on: the content of the secret file has changed."""

        def renew() -> None:
            for channel in self._channels.values():
                channel.renew()

        self._secret = secret
        self._post(renew)

    def _health(self, read: RemoteRead) -> PeerHealth:
        with self._lock:
            health = self._healths.get(read.node_id)
            if health is None:
                if len(self._healths) >= _PEERS_MAX:
                    self._healths.pop(next(iter(self._healths)))
                health = self._healths[read.node_id] = PeerHealth(
                    read.node_id, read.epoch, read.address
                )
        if health.set_identity(read.epoch, read.address):
            self._post(lambda: self._renew(health))
        return health

    def _start(self) -> bool:
        with self._lock:
            if self._closed:
                return False
            if self._thread is None:
                try:
                    self._open_thread()
                except Exception as exc:  # noqa: BLE001 - of descriptors, memory, threads; the next read tries again
                    self._log.log("start", logging.WARNING, "no remote reads for now: %s", exc)
                    return False
        return True

    def _open_thread(self) -> None:
        """Start the thread; whatever fails, nothing is left open. Raises ``OSError``, ``ZMQError``, or of threads."""
        import zmq

        with ExitStack() as opened:
            wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(os.close, wake_fd)
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=IO_THREADS)
            opened.callback(context.term)
            context.set(zmq.MAX_SOCKETS, 4096)
            context.socket(zmq.PAIR).close(linger=0)  # starts its threads
            _let_malloc_keep_messages()
            self._wake_fd, self._context = wake_fd, context
            # a loop over sockets that ends them itself, so no thread of threads.py
            thread = threading.Thread(target=self._run, name="flexkv-peers", daemon=True)
            thread.start()
            opened.pop_all()
        self._thread = thread

    def _post(self, todo: Callable[[], None]) -> None:
        self._todo.append(todo)
        with self._lock:
            if self._thread is not None and not self._closed:
                os.eventfd_write(self._wake_fd, 1)

    def _abandon(self, pending: Pending) -> None:
        def give_up() -> None:
            channel = self._channels.get(pending.read.node_id)
            if channel is not None:
                channel.abandon(pending)

        self._post(give_up)

    def close(self) -> None:
        """End all reads as FAILED and the thread. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
            first, self._closed = not self._closed, True
            if thread is not None:
                os.eventfd_write(self._wake_fd, 1)
        if thread is not None:
            thread.join(_CLOSE_TIMEOUT_S)
            if thread.is_alive():
                return
            os.close(self._wake_fd)
        if self._rdma is not None and (first or thread is not None):
            self._rdma.close()

    # ---- the client's thread, from here on ----

    def _run(self) -> None:
        import zmq

        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        while not self._closed:
            try:
                self._round()
            except Exception as exc:  # noqa: BLE001 - the thread's end would end all reads to come
                self._log.log("round", logging.ERROR, "remote reads have failed", exc_info=exc)
                self._fail_all()
                time.sleep(_PAUSE_S)
        while self._todo:
            with suppress(Exception):  # a read that begins now fails below
                self._todo.popleft()()
        self._fail_all()
        if self._context is not None:
            self._context.term()

    def _fail_all(self) -> None:
        """End all reads as FAILED and close all links, whatever fails meanwhile."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            for end in (lambda c=channel: c.fail_all(PageOutcome.FAILED), channel.close_links):
                with suppress(Exception):
                    end()
        with suppress(Exception):
            self._forget_closed()

    def _round(self) -> None:
        now = time.monotonic()
        due = min((channel.next_tick() for channel in self._channels.values()), default=now + 60)
        pause_s = max(0.0, min(due - now, _ROUND_S if self._channels else 1.0))
        ready = dict(self._poller.poll(int(pause_s * 1000) + 1))
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        for sock in ready:
            entry = self._polled.get(sock)
            if entry is not None:
                channel, link = entry
                channel.receive(link)
                channel.pump()
        while self._todo:  # after the answers: an abandoned read may have been answered
            self._todo.popleft()()
        self._tick(time.monotonic())
        self._forget_closed()

    def _tick(self, now: float) -> None:
        for health in list(self._healths.values()):
            if health.probe_due():
                self._channel(health)
        if self._rdma is not None:
            self._rdma.tick(now)
        for node_id, channel in list(self._channels.items()):
            channel.tick(now)
            if channel.idle and now - channel.used_at > IDLE_S:
                channel.close_links()
                if not channel.health.is_open:
                    del self._channels[node_id]

    def _channel(self, health: PeerHealth) -> PeerChannel:
        channel = self._channels.get(health.node_id)
        if channel is None or channel.health is not health:
            idle = [c for c in self._channels.values() if c.idle]
            if len(self._channels) >= CHANNELS_MAX and idle:
                oldest = min(idle, key=lambda c: c.used_at)
                oldest.close_links()
                del self._channels[oldest.health.node_id]
            channel = self._make_channel(health)
            self._channels[health.node_id] = channel
        return channel

    def _make_channel(self, health: PeerHealth) -> PeerChannel:
        def open_link(address: str, page_bytes: int) -> Link:
            return self._open(health.node_id, address, page_bytes)

        if self._rdma is None:
            return PeerChannel(health, open_link, self._count)
        return RdmaChannel(health, open_link, self._count, self._rdma)

    def _renew(self, health: PeerHealth) -> None:
        """The peer has a new epoch or address."""
        channel = self._channels.get(health.node_id)
        if channel is not None:
            channel.renew()

    def _open(self, node_id: NodeId, address: str, page_bytes: int) -> Link:
        import zmq

        assert self._context is not None
        try:
            link = Link(self._context, address, self._share, self._secret, page_bytes)
        except (OSError, zmq.ZMQError) as exc:
            raise PeerError(f"cannot connect: {exc.strerror or exc}") from exc
        channel = self._channels[node_id]
        for sock in (link.sock, link.monitor):
            self._polled[sock] = (channel, link)
            self._poller.register(sock, zmq.POLLIN)
        return link

    def _forget_closed(self) -> None:
        for sock in [sock for sock in self._polled if sock.closed]:
            self._poller.unregister(sock)
            del self._polled[sock]


def _let_malloc_keep_messages() -> None:
    """Allocate and free almost 32 MiB, untouched, so that malloc reuses the memory of messages.

    ZeroMQ allocates each message separately. glibc maps a piece above its threshold each time, and the kernel clears
    all of it. The threshold rises to the largest piece of up to 32 MiB that was ever freed (mallopt(3),
    M_MMAP_THRESHOLD). Most processes with torch have freed one already. Other mallocs ignore this.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    libc.free(libc.malloc(_LARGE_PIECE_BYTES))
