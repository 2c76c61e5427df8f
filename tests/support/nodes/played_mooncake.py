"""A stand-in for ``mooncake.engine`` as measured (decision 022), in this process.

``TransferEngine`` has the calls that ours makes. Batches end when a test says so, or at once with ``at_once``.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import ClassVar

WAITING, COMPLETED, FAILED, TIMEOUT = 0, 1, -1, -2


class TransferEngine:
    """``batches``: number -> (target, source, bytes, status) of those that are not freed. ``hold``: cleared, the next
    call that starts a batch hangs; ``entered`` is set when that call begins. ``answers``: instead of a batch's number.
    """

    at_once: ClassVar[bool] = False
    status: ClassVar[int] = 0
    made: ClassVar[list[TransferEngine]] = []

    def __init__(self) -> None:
        self.batches: dict[int, tuple[int, int, int, int]] = {}
        self.asked: list[str] = []
        self.answers: list[int] = []
        self.memory: dict[int, int] = {}
        self.hold, self.entered = threading.Event(), threading.Event()
        self.hold.set()
        self._numbers = itertools.count(94_000_000_000_000)
        self.made.append(self)

    def initialize(self, host: str, metadata: str, protocol: str, device: str) -> int:
        """0: it runs."""
        self.host = host
        assert (metadata, protocol, device) == ("P2PHANDSHAKE", "rdma", "")
        return self.status

    def get_rpc_port(self) -> int:
        """The port for remote access to its memory."""
        return 15000

    def register_memory(self, address: int, byte_count: int) -> int:
        """0, or its error for memory that overlaps."""
        if address in self.memory:
            return -7
        self.memory[address] = byte_count
        return 0

    def unregister_memory(self, address: int) -> int:
        """0, or its error for unknown memory."""
        return 0 if self.memory.pop(address, 0) else -3

    def batch_transfer_async_read(
        self, host: str, targets: list[int], sources: list[int], lengths: list[int]
    ) -> int:
        """The number of a batch."""
        self.entered.set()
        assert self.hold.wait(20)
        self.asked.append(host)
        (target,), (source,), (length,) = targets, sources, lengths
        if self.answers and (answer := self.answers.pop(0)) != 1:
            return answer
        number = next(self._numbers)
        self.batches[number] = (target, source, length, WAITING)
        if self.at_once:
            self.finish(number)
        return number

    def finish(self, number: int, status: int = COMPLETED) -> None:
        """End a batch with ``status``, after copying its bytes."""
        target, source, length, _ = self.batches[number]
        ctypes.memmove(target, source, length)
        self.batches[number] = (target, source, length, status)

    def transfer_check_status(self, number: int) -> int:
        """The status of a batch. An ended batch is freed; asking again would crash the real Mooncake."""
        status = self.batches[number][3]
        if status in (COMPLETED, FAILED):
            del self.batches[number]
        return status
