"""The kernel's side of io_uring: numbers, structures and system calls. Knows nothing of pages.

Interface of the kernel: ``io_uring_setup(2)``, ``io_uring_enter(2)``, ``io_uring_register(2)``. The calls go
through ctypes, which releases the GIL.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np

NR_SETUP, NR_ENTER, NR_REGISTER = 425, 426, 427  # the same on x86-64 and aarch64
OP_READV, OP_WRITEV, OP_READ_FIXED, OP_WRITE_FIXED, OP_READ, OP_WRITE = 1, 2, 4, 5, 22, 23
SETUP_CLAMP = 1 << 4
ENTER_GETEVENTS, ENTER_EXT_ARG = 1 << 0, 1 << 3
FEAT_SINGLE_MMAP, FEAT_EXT_ARG = 1 << 0, 1 << 8
OFF_SQ_RING, OFF_SQES = 0, 0x10000000
REGISTER_BUFFERS2, REGISTER_BUFFERS_UPDATE = 15, 16
RSRC_SPARSE = 1 << 0  # Linux 5.19
UNREGISTER_BUFFERS = 1

SQE = np.dtype(
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
CQE = np.dtype([("user_data", "<u8"), ("res", "<i4"), ("flags", "<u4")])
IOVEC = np.dtype([("base", "<u8"), ("len", "<u8")])
assert SQE.itemsize == 64
assert CQE.itemsize == 16

_libc = ctypes.CDLL(None, use_errno=True)
syscall = _libc.syscall
syscall.restype = ctypes.c_long


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


class Params(ctypes.Structure):
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


class Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_int64), ("nsec", ctypes.c_int64)]


class IoVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_uint64), ("len", ctypes.c_uint64)]


class EnterArg(ctypes.Structure):
    _fields_ = [
        ("sigmask", ctypes.c_uint64),
        ("sigmask_sz", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("ts", ctypes.c_uint64),
    ]


def checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class _RsrcRegister(ctypes.Structure):
    _fields_ = [
        ("nr", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("resv2", ctypes.c_uint64),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
    ]


class _RsrcUpdate(ctypes.Structure):
    _fields_ = [
        ("offset", ctypes.c_uint32),
        ("resv", ctypes.c_uint32),
        ("data", ctypes.c_uint64),
        ("tags", ctypes.c_uint64),
        ("nr", ctypes.c_uint32),
        ("resv2", ctypes.c_uint32),
    ]


def _register(fd: int, what: int, argument: ctypes.Structure | None, count: int) -> None:
    checked(
        syscall(
            NR_REGISTER,
            ctypes.c_uint(fd),
            ctypes.c_uint(what),
            None if argument is None else ctypes.byref(argument),
            ctypes.c_uint(count),
        )
    )


def make_buffer_table(fd: int, entries: int) -> None:
    """An empty table of registered buffers. ``OSError``: Linux < 5.19."""
    table = _RsrcRegister(nr=entries, flags=RSRC_SPARSE)
    _register(fd, REGISTER_BUFFERS2, table, ctypes.sizeof(table))


def drop_buffer_table(fd: int) -> None:
    """Unpin everything that is registered."""
    _register(fd, UNREGISTER_BUFFERS, None, 0)


def pin_buffer(fd: int, entry: int, address: int, byte_count: int) -> None:
    """Pin ``byte_count`` bytes (<= 1 GiB) and enter them. ``OSError``: ENOMEM beyond ``RLIMIT_MEMLOCK``."""
    vector = IoVec(address, byte_count)
    update = _RsrcUpdate(offset=entry, data=ctypes.addressof(vector), nr=1)
    _register(fd, REGISTER_BUFFERS_UPDATE, update, ctypes.sizeof(update))
