"""Removes files of namespaces that no process will open again, because their weights are gone.

Each owner's files are removed under its lock, so never those of a live process.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from flexkv_sglang.backends.slots.manifest import MANIFEST, noted
from flexkv_sglang.backends.slots.ownership import OwnerLock, owners
from flexkv_sglang.backends.slots.slot_file import SlotFileTier

logger = logging.getLogger(__name__)


def discard(tier: SlotFileTier) -> None:
    """Delete the files of a closed tier, except owners that another process has adopted meanwhile.

    Raises ``OSError``.
    """
    for store in tier.stores:
        _remove(store.lock.directory, store.lock.owner)


def remove_unshared(root: Path, keep: str) -> None:
    """Remove dead owners' files in namespaces of every epoch (see ``epochs``) except ``keep``.

    A process that was killed after a weight update leaves them, and no other process could ever use them.
    The epoch that is kept has a namespace for every pool and rank of this server.
    Folders stay: a server may be making its files in one at this moment. Never raises.
    """
    for directory in _unshared(root, keep):
        try:
            for owner in owners(directory):
                if _remove(directory, owner):
                    logger.info("flexkv: removed %s in %s: weights are gone", owner, directory)
        except OSError as exc:
            logger.warning("flexkv: cannot remove old files in %s: %s", directory, exc)


def remove_folder(directory: Path) -> None:
    """Remove a namespace folder that this server has left for good, if only its description is in it."""
    try:
        if [path.name for path in directory.iterdir()] == [MANIFEST]:
            (directory / MANIFEST).unlink(missing_ok=True)
            directory.rmdir()
    except OSError as exc:
        logger.debug("flexkv: %s stays: %s", directory, exc)


def _remove(directory: Path, owner: str) -> bool:
    lock = OwnerLock.try_take(directory, owner)
    if lock is None:
        return False
    with lock:
        lock.remove_files()
    return True


def _unshared(root: Path, keep: str) -> Iterable[Path]:
    for description in sorted(root.glob(f"*/{MANIFEST}")):
        directory = description.parent
        if noted(directory, "epoch") not in (None, "", keep):
            yield directory
