"""RateLimitedLog: trouble that goes on is logged once per interval, not once per occurrence."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable

REPEAT_LOG_S = 60.0
"""Seconds between two lines of one kind."""

_KINDS_MAX = 4096


class RateLimitedLog:
    """Logs the first line of a kind at once, then at most one per interval; a later line gives the number left out.

    An interval of ``math.inf``: each kind is logged once.
    ``clock``: seconds that never go back. Threads: any.
    """

    def __init__(
        self,
        logger: logging.Logger,
        interval_s: float = REPEAT_LOG_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._interval_s = interval_s
        self._clock = clock
        self._lock = threading.Lock()
        self._lines: dict[
            Hashable, tuple[float, int]
        ] = {}  # kind -> logged at, left out since; guarded by _lock

    def log(
        self,
        kind: Hashable,
        level: int,
        text: str,
        *args: object,
        exc_info: bool | BaseException = False,
    ) -> None:
        """Log ``text % args`` unless a line of this kind was logged within the interval."""
        now = self._clock()
        with self._lock:
            logged_at, left_out = self._lines.get(kind, (None, 0))
            if logged_at is not None and now - logged_at < self._interval_s:
                self._lines[kind] = logged_at, left_out + 1
                return
            if logged_at is None and len(self._lines) >= _KINDS_MAX:
                del self._lines[next(iter(self._lines))]
            self._lines[kind] = now, 0
        if left_out:
            text, args = f"{text} (%d more lines like this were left out)", (*args, left_out)
        self._logger.log(level, text, *args, exc_info=exc_info, stacklevel=2)

    def reset(self, kind: Hashable) -> None:
        """Log the next line of this kind at once: the trouble had ended."""
        with self._lock:
            self._lines.pop(kind, None)
