"""The reader's side of an RDMA transport: its staging slab, and the quarantine of memory it may still write to.

A request's pages get a run of the slab before the peer is asked. The transport fetches into the run; pages are verified
there and copied from there. The run is free again when no transfer was started for it, or when its transfer is over;
until then it is in *quarantine*. After a failure it stays there for ``settle_s`` more. When no run is free, pages come
over ZeroMQ.

Threads: the client's; the constructor and ``close`` any.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.slabs import ServeSlabs
from flexkv_sglang.backends.fleet.transport import (
    Move,
    RdmaError,
    RdmaTransport,
    Transfer,
    TransferState,
    close_transport,
    open_transport,
)
from flexkv_sglang.backends.fleet.wire import addresses
from flexkv_sglang.backends.fleet.wire.answers import OfferedPage
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.types import SECTOR, round_up

SLAB_BYTES = 64 << 20
"""Room for four peers with two requests each. A larger page comes over ZeroMQ."""

FALLBACK_S = 60.0
"""After an error of the transport a peer is read over ZeroMQ for this long."""


@dataclass(eq=False, slots=True)
class Fetch:
    """One OFFER: a run of the slab, ``slot_bytes`` for each page of ``page_bytes``.

    ``begun``: before the peer was asked, ``time.monotonic()`` seconds. ``lease``: of the peer, 0: none yet.
    ``pages``: those that ``transfer`` fetches, until ``deadline``.
    """

    offset: int
    byte_count: int
    page_bytes: int
    begun: float
    lease: int = 0
    deadline: float = float("inf")
    pages: Sequence[OfferedPage] = ()
    transfer: Transfer | None = None

    @property
    def slot_bytes(self) -> int:
        """Bytes from one page to the next."""
        return round_up(self.page_bytes, SECTOR)


class RdmaMemory:
    """``name``: of the transport, as in ``NodeInfo``. Raises ``ConfigError``."""

    def __init__(self, transport: RdmaTransport, slab_bytes: int = SLAB_BYTES) -> None:
        self.name = transport.name
        self._transport = transport
        self._slab = ServeSlabs(slab_bytes)
        self._quarantine: list[tuple[Fetch, float]] = []  # and the time of its failure
        try:
            transport.register(self._slab.address, self._slab.byte_count)
        except RdmaError as exc:
            raise ConfigError(
                f"share.engine: {transport.name!r}: {exc}. Valid without it: 'zmq'"
            ) from exc

    @classmethod
    def of(cls, share: ShareConfig, transport: RdmaTransport | None) -> RdmaMemory | None:
        """Memory of ``transport``, or of the one that ``share.engine`` names. None: ZeroMQ only."""
        transport = transport or open_transport(share, lambda: addresses.outward_host(share))
        return None if transport is None else cls(transport)

    @property
    def free_bytes(self) -> int:
        """Of the slab."""
        return self._slab.free_bytes

    def take(self, pages: int, page_bytes: int) -> Fetch | None:
        """Memory for a request; None: no run is free."""
        byte_count = pages * round_up(page_bytes, SECTOR)
        offset = self._slab.take(byte_count)
        return None if offset is None else Fetch(offset, byte_count, page_bytes, time.monotonic())

    def start(self, fetch: Fetch, pages: Sequence[OfferedPage], lease_ms: int, blob: bytes) -> None:
        """Start to fetch these pages, for half of the lease at most. Raises ``RdmaError``."""
        fetch.deadline = fetch.begun + lease_ms / 2000
        if time.monotonic() >= fetch.deadline:
            raise RdmaError("the peer took half of its lease to answer")
        first = self._slab.address + fetch.offset
        fetch.pages = pages
        fetch.transfer = self._transport.read(
            blob,
            [
                Move(page.address, first + place * fetch.slot_bytes, fetch.page_bytes)
                for place, page in enumerate(pages)
            ],
        )

    def fetched(self, fetch: Fetch, place: int) -> memoryview:
        """The bytes of page ``place``. Its transfer must be DONE."""
        start = fetch.offset + place * fetch.slot_bytes
        return self._slab.memory[start : start + fetch.page_bytes]

    def give_back(self, fetch: Fetch) -> None:
        """The caller no longer uses this memory. It is reused when the transport does not use it either."""
        self._quarantine.append((fetch, 0.0))
        self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """Free the memory whose quarantine is over."""
        kept = []
        for fetch, failed_at in self._quarantine:
            state = TransferState.DONE if fetch.transfer is None else fetch.transfer.poll()
            if state is TransferState.FAILED and not failed_at:
                kept.append((fetch, now))
            elif state is TransferState.DONE or (
                failed_at and now >= failed_at + self._transport.settle_s
            ):
                self._slab.give(fetch.offset, fetch.byte_count)
            else:
                kept.append((fetch, failed_at))
        self._quarantine = kept

    def close(self) -> None:
        """Release the memory, or keep it for ever if the transport still runs. Call it when the thread has ended."""
        close_transport(self._transport, self._slab)
