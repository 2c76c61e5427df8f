"""The state of a model's stores: which events change it, and how. Pure, but for its lock."""

from __future__ import annotations

import threading
from enum import Enum, auto


class State(Enum):
    """State of the stores of one attach; see ``StoresState``."""

    CLOSED = auto()
    PENDING = auto()
    OPEN = auto()
    SUSPENDED = auto()


class Event(Enum):
    """An event for the stores of one attach; see ``StoresState``."""

    ADD = auto()
    CLEAR_LATER = auto()
    GROW = auto()
    EXCHANGE = auto()
    DELETE_FAILED = auto()
    SUSPEND = auto()
    RESUME = auto()
    CLOSE = auto()


class StoresState:
    """The state of one ``PoolStores``. Any thread; events take effect while files are being opened, too.

    CLOSED      no KV pool is known yet, or the backend is detached: no file is opened
    PENDING     a pool waits for its files, or a clear waits for files: the next call opens them
    OPEN        every pool that can be stored has its files, or is getting them now
    SUSPENDED   the weights change, or KV cache of older weights may be left: every page misses

    ============== ========== ========== ========== ========== =============================================
    event          CLOSED     PENDING    OPEN       SUSPENDED  when
    ============== ========== ========== ========== ========== =============================================
    ADD            CLOSED     PENDING    PENDING    SUSPENDED  a pool was registered
    CLEAR_LATER    CLOSED     PENDING    PENDING    SUSPENDED  a clear found files being exchanged
    GROW           CLOSED     PENDING    PENDING    SUSPENDED  a tier that started short would get more now
    EXCHANGE       CLOSED     OPEN       OPEN       SUSPENDED  pending files are opened now
    DELETE_FAILED  CLOSED     SUSPENDED  SUSPENDED  SUSPENDED  files of older weights cannot be deleted
    SUSPEND        CLOSED     SUSPENDED  SUSPENDED  SUSPENDED  a weight update begins
    RESUME         CLOSED     PENDING    OPEN       PENDING    no KV cache of older weights is left
    CLOSE          CLOSED     CLOSED     CLOSED     CLOSED     detach
    ============== ========== ========== ========== ========== =============================================

    ``start`` leaves CLOSED: a KV pool was registered. It leads to SUSPENDED while weights change, to PENDING if
    further pools are expected, else to OPEN.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _now; held for one assignment
        self._now = State.CLOSED

    @property
    def now(self) -> State:
        """The state at this moment."""
        return self._now

    def start(self, state: State) -> None:
        """A KV pool was registered; the stores of the attach before it are closed."""
        with self._lock:
            self._now = state

    def apply(self, event: Event) -> State:
        """Let ``event`` happen. Returns the state after it."""
        with self._lock:
            self._now = _NEXT[event].get(self._now, self._now)
            return self._now


_NEXT = {
    Event.ADD: {State.OPEN: State.PENDING},
    Event.CLEAR_LATER: {State.OPEN: State.PENDING},
    Event.GROW: {State.OPEN: State.PENDING},
    Event.EXCHANGE: {State.PENDING: State.OPEN},
    Event.DELETE_FAILED: {State.PENDING: State.SUSPENDED, State.OPEN: State.SUSPENDED},
    Event.SUSPEND: {State.PENDING: State.SUSPENDED, State.OPEN: State.SUSPENDED},
    Event.RESUME: {State.SUSPENDED: State.PENDING},
    Event.CLOSE: dict.fromkeys(State, State.CLOSED),
}
"""Per event, the state after it. States that are not listed stay."""
