"""Breaker: one directory's health. Opens on repeated failures, closes after a successful probe.

Reading and writing fail for different reasons, so each has a count of its own. Failed writes (a read-only file
system, a full disk or quota, a journal that takes no more records) stop writes only: what is there stays readable.
Failed reads, and a disk that hangs, stop both: then a dead disk costs each call nothing. A call counts as failed
if pages failed and none succeeded: single bad sectors are no reason to give up a disk. Nygard's circuit breaker (2007).

Threads: any.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from flexkv_sglang.backoff import Backoff

_FAILURES = 3
_PAUSE_S, _PAUSE_MAX_S = 1.0, 30.0


class Breaker:
    """Closed: in use. Open: bypassed, or only read. ``begin_probe`` says when to try again, with doubling pauses."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._backoff = Backoff(_PAUSE_S, _PAUSE_MAX_S, clock=clock)
        self._failed = {False: 0, True: 0}  # reads, writes: calls in a row
        self._probing = False
        self._open = False
        self._readable = True
        self.reason = ""

    @property
    def is_open(self) -> bool:
        """True while the directory must not be written to."""
        return self._open

    @property
    def is_readable(self) -> bool:
        """True while its pages may be read."""
        return self._readable

    def record(
        self, succeeded: int, failed: int, reason: str = "", *, writing: bool = False
    ) -> bool:
        """Outcome of one call: pages that moved, pages that met an error. True if it has just opened."""
        if not succeeded and not failed:
            return False
        with self._lock:
            count = self._failed[writing] = 0 if succeeded else self._failed[writing] + 1
            return count >= _FAILURES and self._trip(reason, readable=writing)

    def trip(self, reason: str, *, readable: bool = False) -> bool:
        """Open at once. True if that changes anything."""
        with self._lock:
            return self._trip(reason, readable=readable)

    def begin_probe(self) -> bool:
        """True if it is open, its pause is over and no other thread probes: the caller must then end the probe."""
        with self._lock:
            if not self._open or self._probing or not self._backoff.due:
                return False
            self._probing = True
            return True

    def end_probe(self, *, healthy: bool, readable: bool = False, reason: str = "") -> None:
        """Close, or wait twice as long for the next probe. ``readable``: only writes fail, for this ``reason``."""
        with self._lock:
            self._probing = False
            if healthy:
                self._open, self._readable, self.reason = False, True, ""
                self._failed = {False: 0, True: 0}
                self._backoff.reset()
            else:
                self._backoff.failed()
                if readable and not self._readable:
                    self._readable, self._failed[False], self.reason = True, 0, reason

    def _trip(self, reason: str, *, readable: bool = False) -> bool:
        if self._open and (readable or not self._readable):
            return False
        if self._open:
            self._backoff.restart()
        else:
            self._backoff.failed()
        self._open, self._readable, self.reason = True, readable, reason
        return True
