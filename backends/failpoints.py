"""Failpoints: named places where a crash test can stop this process. They do nothing unless a test set a hook.

Armed only from inside the process (``set_hook``): no environment variable, no setting, no file. Without a
hook a pass costs less than 0.1 us. What a hook does (kill, wait at a barrier) is the test's business:
``tests/support/stores/killer.py``. Each point names the step that has *just* been done unless it says "before".

Threads: any may call ``reach``. Call ``set_hook`` before the threads start that must see the hook.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum


class Failpoint(IntEnum):
    """Numbers are stable: a campaign's result names them."""

    # put: tombstones of the victims, data, commit records, index
    EVICT_BEFORE = 10
    EVICT_RECORDED = 11
    PUT_MOVED = 12
    PUT_RECORDED = 13
    CLEAR_BEFORE = 15
    CLEAR_RECORDED = 16
    # journal: one append; a hook may write a part of ``data`` to ``fd`` first (a torn append)
    APPEND_BEFORE = 20
    APPEND_DONE = 21
    # a whole file under its temporary name; a hook may write a part of ``data`` to ``fd`` first
    PUBLISH_BEFORE = 30
    PUBLISH_WRITTEN = 31
    PUBLISH_RENAMED = 32
    # a new generation
    ROTATE_BEFORE = 40
    ROTATE_SNAPSHOT = 41
    ROTATE_JOURNAL = 42
    ROTATE_SEALED = 43
    ROTATE_UNLINK = 44
    ROTATE_DONE = 45
    # adoption of a dead owner
    ADOPT_LOCKED = 50
    ADOPT_RECOVERED = 51
    ADOPT_UNLINK = 52
    ADOPT_ROTATED = 53
    ADOPT_CUT = 54
    # a new owner, and the removal of one that died while it was made
    CREATE_LOCKED = 60
    CREATE_SLOTS = 61
    CREATE_JOURNAL = 62
    REMOVE_FILE = 65
    REMOVE_LOCK = 66
    # close
    CLOSE_SYNCED = 70
    CLOSE_RECORDED = 71
    # a file of the membership replica: whole under its temporary name, in place, made known
    REPLICA_WRITTEN = 80
    REPLICA_RENAMED = 81
    REPLICA_KNOWN = 82


Hook = Callable[[Failpoint, int, bytes | memoryview], None]
"""(point, descriptor or -1, what is about to be written to it)."""

_hook: Hook | None = None


def set_hook(hook: Hook | None) -> None:
    """Call ``hook`` at every pass of every point from now on; None: nothing happens any more. Tests only."""
    global _hook
    _hook = hook


def reach(point: Failpoint, fd: int = -1, data: bytes | memoryview = b"") -> None:
    """This process is at ``point``."""
    if _hook is not None:
        _hook(point, fd, data)
