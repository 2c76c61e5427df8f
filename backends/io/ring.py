"""Ring: io_uring from Python with numpy. No compiled code, one system call per window of operations.

Invariant: **a call returns only when every submitted operation has completed**; until then the kernel
owns the caller's memory. Only a write that hangs is left: its slots get no record, so late bytes harm nobody.
Submission entries are written as numpy arrays into the mapped queue.

Needs Linux 5.11 (``IORING_FEAT_EXT_ARG``: bounded waits), otherwise the ring is refused. Never SQPOLL: the
plain stores to the queue tail are ordered by the system call that follows them, and only by that. Files
are not registered: that gained nothing measurable, and an entry would outlive its closed descriptor.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import threading
import time
from collections import Counter, deque
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io import uring
from flexkv_sglang.backends.io.operations import Operations
from flexkv_sglang.backends.io.pinned_memory import PinnedMemory
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.transfer import CLOSE_TIMEOUT_S, PageTransfer, Positions, take_turn
from flexkv_sglang.threads import OVERDUE_S, JobThread
from flexkv_sglang.types import I64, U64

logger = logging.getLogger(__name__)

_MASK32 = 0xFFFFFFFF
_MIN_IN_FLIGHT_BYTES = 32 << 20
"""Half of it lasts a fast disk longer than a busy interpreter keeps the GIL (5 ms)."""

_MIN_DEPTH, _MAX_DEPTH = 8, 128
_FAILED_ENTER_PAUSE_S = 0.001
_STALL_S = 0.25  # a window that does not move for this long is widened
_NOTHING = np.zeros(0, np.int64)


class Ring:
    """An io_uring instance. ``OSError`` from the constructor: the kernel or its policy refuses io_uring.

    ``counts``: "operations" submitted, "fixed_operations" of them on pinned memory, "pinned_bytes".
    """

    kind = "io_uring"

    def __init__(self, entries: int = _MAX_DEPTH, traffic: ReadPriority | None = None) -> None:
        self._lock = threading.Lock()  # one batch at a time; guards the queues and the regions
        self._traffic = traffic or ReadPriority()
        self._closing = False
        self._regions = PinnedMemory()
        self._announced: deque[tuple[int, int]] = deque()  # for the next batch; append is atomic
        self.counts: Counter[str] = Counter()
        self.given_up = False
        self._pinning: JobThread[int] | None = None
        params = uring.Params()
        params.flags = uring.SETUP_CLAMP
        self._fd = uring.checked(
            uring.syscall(uring.NR_SETUP, ctypes.c_uint(entries), ctypes.byref(params))
        )
        try:
            self._map(params)
        except BaseException:
            os.close(self._fd)
            raise

    def _map(self, params: uring.Params) -> None:
        if not (params.features & uring.FEAT_SINGLE_MMAP and params.features & uring.FEAT_EXT_ARG):
            raise OSError(errno.ENOSYS, "io_uring without bounded waits (Linux < 5.11)")
        size = max(
            params.sq.array + 4 * params.sq_entries,
            params.cq.cqes + uring.CQE.itemsize * params.cq_entries,
        )
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        ring = mmap.mmap(self._fd, size, flags=flags, offset=uring.OFF_SQ_RING)
        sqes = mmap.mmap(
            self._fd, uring.SQE.itemsize * params.sq_entries, flags=flags, offset=uring.OFF_SQES
        )
        self._words: npt.NDArray[np.uint32] = np.frombuffer(ring, np.uint32, count=size // 4)
        self._sqes: npt.NDArray[Any] = np.frombuffer(sqes, uring.SQE)
        self._cqes: npt.NDArray[Any] = np.frombuffer(
            ring, uring.CQE, count=params.cq_entries, offset=params.cq.cqes
        )
        self._entries = int(params.sq_entries)
        self._sq_head, self._sq_tail = params.sq.head // 4, params.sq.tail // 4
        self._cq_head, self._cq_tail = params.cq.head // 4, params.cq.tail // 4
        self._cq_mask = int(params.cq_entries) - 1
        array = params.sq.array // 4
        self._words[array : array + self._entries] = np.arange(self._entries, dtype=np.uint32)
        self._tail = self._head = 0

    def move(self, transfer: PageTransfer) -> None:
        """See ``IoEngine``. A write has few operations in flight while reads are under way."""
        if not len(transfer):
            return
        addresses = transfer.buffers.addresses.reshape(-1)
        lengths = np.tile(transfer.buffers.lengths, len(transfer))
        with nullcontext() if transfer.writing else self._traffic.reading():
            if not take_turn(self._lock, self, transfer.deadline):
                return
            left = 0
            try:
                todo = self._prepared(transfer, addresses, lengths)
                left = self._drive(transfer, todo)
            finally:
                if not left:
                    self._lock.release()
            if left:
                self._leave(transfer, todo, left)

    def _prepared(self, transfer: PageTransfer, addresses: U64, lengths: U64) -> Operations:
        if self._fd < 0:
            raise OSError(errno.EBADF, "the ring is closed")
        while self._announced:
            self._regions.announce(self._fd, *self._announced.popleft())
        if self._pinning is not None:
            for piece in self._regions.ask(addresses, lengths):
                self._pinning.put(piece)
        todo = Operations(transfer, self._regions.entries(addresses, lengths))
        self.counts["operations"] += todo.waiting
        self.counts["fixed_operations"] += todo.fixed
        return todo

    def register_memory(self, address: int, byte_count: int) -> None:
        """Pin this memory once it is used, as far as the kernel allows; see ``PinnedMemory``. Never waits."""
        self._announced.append((address, byte_count))
        if self._pinning is None:
            self._pinning = JobThread("flexkv-pinning", self._pin, self._not_pinned)

    def _pin(self, piece: int) -> None:
        with self._lock:
            if self._fd >= 0:
                self._regions.pin(self._fd, piece)
                self.counts["pinned_bytes"] = self._regions.pinned_bytes

    @staticmethod
    def _not_pinned(_piece: int, exc: Exception) -> None:
        logger.error("flexkv: memory is not pinned", exc_info=exc)

    def close(self, seconds: float = CLOSE_TIMEOUT_S) -> bool:
        """Give the ring back once no batch runs; see ``IoEngine``."""
        self._closing = True
        if not self._lock.acquire(timeout=max(0.0, seconds)):
            return (
                False  # the kernel still writes into somebody's memory: everything stays as it is
            )
        try:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
                # Each mapping holds a duplicate of the descriptor; they go with their last view.
                del self._words, self._sqes, self._cqes
        finally:
            self._lock.release()
        if self._pinning is not None:
            self._pinning.stop(0.0)
        return True

    def _leave(self, transfer: PageTransfer, todo: Operations, in_flight: int) -> None:
        """A write hangs: the caller goes, a thread keeps ring and memory until the kernel has let go of them."""

        def drain() -> None:
            left = in_flight
            while left:
                try:
                    self._enter(1, None)
                except OSError:
                    time.sleep(1.0)
                ids, moved = self._reap()
                left -= len(ids)
                todo.results(ids, moved)
            self._lock.release()
            transfer.settle()

        self.given_up = True
        threading.Thread(target=drain, name="flexkv-drain", daemon=True).start()

    def _drive(self, transfer: PageTransfer, todo: Operations) -> int:
        """Keep a sliding window of operations in flight until all are done or time is up.

        A window that does not move is widened: behind operations of a disk that hangs wait those of another. Returns
        the operations in flight that are left, of a write that hangs.
        """
        full = depth_for(todo.mean_bytes, self._entries)
        in_flight = wider = 0
        failure: BaseException | None = None
        while True:
            asked_at = time.monotonic()
            left = transfer.deadline - asked_at
            stop = left <= 0 or failure is not None or self._closing
            depth = self._depth(transfer, todo, full) + wider
            if not stop and todo.waiting and in_flight < min(depth, self._entries):
                entries = todo.take(min(depth, self._entries) - in_flight)
                transfer.begin(todo.pages(entries))
                self._queue(entries)
                in_flight += len(entries)
            if in_flight == 0 or (transfer.writing and left < -OVERDUE_S):
                break
            # Wake at half a window while more is to come: busy device, few GIL hand-overs. At the end wake for
            # each page: the check of one overlaps the transfer of the others.
            want = 1 if stop or not todo.waiting else max(1, in_flight // 2)
            try:
                if failure is None and self._pending():
                    self._enter(0, None)  # submit, then verify while the operations run
                if failure is not None or not transfer.run_pending():
                    self._enter(want, _STALL_S if stop else min(left, _STALL_S))
            except BaseException as exc:  # noqa: BLE001 - re-raised below; I/O in flight drains first
                failure = failure or exc
                in_flight -= self._take_back()
                time.sleep(_FAILED_ENTER_PAUSE_S)  # operations that the kernel took still complete
            ids, moved = self._reap()
            in_flight -= len(ids)
            wider += full * (time.monotonic() - asked_at >= _STALL_S)
            if failure is None and len(ids):
                failure = _report(transfer, *todo.results(ids, moved))
        if not in_flight:
            transfer.land()  # pages that were begun and given back: late, which is no hang
        if failure is not None and not in_flight:
            raise failure
        return in_flight

    def _depth(self, transfer: PageTransfer, todo: Operations, full: int) -> int:
        return self._traffic.write_depth(full, todo.mean_bytes) if transfer.writing else full

    def _queue(self, entries: npt.NDArray[Any]) -> None:
        count = len(entries)
        self._sqes[np.arange(self._tail, self._tail + count) & (self._entries - 1)] = entries
        self._tail = (self._tail + count) & _MASK32
        self._words[self._sq_tail] = self._tail

    def _enter(self, want: int, left: float | None) -> None:
        """Submit what is queued and wait for ``want`` completions, at most ``left`` seconds."""
        pending = self._pending()
        bounded = 1.0 if left is None else left
        ts = uring.Timespec(int(bounded), int((bounded % 1) * 1e9))
        arg = uring.EnterArg(0, 0, 0, ctypes.addressof(ts))
        result = uring.syscall(
            uring.NR_ENTER,
            ctypes.c_uint(self._fd),
            ctypes.c_uint(pending),
            ctypes.c_uint(want),
            ctypes.c_uint(uring.ENTER_GETEVENTS | uring.ENTER_EXT_ARG),
            ctypes.byref(arg),
            ctypes.c_size_t(ctypes.sizeof(arg)),
        )
        if result < 0 and ctypes.get_errno() not in (
            errno.EINTR,
            errno.ETIME,
            errno.EAGAIN,
            errno.EBUSY,
        ):
            uring.checked(result)

    def _pending(self) -> int:
        """Queued entries that the kernel has not taken. Recomputed from its head each time: after a partial
        submission or EINTR entries stay behind."""
        return (self._tail - int(self._words[self._sq_head])) & _MASK32

    def _take_back(self) -> int:
        """Withdraw queued entries that the kernel has not taken. Returns how many."""
        head = int(self._words[self._sq_head])
        pending = (self._tail - head) & _MASK32
        self._tail = head
        self._words[self._sq_tail] = head
        return pending

    def _reap(self) -> tuple[I64, I64]:
        """``user_data`` and ``res`` of the completions that are in."""
        tail = int(self._words[self._cq_tail])
        count = (tail - self._head) & _MASK32
        if not count:
            return _NOTHING, _NOTHING
        places = np.arange(self._head, self._head + count) & self._cq_mask
        got = self._cqes[places]  # fancy index: a copy
        self._head = tail
        self._words[self._cq_head] = tail
        return got["user_data"].astype(np.int64), got["res"].astype(np.int64)


def _report(transfer: PageTransfer, pages: Positions, moved: I64) -> BaseException | None:
    try:
        transfer.on_complete(pages, moved)
    except BaseException as exc:  # noqa: BLE001 - raised by the caller once nothing is in flight
        return exc
    return None


def depth_for(operation_bytes: int, limit: int = _MAX_DEPTH) -> int:
    """Operations of this size in flight: at least 32 MiB, between 8 and ``limit`` (or 128)."""
    wanted = -(-_MIN_IN_FLIGHT_BYTES // max(operation_bytes, 1))
    return max(1, min(max(wanted, _MIN_DEPTH), _MAX_DEPTH, limit))
