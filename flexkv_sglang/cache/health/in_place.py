"""InPlace: are an owner's open files still the ones that its paths name? What is not is mended, or made again.

A cleaner removes a lock file, somebody removes the whole directory, a backup is copied back, a mount goes: an open
file goes on as if nothing had happened, and everything that is written to it is lost at the next start. So an owner
looks at its paths every few seconds. A lock file is put back, a journal that is not the written one is replaced by a
new generation. Where the slot file is gone the directory is bypassed, and the probe that brings it back makes the
files again, empty, once no call uses the old one: its space returns first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from flexkv_sglang.backends.file_lock import is_at
from flexkv_sglang.backends.safe_files import publish
from flexkv_sglang.backends.slots.journal import generations, journal_path, snapshot_path
from flexkv_sglang.backends.slots.manifest import MANIFEST
from flexkv_sglang.backends.slots.slot_file import OwnedStore, SlotFile
from flexkv_sglang.backends.slots.space.disk_space import floor_bytes, free_bytes
from flexkv_sglang.cache.local_pages import LocalPages
from flexkv_sglang.errors import JournalError, TierError, TierUnavailableError
from flexkv_sglang.metrics.registry import Metrics

logger = logging.getLogger(__name__)

LOOK_S = 2.0
_TAKEN_OVER = "another process has taken over its files; a restart of this server makes new ones"


class InPlace:
    """The files of all owners of one engine. Threads: any; per directory one at a time."""

    def __init__(self, pages: LocalPages, metrics: Metrics, min_free: int | None) -> None:
        self._pages = pages
        self._metrics = metrics
        self._min_free = min_free
        self._devices: dict[Path, int] = {}
        self._manifests: dict[Path, bytes] = {}
        for directory in {store.lock.directory for store in pages.tier.stores}:
            self._devices[directory] = directory.stat().st_dev
            manifest = directory / MANIFEST
            if manifest.is_file():
                self._manifests[directory] = manifest.read_bytes()

    def look(self, stores: Mapping[int, OwnedStore]) -> None:
        """Compare the files of ``stores`` (by the number of their region) with their paths. On the journals' thread.

        A directory without its slot file, or whose files another process has, is bypassed: its breaker is tripped.
        """
        for region, store in stores.items():
            if store.failed:
                continue  # its next probe looks
            if not _slots_in_place(store):
                store.breaker.trip(f"{store.slots.path.name} was removed, replaced or cut")
                continue
            try:
                if not self._lock_in_place(store):
                    store.breaker.trip(_TAKEN_OVER)
                    continue
                self._put_manifest(store.lock.directory)
                self._mend_journal(region, store)
            except (OSError, TierError, JournalError) as exc:
                self._metrics.count("restore_errors")
                store.breaker.trip(f"files cannot be put back: {exc}", readable=True)

    def make_folder(self, directory: Path) -> None:
        """Make a namespace folder that was removed. Raises ``OSError`` and ``TierUnavailableError``.

        Not if its file system is not mounted any more: then the files would land on another disk.
        """
        there = directory
        while not there.exists():
            there = there.parent
        if there.stat().st_dev != self._devices.get(directory):
            raise TierUnavailableError(f"the file system that held {directory} is not mounted")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._put_manifest(directory)

    def restore(self, region: int, store: OwnedStore) -> None:
        """Before a bypassed directory is used again: make a slot file that is gone, empty; its lock, too.

        The journal comes with ``OwnedStore.revive``. Raises ``OSError`` and ``TierUnavailableError``: not now.
        """
        if not self._lock_in_place(store):
            raise TierUnavailableError(_TAKEN_OVER)
        if _slots_in_place(store):
            self._remove_generations(store)
            return
        if not self._pages.give_up(region):
            raise TierUnavailableError("pages of a file that is gone are still in use")
        store.slots.close()
        self._remove_rest(store)
        directory, slot_class = store.lock.directory, store.slots.slot_class
        needed = slot_class.slot_bytes * slot_class.slot_count
        spare = free_bytes(directory) - floor_bytes(directory, self._min_free)
        if needed > spare:
            raise TierUnavailableError(f"{needed} bytes are needed, {spare} are to be had")
        store.slots = SlotFile.create(store.slots.path, slot_class, store.slots.mode)
        self._said(store.slots.path, "it is made again, its pages are lost")

    def _lock_in_place(self, store: OwnedStore) -> bool:
        if store.lock.file.in_place:
            return True
        if not store.lock.file.put_back():
            return False
        self._said(store.lock.directory / f"{store.lock.owner}.lock", "it is put back")
        return True

    def _put_manifest(self, directory: Path) -> None:
        content = self._manifests.get(directory)
        if content is not None and not (directory / MANIFEST).exists():
            publish(directory, MANIFEST, [content], mode=0o666)

    def _mend_journal(self, region: int, store: OwnedStore) -> None:
        if _journal_in_place(store):
            return
        pages, gone = self._pages, store.journal.path
        with pages.lock:
            snapshot = pages.index.snapshot()
        records = pages.tier.snapshot_records(*snapshot.by_age(), region)
        store.journal.rotate(records, sealed=False)
        self._remove_generations(store)
        self._said(gone, "a new journal has its pages")

    def _remove_rest(self, store: OwnedStore) -> None:
        """What a backup brought back of this owner: pages of a file that is about to be made again."""
        directory, owner = store.lock.directory, store.lock.owner
        for name in os.listdir(directory):
            if name.startswith(owner + ".") and not name.endswith((".lock", ".stats.json")):
                (directory / name).unlink(missing_ok=True)

    def _remove_generations(self, store: OwnedStore) -> None:
        """Journals that a backup brought back: a start would take the newest for ours."""
        directory, owner = store.lock.directory, store.lock.owner
        for generation in generations(directory, owner):
            if generation != store.journal.header.generation:
                journal_path(directory, owner, generation).unlink(missing_ok=True)
                snapshot_path(directory, owner, generation).unlink(missing_ok=True)

    def _said(self, name: object, text: str) -> None:
        self._metrics.count("restored_files")
        logger.warning("flexkv: %s was removed, replaced or cut: %s", name, text)


def _slots_in_place(store: OwnedStore) -> bool:
    slots = store.slots
    if slots.fd < 0:
        return False
    size = slots.slot_class.slot_bytes * slots.slot_class.slot_count
    return is_at(slots.path, slots.fd) and os.fstat(slots.fd).st_size >= size


def _journal_in_place(store: OwnedStore) -> bool:
    """Its records are what was appended: a journal only grows, so an older copy of it is shorter."""
    journal, header = store.journal, store.journal.header
    snapshot = snapshot_path(journal.directory, header.owner, header.generation)
    return journal.in_place and (not header.generation or snapshot.exists())
