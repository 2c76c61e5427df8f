"""Who may write which files: one ``flock`` per owner, held for the life of the owner.

An owner's name is 12 hex digits; its lock is ``<owner>.lock``. A lock that can be taken means the owner
is dead, whatever its process id was (locks work across containers that share a mount, ids do not).
Lock files are never renamed, and unlinked only by whoever holds them.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path
from types import TracebackType

from flexkv_sglang.backends.failpoints import Failpoint, reach

_LOCK_NAME = re.compile(r"^([0-9a-f]{12})\.lock$")


class OwnerLock:
    """A held lock. ``close`` releases it; so does the end of the process, however it ends."""

    def __init__(self, directory: Path, owner: str, fd: int) -> None:
        self.directory = directory
        self.owner = owner
        self._fd = fd

    @classmethod
    def create(cls, directory: Path) -> OwnerLock:
        """Lock of a new owner with a name nobody has."""
        while True:
            lock = cls.try_take(directory, secrets.token_hex(6), create=True)
            if lock is not None:
                return lock

    @classmethod
    def try_take(cls, directory: Path, owner: str, *, create: bool = False) -> OwnerLock | None:
        """The lock of ``owner``, or None while a live process holds it (or it is gone).

        ``create``: make the file; None if it exists already.
        """
        path = directory / f"{owner}.lock"
        flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            fd = os.open(path, flags, 0o600)
        except (FileNotFoundError, FileExistsError):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The path may have been unlinked and made anew between open and flock.
            if os.fstat(fd).st_ino == path.stat().st_ino:
                return cls(directory, owner, fd)
        except (BlockingIOError, FileNotFoundError):
            pass
        os.close(fd)
        return None

    @property
    def held(self) -> bool:
        """Not closed yet."""
        return self._fd >= 0

    def remove_files(self) -> None:
        """Delete everything of this owner, the lock file last. For owners nobody wants any more."""
        for name in os.listdir(self.directory):
            if name.startswith(self.owner + ".") and not name.endswith(".lock"):
                (self.directory / name).unlink(missing_ok=True)
                reach(Failpoint.REMOVE_FILE)
        reach(Failpoint.REMOVE_LOCK)
        (self.directory / f"{self.owner}.lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Release. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> OwnerLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def owners(directory: Path) -> list[str]:
    """Names of all owners in a namespace directory, alive or dead."""
    return sorted(match[1] for name in os.listdir(directory) if (match := _LOCK_NAME.match(name)))
