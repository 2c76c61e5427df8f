"""CallWatch: which transfers are under way, and which directories hang in them. Memory only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from flexkv_sglang.backends.io.transfer import PageTransfer
from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.threads import OVERDUE_S


class CallWatch:
    """Running transfers, with their deadlines and the directory of each page. Threads: any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for dict work
        self._calls: dict[int, tuple[PageTransfer, Sequence[Breaker]]] = {}
        self._next = 0

    @contextmanager
    def call(self, transfer: PageTransfer, breakers: Sequence[Breaker]) -> Iterator[None]:
        """Around a transfer. ``breakers``: per page."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._calls[number] = transfer, breakers
        try:
            yield
        finally:
            if transfer.writing and transfer.flying.any():
                transfer.ended.add_done_callback(lambda _: self._end(number))
            else:
                self._end(number)

    def _end(self, number: int) -> None:
        with self._lock:
            del self._calls[number]

    def busy(self) -> set[Breaker]:
        """Directories of transfers that have not ended."""
        return self._hung(float("inf"))

    def overdue(self) -> set[Breaker]:
        """Directories of pages that should have moved ``OVERDUE_S`` ago."""
        return self._hung(time.monotonic() - OVERDUE_S)

    def _hung(self, limit: float) -> set[Breaker]:
        with self._lock:
            calls = [call for call in self._calls.values() if call[0].deadline < limit]
        return {breaker for transfer, breakers in calls for breaker in hung(transfer, breakers)}


def hung(transfer: PageTransfer, breakers: Sequence[Breaker]) -> set[Breaker]:
    """Directories of the pages whose operations are under way; the only one there is, if none is."""
    used = set(breakers)
    if len(used) == 1:
        return used
    return {breakers[row] for row in np.flatnonzero(transfer.flying).tolist()}
