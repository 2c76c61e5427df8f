"""What an I/O engine is: a batch of positioned page transfers in, one result per page out.

Two engines have this shape: ``ring.Ring`` (io_uring) and ``posix_io.PosixIo`` (threads). Which one a
directory gets is decided by ``probe.probe_directory`` with a real write and read.
"""

from __future__ import annotations

import errno
from collections import Counter
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flexkv_sglang.types import I64, U64

NOT_TRIED = -errno.ETIME
"""Result of a page that was not submitted before the deadline."""

CLOSE_TIMEOUT_S = 6.0
"""SGLang joins its threads for 10 s when a backend is detached; a hung disk must not exceed that."""

IOVEC = np.dtype([("base", "<u8"), ("len", "<u8")])
IOV_MAX = 1024


class Progress(Protocol):
    """What a caller does while its batch is in flight.

    ``landed``: these batch positions have their final results (each position once). ``work``: do a little,
    about the time of one transfer; False if there was nothing to do. The ring calls both from the calling
    thread and never waits while there is work; the thread engine calls them from several threads.
    What is left when the call returns is the caller's to do.
    """

    def landed(self, positions: npt.NDArray[np.intp], moved: I64) -> None: ...
    def work(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class IoBatch:
    """``n`` pages: page ``i`` moves between ``fds[i]`` at ``offsets[i]`` and its memory buffers.

    ``fds`` int32 ``[n]``; ``offsets`` uint64 ``[n]`` bytes; ``addresses`` uint64 ``[n, b]``; ``lengths``
    uint64 ``[b]`` bytes. The buffers of a page are adjacent on the medium, in order (one extent).
    """

    fds: npt.NDArray[np.int32]
    offsets: U64
    addresses: U64
    lengths: U64

    def __len__(self) -> int:
        return len(self.offsets)

    @property
    def page_bytes(self) -> int:
        """Bytes moved per page; a result that differs is a failed page."""
        return int(self.lengths.sum())

    def iovecs(self) -> npt.NDArray[np.void]:
        """``[n * b]`` iovec structs, those of a page side by side."""
        vec = np.empty(self.addresses.shape, IOVEC)
        vec["base"] = self.addresses
        vec["len"] = self.lengths
        return vec.reshape(-1)


class IoEngine(Protocol):
    """Moves batches. One call at a time per engine (it has its own lock); any thread may call.

    ``read`` / ``write`` return int64 ``[n]``: bytes moved, ``-errno``, or ``NOT_TRIED``; a page has at most
    ``IOV_MAX`` buffers. They return only when no transfer is in flight any more: after that nothing
    touches the caller's memory. An exception of ``progress`` is raised then, too. ``register_memory``
    announces memory that may be pinned; it must stay mapped until ``close``. ``close`` waits
    ``CLOSE_TIMEOUT_S`` for a running batch and answers whether it ended; idempotent. ``counts``: what was done.
    """

    kind: str
    counts: Counter[str]

    def read(self, batch: IoBatch, deadline: float, progress: Progress | None = None) -> I64: ...
    def write(self, batch: IoBatch, deadline: float, progress: Progress | None = None) -> I64: ...
    def register_memory(self, address: int, byte_count: int) -> None: ...
    def close(self) -> bool: ...
