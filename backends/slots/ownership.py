"""Who may write which files: one ``flock`` per owner, held for the life of the owner.

An owner's name is 12 hex digits; its lock is ``<owner>.lock``. A lock that can be taken means the owner
is dead, whatever its process id was (locks work across containers that share a mount, ids do not).
Lock files are never renamed, and only the holder unlinks one.
"""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path
from types import TracebackType

from flexkv_sglang.backends.failpoints import Failpoint, reach
from flexkv_sglang.backends.file_lock import FileLock

_LOCK_NAME = re.compile(r"^([0-9a-f]{12})\.lock$")


class OwnerLock:
    """A held lock in ``file``. ``close`` releases it; so does the end of the process, however it ends."""

    def __init__(self, directory: Path, owner: str, lock: FileLock) -> None:
        self.directory = directory
        self.owner = owner
        self.file = lock

    @classmethod
    def create(cls, directory: Path) -> OwnerLock:
        """Lock of a new owner with a name that is not in use."""
        while True:
            lock = cls.try_take(directory, secrets.token_hex(6), create=True)
            if lock is not None:
                return lock

    @classmethod
    def try_take(cls, directory: Path, owner: str, *, create: bool = False) -> OwnerLock | None:
        """The lock of ``owner``, or None while a live process holds it (or it is gone).

        ``create``: make the file; None if it exists already.
        """
        lock = FileLock.take(directory / f"{owner}.lock", os.O_CREAT | os.O_EXCL if create else 0)
        return None if lock is None else cls(directory, owner, lock)

    @property
    def held(self) -> bool:
        """True until ``close``."""
        return self.file.held

    def remove_files(self) -> None:
        """Delete everything of this owner, the lock file last. For owners whose pages are not used any more."""
        for name in os.listdir(self.directory):
            if name.startswith(self.owner + ".") and not name.endswith(".lock"):
                (self.directory / name).unlink(missing_ok=True)
                reach(Failpoint.REMOVE_FILE)
        reach(Failpoint.REMOVE_LOCK)
        (self.directory / f"{self.owner}.lock").unlink(missing_ok=True)

    def close(self) -> None:
        """Release. Idempotent."""
        self.file.close()

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
