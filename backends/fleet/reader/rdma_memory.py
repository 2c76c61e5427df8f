"""The reader's side of a one-sided engine: its staging slab, and memory that the engine is not done with.

A request's pages get a run of the slab before the peer is asked. The engine fetches into it; the pages are verified
there and copied from there. A run goes back to the slab only when nothing was started for it, or when the engine says
that what was started has ended: until then it is in *quarantine*. After a failure it stays there for a while
longer. When no run is free, pages travel by ZeroMQ.

Threads: the client's, but for the constructor and ``close``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.rdma.base import (
    EngineError,
    Move,
    OneSidedEngine,
    Transfer,
    TransferState,
)
from flexkv_sglang.backends.fleet.rdma.choice import close_engine, open_engine
from flexkv_sglang.backends.fleet.slabs import ServeSlabs
from flexkv_sglang.backends.fleet.wire import addresses
from flexkv_sglang.backends.fleet.wire.answers import OfferedPage
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.types import SECTOR, round_up

SLAB_BYTES = 64 << 20
"""Four peers at a time with two requests each; a page may be as large as this."""

FALLBACK_S = 60.0
"""After an engine's error a peer is read over ZeroMQ for so long."""


@dataclass(frozen=True, slots=True)
class Landed:
    """A page's bytes where the engine has put them; the shape of a ZeroMQ frame."""

    buffer: memoryview


@dataclass(eq=False, slots=True)
class Fetch:
    """One request by the engine: a run of the slab, ``slot_bytes`` for each page of ``page_bytes``.

    ``begun``: before the peer was asked, ``time.monotonic()`` seconds. ``hold``: of the peer, 0: none yet.
    ``pages``: that the engine fetches, ``deadline``: until when; once there is a ``transfer``.
    """

    offset: int
    byte_count: int
    page_bytes: int
    begun: float
    hold: int = 0
    deadline: float = float("inf")
    pages: Sequence[OfferedPage] = ()
    transfer: Transfer | None = None

    @property
    def slot_bytes(self) -> int:
        """From one page to the next."""
        return round_up(self.page_bytes, SECTOR)


class EngineReads:
    """``name``: of the engine, as nodes tell it. Raises ``ConfigError``."""

    def __init__(self, engine: OneSidedEngine, slab_bytes: int = SLAB_BYTES) -> None:
        self.name = engine.name
        self._engine = engine
        self._slab = ServeSlabs(slab_bytes)
        self._quarantine: list[tuple[Fetch, float]] = []  # and when it was seen to have failed
        try:
            engine.register(self._slab.address, self._slab.byte_count)
        except EngineError as exc:
            raise ConfigError(
                f"share.engine: {engine.name!r}: {exc}. Valid without it: 'zmq'"
            ) from exc

    @classmethod
    def of(cls, share: ShareConfig, engine: OneSidedEngine | None) -> EngineReads | None:
        """With ``engine``, or the one that ``share.engine`` names; None: ZeroMQ only."""
        engine = engine or open_engine(share, lambda: addresses.outward_host(share))
        return None if engine is None else cls(engine)

    @property
    def free_bytes(self) -> int:
        """Of the slab."""
        return self._slab.free_bytes

    def take(self, pages: int, page_bytes: int) -> Fetch | None:
        """Memory for a request; None: there is none now."""
        byte_count = pages * round_up(page_bytes, SECTOR)
        offset = self._slab.take(byte_count)
        return None if offset is None else Fetch(offset, byte_count, page_bytes, time.monotonic())

    def start(self, fetch: Fetch, pages: Sequence[OfferedPage], hold_ms: int, blob: bytes) -> None:
        """Let the engine fetch these pages, for half of the hold at most. Raises ``EngineError``."""
        fetch.deadline = fetch.begun + hold_ms / 2000
        if time.monotonic() >= fetch.deadline:
            raise EngineError("the peer took half of its hold to answer")
        first = self._slab.address + fetch.offset
        fetch.pages = pages
        fetch.transfer = self._engine.read(
            blob,
            [
                Move(page.address, first + place * fetch.slot_bytes, fetch.page_bytes)
                for place, page in enumerate(pages)
            ],
        )

    def landed(self, fetch: Fetch, place: int) -> Landed:
        """The bytes of page ``place``, if its transfer is DONE."""
        start = fetch.offset + place * fetch.slot_bytes
        return Landed(self._slab.memory[start : start + fetch.page_bytes])

    def give_back(self, fetch: Fetch) -> None:
        """Nobody looks at this memory any more; it is used again when the engine does not either."""
        self._quarantine.append((fetch, 0.0))
        self.tick(time.monotonic())

    def tick(self, now: float) -> None:
        """Memory whose quarantine is over is free again."""
        kept = []
        for fetch, failed_at in self._quarantine:
            state = TransferState.DONE if fetch.transfer is None else fetch.transfer.poll()
            if state is TransferState.FAILED and not failed_at:
                kept.append((fetch, now))
            elif state is TransferState.DONE or (
                failed_at and now >= failed_at + self._engine.settle_s
            ):
                self._slab.give(fetch.offset, fetch.byte_count)
            else:
                kept.append((fetch, failed_at))
        self._quarantine = kept

    def close(self) -> None:
        """Let go of the memory, or keep it for ever if the engine still runs. Behind the client's thread."""
        close_engine(self._engine, self._slab)
