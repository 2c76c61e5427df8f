"""PartnerState: whether Redis or a peer answers, for its log lines, its pauses and ``flexkv nodes``."""

from __future__ import annotations

import logging
import time

from flexkv_sglang.backoff import Backoff
from flexkv_sglang.log_limit import RateLimitedLog

logger = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_MAX_S = 0.2, 5.0
"""Pauses after failures: doubled each time, and each is shortened by up to a quarter by chance."""


class PartnerState:
    """How long a partner has failed. One thread calls ``failed`` and ``worked``; any may read.

    One WARNING when it begins, one a minute while it lasts, one INFO when it is over.
    """

    def __init__(self, partner: str, retry_max_s: float = RETRY_MAX_S) -> None:
        self._partner = partner
        self.retry_max_s = retry_max_s
        self._backoff = Backoff(RETRY_FIRST_S, retry_max_s, jitter=(0.75, 1.0))
        self._log = RateLimitedLog(logger)
        self._failures = 0
        self.since = time.monotonic()
        self.connected = False
        self.last_error = ""

    def failed(self, error: BaseException) -> float:
        """Note a failure; seconds to wait until the next attempt."""
        now = time.monotonic()
        self.last_error = f"{type(error).__name__}: {error}"[:200]
        if self._failures == 0:
            self.since, self.connected = now, False
        self._failures += 1
        self._log.log(
            "",
            logging.WARNING,
            "flexkv: %s does not answer, trying again: %s (%d attempts, %.0f s)",
            self._partner,
            self.last_error,
            self._failures,
            now - self.since,
        )
        return self._backoff.failed()

    def worked(self) -> None:
        """Note a success."""
        if self._failures:
            lasted = time.monotonic() - self.since
            logger.info("flexkv: %s answers again after %.1f s", self._partner, lasted)
            self._log.reset("")
            self._backoff.reset()
        if self._failures or not self.connected:
            self.since, self.connected = time.monotonic(), True
        self._failures = 0

    def status(self) -> dict[str, object]:
        """For ``flexkv nodes``: ``since_s`` seconds in this state, and the last error."""
        return {
            "connected": self.connected,
            "since_s": round(time.monotonic() - self.since, 1),
            "last_error": self.last_error,
        }
