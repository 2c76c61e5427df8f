"""Turns: processes that start together measure and take the space of a directory one after the other."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_TURN_S = 10.0
_ASK_S = 0.02


@contextmanager
def in_turn(directory: Path, seconds: float = _TURN_S) -> Iterator[bool]:
    """Hold the turn of ``directory``. Another process may have it for long (a file system without fallocate), or hold
    it for nothing: after ``seconds`` the block goes on without it, and gets False.
    """
    fd, taken = -1, False
    with suppress(OSError):  # then the turn cannot be had, and the start must not depend on it
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        end = time.monotonic() + seconds
        while not taken:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = True
            except BlockingIOError:
                if time.monotonic() >= end:
                    break
                time.sleep(_ASK_S)
    try:
        yield taken
    finally:
        if fd >= 0:
            os.close(fd)
