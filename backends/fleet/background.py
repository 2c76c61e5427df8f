"""Threads that repeat a step until they are closed, and how long to leave a partner alone that fails.

Nothing is raised out of a thread: a step that fails is logged and counted, and tried again after a pause.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
"""Pauses after failures: doubled each time, and each is shortened by up to a quarter by chance."""

REPEAT_LOG_S = 60.0
"""A failure that goes on is said again after this long."""


class Backoff:
    """How long a partner has failed. One thread calls ``failed`` and ``worked``; any may read.

    One WARNING when it begins, one a minute while it lasts, one INFO when it is over.
    """

    def __init__(self, partner: str, retry_max_s: float = RETRY_MAX_S) -> None:
        self._partner = partner
        self.retry_max_s = retry_max_s
        self._failures = 0
        self._said_at = 0.0
        self.since = time.monotonic()
        self.connected = False
        self.last_error = ""

    def failed(self, error: BaseException) -> float:
        """Note a failure; seconds to wait until the next attempt."""
        now = time.monotonic()
        self.last_error = f"{type(error).__name__}: {error}"[:200]
        if self._failures == 0:
            self.since, self.connected = now, False
        if self._failures == 0 or now - self._said_at >= REPEAT_LOG_S:
            self._said_at = now
            logger.warning(
                "flexkv: %s does not answer, trying again: %s (%d attempts, %.0f s)",
                self._partner,
                self.last_error,
                self._failures + 1,
                now - self.since,
            )
        self._failures += 1
        pause = RETRY_FIRST_S * 2.0 ** min(self._failures - 1, 16)
        return min(self.retry_max_s, pause) * random.uniform(0.75, 1.0)

    def worked(self) -> None:
        """Note a success."""
        if self._failures:
            lasted = time.monotonic() - self.since
            logger.info("flexkv: %s answers again after %.1f s", self._partner, lasted)
        if self._failures or not self.connected:
            self.since, self.connected = time.monotonic(), True
        self._failures = 0

    def status(self) -> dict[str, object]:
        """For ``flexkv nodes``: ``since_s`` seconds in this state, and what went wrong last."""
        return {
            "connected": self.connected,
            "since_s": round(time.monotonic() - self.since, 1),
            "last_error": self.last_error,
        }


class PeriodicThread:
    """A thread named ``flexkv-...`` that repeats ``step``. ``step`` returns the seconds until the next one.

    ``event``: set it to have the next step at once. ``close`` waits for a step under way, up to a limit.
    """

    def __init__(self, name: str, step: Callable[[], float], failed: Callable[[], None]) -> None:
        self.event = threading.Event()
        self._step = step
        self._failed = failed
        self._stop = threading.Event()
        self._said_at = -REPEAT_LOG_S
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pause(self, seconds: float) -> None:
        """Wait inside a step; ends early when the worker is closed."""
        self._stop.wait(seconds)

    @property
    def stopped(self) -> bool:
        """Has ``stop`` been called?"""
        return self._stop.is_set()

    def stop(self) -> None:
        """Ask it to end."""
        self._stop.set()
        self.event.set()

    def join(self, deadline: float) -> bool:
        """Wait until ``deadline`` (``time.monotonic()``) for its end. True: it has ended."""
        if self._thread.ident is None or self._thread is threading.current_thread():
            return True
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.event.wait(self._once())
            self.event.clear()

    def _once(self) -> float:
        try:
            return self._step()
        except Exception:
            self._failed()
            if time.monotonic() - self._said_at >= REPEAT_LOG_S:
                self._said_at = time.monotonic()
                logger.exception("flexkv: %s failed and goes on", self._thread.name)
            return 1.0
