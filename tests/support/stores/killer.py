"""Hooks for failpoints: die by SIGKILL at the n-th pass of a point, or wait there for an event."""

from __future__ import annotations

import os
import signal
import threading

from flexkv_sglang.backends.failpoints import Failpoint


class KillAt:
    """SIGKILL this process at pass ``passes`` of ``point``; first write ``cut`` of the point's data."""

    def __init__(self, point: Failpoint, passes: int = 1, cut: float | None = None) -> None:
        self._point = point
        self._left = passes
        self._cut = cut
        self._lock = threading.Lock()

    def __call__(self, point: Failpoint, fd: int, data: bytes) -> None:
        if point is not self._point:
            return
        with self._lock:
            self._left -= 1
            if self._left:
                return
            if self._cut is not None and fd >= 0 and len(data) > 1:
                os.write(fd, data[: min(len(data) - 1, max(1, int(len(data) * self._cut)))])
            os.kill(os.getpid(), signal.SIGKILL)


class PauseAt:
    """The first thread that passes ``point`` stops there: ``arrived`` is set, ``go_on`` lets it continue."""

    def __init__(self, point: Failpoint, seconds: float = 20.0) -> None:
        self._point = point
        self._seconds = seconds
        self._taken = threading.Lock()
        self.arrived, self.go_on = threading.Event(), threading.Event()

    def __call__(self, point: Failpoint, fd: int, data: bytes) -> None:
        if point is self._point and self._taken.acquire(blocking=False):
            self.arrived.set()
            self.go_on.wait(self._seconds)
