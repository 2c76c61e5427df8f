"""A one-sided engine: fetches bytes out of another process's registered memory, without that process's doing.

Both sides register *staging slabs* of their own and nothing else, never SGLang's host pool: an engine may write
late, and then it writes where nobody looks. It says who may read what only by the blob; its traffic is neither
authenticated nor encrypted, so it is for trusted fabrics (decision 018).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from flexkv_sglang.errors import PeerError


class EngineError(PeerError):
    """The engine cannot do that; the message says why in its words."""


class TransferState(Enum):
    """RUNNING: the engine may still write. DONE, FAILED: it does not, nor ever will for this transfer."""

    RUNNING = 0
    DONE = 1
    FAILED = 2


class Move(NamedTuple):
    """``byte_count`` bytes at ``source`` there go to ``target`` here. Addresses in the two registered slabs."""

    source: int
    target: int
    byte_count: int


class Transfer(Protocol):
    """Moves under way, as one."""

    def poll(self) -> TransferState:
        """What has become of it; DONE and FAILED stay. Does not block or raise."""
        ...


class OneSidedEngine(Protocol):
    """Made by ``engines.open_engine``. Threads: one at a time.

    ``settle_s``: memory of a FAILED transfer rests for so long, should the engine not keep its word that it has ended.
    """

    name: str
    settle_s: float

    def register(self, address: int, byte_count: int) -> None:
        """This memory is to be read from, or into; once. It must stay until ``close``. Raises ``EngineError``."""
        ...

    def blob(self) -> bytes:
        """What the other side needs to read from the registered memory. Raises ``EngineError``."""
        ...

    def read(self, blob: bytes, moves: Sequence[Move]) -> Transfer:
        """Start to read from the memory that ``blob`` is of. Does not wait. Raises ``EngineError``."""
        ...

    def close(self) -> bool:
        """Let go of all memory. False: something still runs, so the memory must never be freed. Idempotent."""
        ...
