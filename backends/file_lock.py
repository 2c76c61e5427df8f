"""FileLock: a ``flock`` held for the life of its owner. It ends with the process, however that ends."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path
from weakref import WeakSet

from flexkv_sglang.backends.safe_files import PRIVATE, open_own

_ASKED_S = 0.02  # ``is_held`` has the lock for microseconds


class FileLock:
    """A held lock, and the content of its file. A process that is forked has none of them. Threads: any."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._guard = threading.Lock()  # the number of a closed descriptor is soon another file's
        self._fd = fd  # guarded by _guard
        _HELD.add(self)

    @classmethod
    def take(cls, path: Path, flags: int = 0, *, tries: int = 1) -> FileLock | None:
        """The lock; None while another holds it, or if the file is gone or replaced meanwhile.

        ``flags``: ``O_CREAT`` makes a missing file, with ``O_EXCL`` an existing one is None as well. ``tries``: another
        process may be asking ``is_held``. Raises ``OSError``.
        """
        try:
            fd = open_own(path, os.O_RDWR | flags)
        except FileExistsError:
            return None
        except FileNotFoundError:
            if flags & os.O_CREAT:  # then it is the directory that is missing
                raise
            return None
        try:
            for left in reversed(range(tries)):
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    time.sleep(_ASKED_S if left else 0)
                    continue
                if is_at(
                    path, fd
                ):  # it may have been unlinked and made again between open and flock
                    lock, fd = cls(path, fd), -1
                    return lock
                return None
            return None
        finally:
            if fd >= 0:
                os.close(fd)

    @classmethod
    def make(cls, path: Path) -> FileLock:
        """A lock in a new file, which appears held: no process takes it for a dead one. Raises ``OSError``."""
        hidden = path.with_suffix(".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(hidden, flags, PRIVATE)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            hidden.rename(path)
        except OSError:
            os.close(fd)
            raise
        return cls(path, fd)

    @staticmethod
    def is_held(path: Path) -> bool:
        """Does a process hold it? Shared, so that two that ask do not see each other. Raises ``OSError``."""
        try:
            fd = open_own(path, os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    @property
    def held(self) -> bool:
        """Not closed yet."""
        return self._fd >= 0

    @property
    def in_place(self) -> bool:
        """Can others still see it? False: its file was removed, and another process may hold a new one."""
        with self._guard:
            try:
                return is_at(self.path, self._fd)
            except OSError:
                return False

    def put_back(self) -> bool:
        """Make the path name a lock that is held here again. False: another process holds the one that is there.

        The new file appears held, so no process takes it for a dead one. Raises ``OSError``, also when closed.
        """
        with self._guard:
            if is_at(self.path, self._fd):
                return True
            if os.path.lexists(self.path):  # it was restored, or an adopter made it
                there = FileLock.take(self.path)
            else:
                self.path.with_suffix(".new").unlink(missing_ok=True)
                there = FileLock.make(self.path)
            if there is None:
                return False
            self._fd, there._fd = there._fd, self._fd
        there.close()
        return True

    def write(self, text: str) -> None:
        """Replace the file's content. Raises ``OSError``, also when closed."""
        with self._guard:
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text.encode(), 0)

    def close(self) -> None:
        """Release. Idempotent."""
        with self._guard:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


def is_at(path: Path, fd: int) -> bool:
    """Is the file of ``fd`` the one that ``path`` names? Raises ``OSError``."""
    mine = os.fstat(fd)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


_HELD: WeakSet[FileLock] = WeakSet()


def _leave_to_parent() -> None:
    """In a forked process: else a child that lives on would keep the locks of a parent that died."""
    for lock in list(_HELD):
        if lock._fd >= 0:  # not under _guard: a thread that is not here may have it
            os.close(lock._fd)
            lock._fd = -1


os.register_at_fork(after_in_child=_leave_to_parent)
