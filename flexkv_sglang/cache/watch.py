"""CallWatch: which transfers are running, so that one that hangs is noticed by somebody else.

Threads: any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flexkv_sglang.backends.slots.breaker import Breaker

_OVERDUE_S = 1.0  # past its deadline a call only drains what is in flight: tens of milliseconds


class CallWatch:
    """Running calls with their deadlines and the directories they move pages in."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # held for dict work
        self._calls: dict[int, tuple[float, frozenset[Breaker]]] = {}
        self._next = 0

    @contextmanager
    def call(self, deadline: float, breakers: frozenset[Breaker]) -> Iterator[None]:
        """Around a transfer. ``deadline``: ``time.monotonic()`` seconds."""
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._calls[number] = deadline, breakers
        try:
            yield
        finally:
            with self._lock:
                del self._calls[number]

    def overdue(self) -> set[Breaker]:
        """Directories of calls that should have returned a second ago."""
        limit = time.monotonic() - _OVERDUE_S
        with self._lock:
            return {b for deadline, used in self._calls.values() if deadline < limit for b in used}
