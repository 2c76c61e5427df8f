"""An RDMA transport between a server and a client of this process: it copies memory when a test says so."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

from flexkv_sglang.backends.fleet.transport import Move, RdmaError, TransferState

RUNNING, DONE, FAILED = TransferState.RUNNING, TransferState.DONE, TransferState.FAILED


class CopyTransfer:
    """Moves that ``finish`` carries out."""

    def __init__(self, moves: Sequence[Move]) -> None:
        self.moves = list(moves)
        self.state = RUNNING

    def finish(self, state: TransferState = DONE) -> None:
        """Write to the targets now, and end as ``state``."""
        for move in self.moves:
            ctypes.memmove(move.target, move.source, move.byte_count)
        self.state = state

    def poll(self) -> TransferState:
        """As ``Transfer``."""
        return self.state


class CopyTransport:
    """``behaviour``: "copy" at once, "hang", "fail", "refuse" or "no memory". ``transfers``: all of them.

    ``before``: called at the start of a read.
    """

    name = "nixl"
    settle_s = 20.0

    def __init__(self, behaviour: str = "copy") -> None:
        self.behaviour = behaviour
        self.memory = (0, 0)
        self.transfers: list[CopyTransfer] = []
        self.closed = False
        self.before: Callable[[], object] = lambda: None

    def register(self, address: int, byte_count: int) -> None:
        """As ``RdmaTransport``."""
        if self.behaviour == "no memory":
            raise RdmaError("no memory")
        self.memory = (address, byte_count)

    def blob(self) -> bytes:
        """As ``RdmaTransport``."""
        return b"blob of %d" % self.memory[0]

    def read(self, blob: bytes, moves: Sequence[Move]) -> CopyTransfer:
        """As ``RdmaTransport``."""
        self.before()
        assert blob.startswith(b"blob of ")
        start, byte_count = self.memory
        assert all(start <= m.target <= start + byte_count - m.byte_count for m in moves)
        if self.behaviour == "refuse":
            raise RdmaError("refused")
        transfer = CopyTransfer(moves)
        self.transfers.append(transfer)
        if self.behaviour == "copy":
            transfer.finish()
        elif self.behaviour == "fail":
            transfer.state = FAILED
        return transfer

    def close(self) -> bool:
        """As ``RdmaTransport``."""
        self.closed = True
        return all(transfer.state is not RUNNING for transfer in self.transfers)
