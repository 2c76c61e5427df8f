"""RDMA transports: the interface, and how the one that ``share.engine`` names is opened.

A transport fetches bytes out of another process's registered memory without its CPU. Both sides register *staging
slabs* of their own and nothing else, never SGLang's host pool: a transport may write late, and then no
one reads that memory. It neither authenticates nor encrypts, so it is for trusted fabrics (decision 018).
The implementations (``rdma/``) are loaded by ``open_transport`` and imported by no other module.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import PeerError

logger = logging.getLogger(__name__)

_RDMA = "flexkv_sglang.backends.fleet.rdma"
_kept: list[object] = []
"""Transports that still run, and their memory: to free it would crash the process."""


class RdmaError(PeerError):
    """The transport cannot do that. The message gives its reason."""


class TransferState(Enum):
    """RUNNING: the transport may still write. DONE, FAILED: it never will again for this transfer."""

    RUNNING = 0
    DONE = 1
    FAILED = 2


class Move(NamedTuple):
    """``byte_count`` bytes from remote address ``source`` to local address ``target``, both in registered slabs."""

    source: int
    target: int
    byte_count: int


class Transfer(Protocol):
    """Several moves that run as one."""

    def poll(self) -> TransferState:
        """Its state; DONE and FAILED are final. Does not block or raise."""
        ...


class RdmaTransport(Protocol):
    """Threads: one at a time. ``settle_s``: memory of a FAILED transfer is not reused for that long.

    The pause covers a transport that writes although it has reported the end.
    """

    name: str
    settle_s: float

    def register(self, address: int, byte_count: int) -> None:
        """Register the memory to read from, or into; once. It must stay until ``close``. Raises ``RdmaError``."""
        ...

    def blob(self) -> bytes:
        """Describe the registered memory for the other side's ``read``. Raises ``RdmaError``."""
        ...

    def read(self, blob: bytes, moves: Sequence[Move]) -> Transfer:
        """Start to read from the memory that ``blob`` describes. Does not wait. Raises ``RdmaError``."""
        ...

    def close(self) -> bool:
        """Release all memory. False: a transfer still runs, so never free the memory. Idempotent."""
        ...


def open_transport(share: ShareConfig, host: Callable[[], str]) -> RdmaTransport | None:
    """None for ``zmq``. ``host``: name or address of this machine for others. Raises ``ConfigError``."""
    if share.engine == "zmq":
        return None
    transport: RdmaTransport = importlib.import_module(f"{_RDMA}.{share.engine}").open_transport(
        host
    )
    logger.warning(
        "flexkv: share.engine %r listens on all interfaces, and neither authenticates nor encrypts: any machine that"
        " reaches its ports may read and write the staging memory of this process. For trusted fabrics only",
        share.engine,
    )  # fmt: skip
    return transport


def close_transport(transport: RdmaTransport, memory: object) -> None:
    """Close it. ``memory`` holds its registered bytes, and is kept for ever if the transport still runs."""
    if not transport.close():
        logger.warning("flexkv: share.engine %r still runs: its memory is kept", transport.name)
        _kept.append((transport, memory))
