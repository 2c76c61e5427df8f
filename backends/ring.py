"""Ring: io_uring from Python with numpy and ctypes. No compiled code, one system call per window of pages.

Invariant: **a call returns only when every submitted operation has completed**; until then the kernel
owns the caller's memory. Submission entries are written as numpy arrays into the mapped queue, the
system call goes through ctypes, which releases the GIL.

Interface of the kernel: ``io_uring_setup(2)``, ``io_uring_enter(2)``. Needs Linux 5.6; deadlines need
5.11 (``IORING_FEAT_EXT_ARG``), and without them the ring is refused. Never SQPOLL: the plain stores to
the queue tail are ordered by the system call that follows them, and only by that.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.io import CLOSE_TIMEOUT_S, IOVEC, NOT_TRIED, IoBatch, OnDone
from flexkv_sglang.types import I64

_NR_SETUP, _NR_ENTER = 425, 426  # the same on x86-64 and aarch64
_OP_READV, _OP_WRITEV, _OP_READ, _OP_WRITE = 1, 2, 22, 23
_SETUP_CLAMP = 1 << 4
_ENTER_GETEVENTS, _ENTER_EXT_ARG = 1 << 0, 1 << 3
_FEAT_SINGLE_MMAP, _FEAT_EXT_ARG = 1 << 0, 1 << 8
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_MASK32 = 0xFFFFFFFF
_MIN_IN_FLIGHT_BYTES = 8 << 20
_MIN_DEPTH, _MAX_DEPTH = 8, 128
_FAILED_ENTER_PAUSE_S = 0.001

_SQE = np.dtype(
    [
        ("opcode", "u1"),
        ("flags", "u1"),
        ("ioprio", "<u2"),
        ("fd", "<i4"),
        ("off", "<u8"),
        ("addr", "<u8"),
        ("len", "<u4"),
        ("rw_flags", "<u4"),
        ("user_data", "<u8"),
        ("buf_index", "<u2"),
        ("personality", "<u2"),
        ("splice_fd", "<i4"),
        ("addr3", "<u8"),
        ("pad", "<u8"),
    ]
)
_CQE = np.dtype([("user_data", "<u8"), ("res", "<i4"), ("flags", "<u4")])
assert _SQE.itemsize == 64
assert _CQE.itemsize == 16

_libc = ctypes.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.restype = ctypes.c_long


def _words(*names: str) -> list[tuple[str, type[ctypes.c_uint32]]]:
    return [(name, ctypes.c_uint32) for name in names]


class _SqOffsets(ctypes.Structure):
    _fields_ = (
        *_words("head", "tail", "ring_mask", "ring_entries", "flags", "dropped", "array", "resv1"),
        ("user_addr", ctypes.c_uint64),
    )


class _CqOffsets(ctypes.Structure):
    _fields_ = (
        *_words("head", "tail", "ring_mask", "ring_entries", "overflow", "cqes", "flags", "resv1"),
        ("user_addr", ctypes.c_uint64),
    )


class _Params(ctypes.Structure):
    _fields_ = (
        *_words(
            "sq_entries",
            "cq_entries",
            "flags",
            "sq_thread_cpu",
            "sq_thread_idle",
            "features",
            "wq_fd",
        ),
        ("resv", ctypes.c_uint32 * 3),
        ("sq", _SqOffsets),
        ("cq", _CqOffsets),
    )


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_int64)]


class _EnterArg(ctypes.Structure):
    _fields_ = [
        ("sigmask", ctypes.c_uint64),
        ("sigmask_sz", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("ts", ctypes.c_uint64),
    ]


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Ring:
    """An io_uring instance. ``OSError`` from the constructor: the kernel or its policy refuses io_uring."""

    kind = "io_uring"

    def __init__(self, entries: int = _MAX_DEPTH) -> None:
        self._lock = threading.Lock()  # one batch at a time; the kernel's queues are guarded by it
        params = _Params()
        params.flags = _SETUP_CLAMP
        self._fd = _checked(_syscall(_NR_SETUP, ctypes.c_uint(entries), ctypes.byref(params)))
        try:
            self._map(params)
        except BaseException:
            os.close(self._fd)
            raise

    def _map(self, params: _Params) -> None:
        if not (params.features & _FEAT_SINGLE_MMAP and params.features & _FEAT_EXT_ARG):
            raise OSError(errno.ENOSYS, "io_uring without bounded waits (Linux < 5.11)")
        size = max(
            params.sq.array + 4 * params.sq_entries,
            params.cq.cqes + _CQE.itemsize * params.cq_entries,
        )
        flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
        ring = mmap.mmap(self._fd, size, flags=flags, offset=_OFF_SQ_RING)
        sqes = mmap.mmap(self._fd, _SQE.itemsize * params.sq_entries, flags=flags, offset=_OFF_SQES)
        self._words: npt.NDArray[np.uint32] = np.frombuffer(ring, np.uint32, count=size // 4)
        self._sqes: npt.NDArray[Any] = np.frombuffer(sqes, _SQE)
        self._cqes: npt.NDArray[Any] = np.frombuffer(
            ring, _CQE, count=params.cq_entries, offset=params.cq.cqes
        )
        self._entries = int(params.sq_entries)
        self._sq_head, self._sq_tail = params.sq.head // 4, params.sq.tail // 4
        self._cq_head, self._cq_tail = params.cq.head // 4, params.cq.tail // 4
        self._cq_mask = int(params.cq_entries) - 1
        array = params.sq.array // 4
        self._words[array : array + self._entries] = np.arange(self._entries, dtype=np.uint32)
        self._tail = self._head = 0

    def read(self, batch: IoBatch, deadline: float, on_done: OnDone | None = None) -> I64:
        """Medium to memory; see ``IoEngine``."""
        return self._run(batch, deadline, on_done, writing=False)

    def write(self, batch: IoBatch, deadline: float, on_done: OnDone | None = None) -> I64:
        """Memory to medium; see ``IoEngine``."""
        return self._run(batch, deadline, on_done, writing=True)

    def close(self) -> bool:
        """Give the ring back once no batch runs; see ``IoEngine``."""
        if not self._lock.acquire(timeout=CLOSE_TIMEOUT_S):
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
        return True

    def _run(
        self, batch: IoBatch, deadline: float, on_done: OnDone | None, *, writing: bool
    ) -> I64:
        results = np.full(len(batch), NOT_TRIED, np.int64)
        if not len(batch):
            return results
        vectors = batch.iovecs()  # must stay alive until every completion is in
        todo = self._entries_for(batch, vectors, writing=writing)
        with self._lock:
            if self._fd < 0:
                raise OSError(errno.EBADF, "the ring is closed")
            self._drive(
                todo, results, depth_for(batch.page_bytes, self._entries), deadline, on_done
            )
        return results

    @staticmethod
    def _entries_for(
        batch: IoBatch, vectors: npt.NDArray[np.void], *, writing: bool
    ) -> npt.NDArray[Any]:
        """All submission entries of a batch, computed without a Python loop."""
        todo = np.zeros(len(batch), _SQE)
        buffers = batch.addresses.shape[1]
        todo["fd"], todo["off"] = batch.fds, batch.offsets
        todo["user_data"] = np.arange(len(batch), dtype=np.uint64)
        if buffers == 1:
            todo["opcode"] = _OP_WRITE if writing else _OP_READ
            todo["addr"], todo["len"] = batch.addresses[:, 0], batch.lengths[0]
        else:
            todo["opcode"] = _OP_WRITEV if writing else _OP_READV
            step = np.uint64(buffers * IOVEC.itemsize)
            todo["addr"] = (
                np.uint64(vectors.ctypes.data) + np.arange(len(batch), dtype=np.uint64) * step
            )
            todo["len"] = buffers
        return todo

    def _drive(
        self,
        todo: npt.NDArray[Any],
        results: I64,
        depth: int,
        deadline: float,
        on_done: OnDone | None,
    ) -> None:
        """Keep a sliding window of ``depth`` operations in flight until all are done or time is up."""
        total, queued, in_flight = len(todo), 0, 0
        failure: BaseException | None = None
        while True:
            left = deadline - time.monotonic()
            stop = left <= 0 or failure is not None
            room = 0 if stop else min(depth - in_flight, total - queued)
            if room > 0:
                self._queue(todo[queued : queued + room])
                queued += room
                in_flight += room
            if in_flight == 0:
                break
            # Wake at half a window while more is to come: keeps the device busy with few GIL hand-overs.
            draining = stop or queued == total
            want = in_flight if draining else max(1, in_flight // 2)
            if on_done is not None and draining:
                want = 1  # hand each page on as it lands: the check of one overlaps the I/O of the others
            try:
                self._enter(want, None if stop else left)
            except OSError as exc:
                failure = failure or exc
                in_flight -= self._take_back()
                time.sleep(_FAILED_ENTER_PAUSE_S)  # what the kernel took still completes by itself
            done = self._reap(results)
            in_flight -= len(done)
            if on_done is not None and len(done) and failure is None:
                try:
                    on_done(done, results[done])
                except BaseException as exc:  # noqa: BLE001 - re-raised below; I/O in flight drains first
                    failure = exc
        if failure is not None:
            raise failure

    def _queue(self, entries: npt.NDArray[Any]) -> None:
        count = len(entries)
        self._sqes[np.arange(self._tail, self._tail + count) & (self._entries - 1)] = entries
        self._tail = (self._tail + count) & _MASK32
        self._words[self._sq_tail] = self._tail

    def _enter(self, want: int, left: float | None) -> None:
        """Submit what is queued and wait for ``want`` completions, at most ``left`` seconds."""
        # Recomputed from the kernel's head each time: after a partial submission or EINTR entries stay behind.
        pending = (self._tail - int(self._words[self._sq_head])) & _MASK32
        bounded = 1.0 if left is None else left
        ts = _Timespec(int(bounded), int((bounded % 1) * 1e9))
        arg = _EnterArg(0, 0, 0, ctypes.addressof(ts))
        result = _syscall(
            _NR_ENTER,
            ctypes.c_uint(self._fd),
            ctypes.c_uint(pending),
            ctypes.c_uint(want),
            ctypes.c_uint(_ENTER_GETEVENTS | _ENTER_EXT_ARG),
            ctypes.byref(arg),
            ctypes.c_size_t(ctypes.sizeof(arg)),
        )
        if result < 0 and ctypes.get_errno() not in (
            errno.EINTR,
            errno.ETIME,
            errno.EAGAIN,
            errno.EBUSY,
        ):
            _checked(result)

    def _take_back(self) -> int:
        """Withdraw queued entries that the kernel has not taken. Returns how many."""
        head = int(self._words[self._sq_head])
        pending = (self._tail - head) & _MASK32
        self._tail = head
        self._words[self._sq_tail] = head
        return pending

    def _reap(self, results: I64) -> npt.NDArray[np.intp]:
        tail = int(self._words[self._cq_tail])
        count = (tail - self._head) & _MASK32
        if not count:
            return np.empty(0, np.intp)
        got = self._cqes[
            np.arange(self._head, self._head + count) & self._cq_mask
        ]  # fancy index: a copy
        self._head = tail
        self._words[self._cq_head] = tail
        done: npt.NDArray[np.intp] = got["user_data"].astype(np.intp)
        results[done] = got["res"]
        return done


def depth_for(page_bytes: int, limit: int = _MAX_DEPTH) -> int:
    """Operations in flight for pages of this size: at least 8 MiB, between 8 and ``limit``."""
    wanted = -(-_MIN_IN_FLIGHT_BYTES // max(page_bytes, 1))
    return max(1, min(max(wanted, _MIN_DEPTH), _MAX_DEPTH, limit))
