"""Backoff: how long something that fails is left alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable


class Backoff:
    """Pauses of ``first_s``, each ``factor`` times the one before, ``max_s`` at most.

    ``jitter``: each pause is multiplied by a random number between these two. ``clock``: seconds that never go back.
    Threads: one at a time; the user locks.
    """

    def __init__(
        self,
        first_s: float,
        max_s: float,
        *,
        factor: float = 2.0,
        jitter: tuple[float, float] = (1.0, 1.0),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first_s, self._max_s, self._factor = first_s, max_s, factor
        self._jitter, self._clock = jitter, clock
        self._pause_s = self._next_s = min(first_s, max_s)
        self._retry_at = float("-inf")

    @property
    def due(self) -> bool:
        """Is the pause over? True before the first failure."""
        return self._clock() >= self._retry_at

    def failed(self, pause_s: float | None = None) -> float:
        """Note a failure. Returns the seconds until the next attempt; ``pause_s`` in the place of this pause."""
        pause = (self._next_s if pause_s is None else pause_s) * random.uniform(*self._jitter)
        self._next_s = min(self._next_s * self._factor, self._max_s)
        self._pause_s = pause
        self._retry_at = self._clock() + pause
        return pause

    def restart(self) -> None:
        """Begin the last pause again, at the same length."""
        self._retry_at = self._clock() + self._pause_s

    def reset(self) -> None:
        """It works: the next pause is ``first_s`` again. A pause that runs goes on."""
        self._next_s = min(self._first_s, self._max_s)
