"""CallGate: many calls share it, or one thread has it exclusively. Every wait has a bound.

A thread that closes files must be alone: the kernel gives the number of a closed file to the next file that is
opened, and a call that still has the number would read or write there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from flexkv_sglang.errors import TierUnavailableError


class CallGate:
    """Not re-entrant: a thread that has it must not ask again. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the two below; held for an addition
        self._inside = 0
        self._taken = False

    @contextmanager
    def shared(self, seconds: float) -> Iterator[None]:
        """The time of one call. Raises ``TierUnavailableError`` if another thread is alone for ``seconds``."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._taken, seconds):
                raise TierUnavailableError("files are being exchanged")
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if self._taken:
                    self._changed.notify_all()

    @contextmanager
    def exclusive(self, seconds: float) -> Iterator[bool]:
        """Keep new calls out and wait for those inside. Yields False if that takes longer; then new calls may enter."""
        end = time.monotonic() + seconds
        with self._changed:
            alone = self._changed.wait_for(lambda: not self._taken, seconds)
            if alone:
                self._taken = True
                alone = self._changed.wait_for(lambda: not self._inside, end - time.monotonic())
                if not alone:
                    self._reopen()
        try:
            yield alone
        finally:
            if alone:
                with self._changed:
                    self._reopen()

    def _reopen(self) -> None:
        self._taken = False
        self._changed.notify_all()
