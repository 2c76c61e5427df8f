"""Mooncake's transfer engine as an RDMA transport. Loaded only for ``share.engine: mooncake``.

Measured with 0.3.13.post1 over TCP (decision 022):

* The first contact with a stopped peer blocks a call for 62 s, and it holds a lock inside Mooncake: every other call
  that starts a transfer, to any peer, waits as long. So one thread starts transfers and does nothing else.
* A batch fails as soon as one of its pages fails; the others may still be written long after that. So each page is a
  batch of its own, and a transfer ends when all of them have ended.
* The calls that wait for a batch spin on a core. ``transfer_check_status`` does not wait, and takes no lock.

Invariant: a transfer is RUNNING until Mooncake has reported the end of every page that it was given.

Threads: one at a time; the transport has a thread of its own that starts transfers.
"""

from __future__ import annotations

import importlib
import logging
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from flexkv_sglang.backends.fleet.transport import Move, RdmaError, TransferState
from flexkv_sglang.errors import ConfigError

logger = logging.getLogger(__name__)

MODULE = "mooncake.engine"

SETTLE_S = 300.0
"""Others saw late bytes of a failed transfer (Mooncake#4247), on a fabric that we could not test."""

STUCK_S = 0.5
"""A transfer starts within a millisecond. While one takes longer than this, others are refused: ZeroMQ is quicker."""

_WAITED_MAX_S = 2.5
"""A transfer that waited longer is not started: half of its lease is over."""

_CLOSE_TIMEOUT_S = 1.0
_DONE, _FAILED = 1, -1  # of transfer_check_status; 0 and -2 (its own time-out): not ended
_REFUSED = (0, (1 << 64) - 1)  # of batch_transfer_async_read: instead of a batch
_ERRORS = (RuntimeError, ValueError, TypeError, OverflowError, MemoryError)
"""Raised through pybind11: C++ exceptions, and arguments that do not fit."""

_TARGET = re.compile(r"[A-Za-z0-9._-]{1,253}:[0-9]{1,5}")


def open_transport(host: Callable[[], str]) -> MooncakeTransport:
    """Called by ``transport.open_transport``."""
    return MooncakeTransport(host())


def load_engine() -> Any:
    """The class ``TransferEngine``. Raises ``ConfigError`` if Mooncake is not installed."""
    try:
        return importlib.import_module(MODULE).TransferEngine
    except (ImportError, AttributeError) as exc:
        raise ConfigError(
            f"share.engine: 'mooncake', but Mooncake cannot be imported ({exc}). Install it (without CUDA:"
            " pip install --no-deps mooncake-transfer-engine-non-cuda; it needs libibverbs1, libnuma1 and libcurl4"
            " of the system). Valid without it: 'zmq'"
        ) from exc


class MooncakeTransfer:
    """Pages on their way from ``target`` ("host:port"). The transport's thread calls ``start``, once.

    Each flag is written by one thread only: ``_whole``, then ``_started`` by that thread, ``_failed`` by the caller.
    """

    def __init__(self, engine: Any, target: str, moves: Sequence[Move]) -> None:
        self._engine, self._target, self._moves = engine, target, moves
        self._made = time.monotonic()
        self._batches: deque[int] = (
            deque()
        )  # filled by the transport's thread, emptied by the caller
        self._whole = False  # Mooncake has taken every page
        self._started = False  # Mooncake gets no more pages
        self._failed = False
        self._state = TransferState.RUNNING

    def start(self) -> None:
        """Give Mooncake all pages, or those before the first that it refuses."""
        try:
            self._whole = self._give()
        except _ERRORS:
            logger.debug("Mooncake cannot start a transfer", exc_info=True)
        finally:
            self._started = True

    def _give(self) -> bool:
        if time.monotonic() - self._made > _WAITED_MAX_S:
            return False
        for move in self._moves:
            batch = self._engine.batch_transfer_async_read(
                self._target, [move.target], [move.source], [move.byte_count]
            )
            if batch in _REFUSED:
                return False
            self._batches.append(batch)
        return True

    def poll(self) -> TransferState:
        """As ``Transfer``."""
        if self._state is not TransferState.RUNNING:
            return self._state
        started = self._started  # read it before the batches: then they are complete
        while self._batches:
            answer = self._look(self._batches[0])
            if answer not in (_DONE, _FAILED):
                return self._state
            self._batches.popleft()  # Mooncake has freed it: never ask again
            self._failed = self._failed or answer == _FAILED
        if started:
            well = self._whole and not self._failed
            self._state = TransferState.DONE if well else TransferState.FAILED
        return self._state

    def _look(self, batch: int) -> int:
        try:
            return int(self._engine.transfer_check_status(batch))
        except _ERRORS:
            logger.debug("Mooncake does not report a transfer", exc_info=True)
            return 0  # it may still run


class MooncakeTransport:
    """``host``: name or IPv4 address of this machine for others. Raises ``ConfigError``.

    It uses RDMA where Mooncake finds a device, else TCP, on ports of its own.
    """

    name = "mooncake"
    settle_s = SETTLE_S

    def __init__(self, host: str) -> None:
        engine_class = load_engine()
        if not _TARGET.fullmatch(f"{host}:1"):
            raise ConfigError(
                f"share.engine: 'mooncake', but it cannot be reached at {host!r}: it needs a name or an IPv4 address"
                " (share.listen, share.advertise). Valid without it: 'zmq'"
            )
        self._host = host
        self._address = 0
        self._running: list[MooncakeTransfer] = []
        self._jobs: queue.SimpleQueue[MooncakeTransfer | None] = queue.SimpleQueue()
        self._busy_since = 0.0  # written by the thread; 0.0: it is idle
        self._thread: threading.Thread | None = None
        try:
            self._engine = engine_class()
            # "rdma" affects only where Mooncake allocates its own buffers, which we do not use
            status = self._engine.initialize(host, "P2PHANDSHAKE", "rdma", "")
        except _ERRORS as exc:
            status = f"{type(exc).__name__}: {exc}"
        if status != 0:
            raise ConfigError(
                f"share.engine: 'mooncake', but Mooncake does not start ({status}; its log says why)."
                " Valid without it: 'zmq'"
            )

    def register(self, address: int, byte_count: int) -> None:
        """As ``RdmaTransport``."""
        assert not self._address, "registered twice"
        try:
            status = self._engine.register_memory(address, byte_count)
        except _ERRORS as exc:
            status = f"{type(exc).__name__}: {exc}"
        if status != 0:
            raise RdmaError(f"Mooncake cannot register {byte_count} bytes: {status}")
        self._address = address

    def blob(self) -> bytes:
        """As ``RdmaTransport``."""
        return f"{self._host}:{self._engine.get_rpc_port()}".encode("ascii")

    def read(self, blob: bytes, moves: Sequence[Move]) -> MooncakeTransfer:
        """As ``RdmaTransport``."""
        target = blob.decode("ascii", "replace")
        if not _TARGET.fullmatch(target):
            raise RdmaError(f"Mooncake cannot read from {target[:64]!r}")
        self._running = [t for t in self._running if t.poll() is TransferState.RUNNING]
        since = self._busy_since
        if since and time.monotonic() - since > STUCK_S:
            raise RdmaError("Mooncake is stuck in a call to another node")
        if self._thread is None:
            self._thread = self._start_thread()
        transfer = MooncakeTransfer(self._engine, target, moves)
        self._running.append(transfer)
        self._jobs.put(transfer)
        return transfer

    def _start_thread(self) -> threading.Thread:
        # no JobThread: its ``stop`` drops jobs, and a transfer that was accepted must end
        thread = threading.Thread(target=self._run, name="flexkv-mooncake", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            raise RdmaError(f"no thread for Mooncake: {exc}") from exc
        return thread

    def _run(self) -> None:
        while (transfer := self._jobs.get()) is not None:
            self._busy_since = time.monotonic()
            transfer.start()
            self._busy_since = 0.0

    def close(self) -> bool:
        """As ``RdmaTransport``. Waits for a second at most."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join(_CLOSE_TIMEOUT_S)
            if self._thread.is_alive():
                return False
            self._thread = None
        self._running = [t for t in self._running if t.poll() is TransferState.RUNNING]
        if self._running:
            return False
        address, self._address = self._address, 0
        if address and (status := self._engine.unregister_memory(address)) != 0:
            logger.warning("Mooncake cannot deregister its memory: %s", status)
            return False
        return True
