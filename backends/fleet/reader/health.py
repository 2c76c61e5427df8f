"""One peer's breaker, pauses and measured rates, as seen by one process. No network here.

The breaker opens when a peer is silent, gone or breaks the protocol; while it is open, reads cost nothing. A greeting
by the client's thread closes it, never a user's read. MISS never opens it, BUSY makes a short pause. A new epoch
or address resets everything.

Threads: any.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable

from flexkv_sglang.backends.fleet.vocabulary import NodeId
from flexkv_sglang.backoff import Backoff

logger = logging.getLogger(__name__)

PAUSE_S, PAUSE_MAX_S, JITTER = 2.0, 30.0, 0.2
REFUSED_S = 60.0
CORRUPT_MAX, CORRUPT_WITHIN_S, CORRUPT_S = 3, 60.0, 60.0
BUSY_S = (0.05, 0.2)
RATE_KEPT_S = 30.0
"""Measured rates are dropped after this long without a read: else a peer that was slow once would never be asked."""

_WEIGHT = 0.3
_PROBED_AFTER_ASKED_S = 120.0


class PeerHealth:
    """A breaker. Closed: reads are allowed. Open: not until a greeting succeeds."""

    def __init__(
        self, node_id: NodeId, epoch: int, address: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.node_id = node_id
        self._clock = clock
        self._lock = threading.Lock()
        self._reset(epoch, address)

    def _reset(self, epoch: int, address: str) -> None:
        self.epoch, self.address = epoch, address
        self._open = False
        jitter = 1 - JITTER, 1 + JITTER
        self._backoff = Backoff(PAUSE_S, PAUSE_MAX_S, jitter=jitter, clock=self._clock)
        self.reason = ""
        self._busy_until = 0.0
        self._corrupt: deque[float] = deque(maxlen=CORRUPT_MAX)
        self._rate = self._first_byte = self._measured_at = 0.0
        self._asked_at = self._clock()

    def set_identity(self, epoch: int, address: str) -> bool:
        """Set the current epoch and address. True: they have changed, and the state was reset."""
        with self._lock:
            if (epoch, address) == (self.epoch, self.address):
                return False
            self._reset(epoch, address)
            return True

    @property
    def is_open(self) -> bool:
        """True while the breaker is open."""
        return self._open

    def usable(self) -> bool:
        """True if it may be read from now."""
        with self._lock:
            now = self._asked_at = self._clock()
            return not self._open and now >= self._busy_until

    def failed(self, reason: str, pause_s: float | None = None) -> None:
        """Open, for twice the last pause or for ``pause_s``."""
        with self._lock:
            first = not self._open
            self._backoff.failed(pause_s)
            self._open, self.reason = True, reason
        if first:
            logger.warning("node %s at %s is not read from: %s", self.node_id, self.address, reason)

    def recovered(self) -> None:
        """A greeting succeeded: close."""
        with self._lock:
            was_open, self._open = self._open, False
            self.reason = ""
        if was_open:
            logger.info("node %s at %s is read from again", self.node_id, self.address)

    def delivered(self) -> None:
        """The peer sent pages: the next pause is the shortest again."""
        with self._lock:
            self._backoff.reset()

    def busy(self) -> None:
        """The peer is overloaded: pause for a moment."""
        with self._lock:
            self._busy_until = self._clock() + random.uniform(*BUSY_S)

    def corrupt(self) -> bool:
        """Count a page with a wrong checksum. True: there were too many, and the breaker is open now."""
        now = self._clock()
        with self._lock:
            self._corrupt.append(now)
            several = (
                len(self._corrupt) == CORRUPT_MAX and now - self._corrupt[0] <= CORRUPT_WITHIN_S
            )
        if several:
            self.failed(f"{CORRUPT_MAX} corrupt pages within {CORRUPT_WITHIN_S:.0f} s", CORRUPT_S)
        return several

    def probe_due(self) -> bool:
        """True when a greeting is due. Peers that no read has asked for lately are not greeted."""
        wanted = self._clock() - self._asked_at < _PROBED_AFTER_ASKED_S
        return self._open and self._backoff.due and wanted

    def measured(self, byte_count: int, seconds: float, first_byte_s: float) -> None:
        """Add one read: its bytes, the seconds they took after the first ones, and the seconds to the first."""
        now = self._clock()
        rate = byte_count / max(seconds, 1e-6)
        with self._lock:
            fresh = now - self._measured_at > RATE_KEPT_S
            self._measured_at = now
            if fresh:
                self._rate, self._first_byte = rate, first_byte_s
            else:
                self._rate += _WEIGHT * (rate - self._rate)
                self._first_byte += _WEIGHT * (first_byte_s - self._first_byte)

    def seconds_for(self, byte_count: int) -> float:
        """Seconds for a read of ``byte_count`` bytes; 0.0: unknown."""
        with self._lock:
            if not self._rate or self._clock() - self._measured_at > RATE_KEPT_S:
                return 0.0
            return self._first_byte + byte_count / self._rate

    def bytes_within(self, seconds: float) -> float:
        """Bytes that arrive within that time; infinite: unknown."""
        with self._lock:
            if not self._rate or self._clock() - self._measured_at > RATE_KEPT_S:
                return float("inf")
            return (seconds - self._first_byte) * self._rate
