"""Opener: runs one step that may hang on a disk in a thread of its own, so that its callers wait with a bound."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Opener:
    """Runs ``step`` in one thread at a time. The thread goes on when a caller stops waiting. Any thread."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step
        self._thread = threading.Thread()
        self._lock = threading.Lock()  # guards _thread

    def run(self, seconds: float) -> None:
        """Start the step unless it runs, and wait at most ``seconds`` for its end."""
        with self._lock:
            if not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="flexkv-opener", daemon=True)
                self._thread.start()
        self.join(seconds)

    def join(self, seconds: float) -> None:
        """Wait at most ``seconds`` for the end of a step that runs."""
        self._thread.join(seconds)

    def _run(self) -> None:
        try:
            self._step()
        except Exception as exc:  # the end of a thread: calls go on to miss
            logger.error("flexkv: files could not be opened", exc_info=exc)
