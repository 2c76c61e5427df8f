"""OldAgent: ends an agent of version 0.1, which knows no successor. Threads: one."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

logger = logging.getLogger(__name__)

KILL_AFTER_S = 10.0


class OldAgent:
    """Asks the agent to end with SIGTERM, and with SIGKILL 10 s later; called again until it has ended.

    ``holds``: does a process of this id still hold the agent's lock?
    """

    def __init__(self, holds: Callable[[int], bool]) -> None:
        self._holds = holds
        self._asked: tuple[int, float] = 0, 0.0  # (pid, when)

    def end(self, pid: int, now: float | None = None) -> str:
        """Signal the process; "" if that was done, else why it was not. Never raises.

        The process is held by a descriptor before it is looked at, so the one that was looked at gets the signal.
        """
        now = time.monotonic() if now is None else now
        try:
            fd = os.pidfd_open(pid)
        except OSError as exc:
            return f"process {pid} cannot be reached: {exc.strerror or exc}"
        try:
            refused = self._refused(pid)
            if refused:
                return refused
            if self._asked[0] != pid:
                self._asked = pid, now
                signal.pidfd_send_signal(fd, signal.SIGTERM)
                logger.warning("flexkv: the agent of release 0.1 (pid %d) is asked to end", pid)
            elif now - self._asked[1] >= KILL_AFTER_S:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
                logger.warning("flexkv: the agent of release 0.1 (pid %d) is killed", pid)
        except OSError as exc:
            return f"process {pid} cannot be signalled: {exc.strerror or exc}"
        finally:
            os.close(fd)
        return ""

    def _refused(self, pid: int) -> str:
        """Why this process is not to be signalled. Raises ``OSError``."""
        proc = Path("/proc") / str(pid)
        if proc.stat().st_uid != os.getuid():
            return f"process {pid} belongs to another user"
        words = (proc / "cmdline").read_bytes().split(b"\0")
        if b"agent" not in words:
            return f"process {pid} is no agent, or of another container"
        if b"--for-ranks" not in words:
            return f"process {pid} was started by hand"
        return "" if self._holds(pid) else f"process {pid} holds the lock no more"
