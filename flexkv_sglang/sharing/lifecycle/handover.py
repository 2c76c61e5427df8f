"""Handover: an agent that succeeds another one takes its place without a gap. Files and waiting, no threads.

The successor opens everything and takes ``agent.next``; its card there names the agent that it ``succeeds``, and says
when it is ``ready``. The living agent sees that within a second, stops its heartbeats without leaving the list of
members, ends the reads under way (10 s at most) and releases ``agent.lock``, at an own port the other way round.
If the successor ends first, nothing happens: only a held ``agent.next`` counts.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

from flexkv_sglang.backends.file_lock import FileLock
from flexkv_sglang.sharing.run_dir import RunDir

NEXT = "agent.next"
TAKE_S, DRAIN_S = 15.0, 10.0
"""A successor waits so long for the lock; the former agent goes on serving for so long at most."""

_POLL_S, _IDLE_S = 0.02, 1.0


class AgentLock:
    """The lock of this agent with its card, or the one of a successor until the place is free. Threads: one.

    ``take`` at construction: None in ``lock`` if another agent lives and is not to be succeeded. Raises ``OSError``.
    """

    def __init__(self, run_dir: RunDir, card: Mapping[str, Any], succeed: str) -> None:
        self._run_dir = run_dir
        self._card = {**card, **({"succeeds": succeed} if succeed else {})}
        self._next: FileLock | None = None
        self.lock = run_dir.take_agent_lock(self._card)
        living = run_dir.agent() if self.lock is None and succeed else None
        if living and living.get("instance") == succeed:
            self._next = run_dir.take_agent_lock(self._card, NEXT)

    @property
    def waits(self) -> bool:
        """Is this a successor whose place is not free yet?"""
        return self._next is not None

    @property
    def in_place(self) -> bool:
        """Can rank processes still find this agent?"""
        return self.lock is not None and self.lock.in_place

    def write(self, **fields: object) -> None:
        """Change the card. Raises ``OSError``."""
        if fields.items() <= self._card.items():
            return
        self._card |= fields
        lock = self.lock or self._next
        if lock is not None and lock.held:
            lock.write(json.dumps(self._card))

    def take_over(self, stop: threading.Event) -> bool:
        """Ask the living agent for its place and take it. False: it was not released in 15 s. Raises ``OSError``."""
        assert self._next is not None
        self._next.write(json.dumps({**self._card, "ready": True}))
        until = time.monotonic() + TAKE_S
        while self.lock is None and time.monotonic() < until and not stop.wait(_POLL_S):
            self.lock = self._run_dir.take_agent_lock(self._card)
        self._next.close()
        self._next = None
        return self.lock is not None

    def is_succeeded(self) -> bool:
        """Is a successor of this agent ready?"""
        card = self._run_dir.agent(NEXT)
        return bool(
            card and card.get("ready") and card.get("succeeds") == self._card.get("instance")
        )

    def close(self) -> None:
        """Release. Idempotent."""
        for lock in (self.lock, self._next):
            if lock is not None:
                lock.close()
