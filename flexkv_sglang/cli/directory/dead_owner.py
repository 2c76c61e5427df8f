"""Takes the lock of a dead owner, also of one whose lock file somebody has removed."""

from __future__ import annotations

from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.cli.directory.scan import Owner
from flexkv_sglang.cli.directory.trusted_files import is_being_written


def take(owner: Owner) -> OwnerLock | None:
    """The lock, held; None while a process lives that has it, or may write to the files. Raises ``OSError``.

    A missing lock file is made again. Never for an owner with files that are not ours.
    """
    if owner.foreign or owner.alive:
        return None
    if owner.locked:
        return OwnerLock.try_take(owner.directory, owner.name)
    if _is_written(owner):
        return None
    lock = OwnerLock.try_take(owner.directory, owner.name, create=True)
    if lock is not None and _is_written(owner):  # its process came back meanwhile
        (owner.directory / f"{owner.name}.lock").unlink(missing_ok=True)
        lock.close()
        return None
    return lock


def _is_written(owner: Owner) -> bool:
    return any(is_being_written(path) is not False for path in owner.files)
