"""Directory: one directory of a tier with its health, its stores, and the threads that touch its files.

A file-system call on a disk that hangs does not return, so nobody makes one who has something else to do. ``upkeep``
does the regular work (``Duty``) and the probes, ``journal`` the appends and all that must keep their order,
``neighbours`` reads the tails of other owners' journals.
Whoever watches (``Upkeep``) and whoever looks up pages reads memory only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.backends.slots.breaker import Breaker
from flexkv_sglang.backends.slots.slot_file import OwnedStore
from flexkv_sglang.threads import DiskThread


class Directory:
    """A namespace's folder in one configured directory.

    ``path``: the folder. ``stores``: the owned stores there by the number of their region; none where this process
    only reads its neighbours. ``breaker`` is shared by all of them. Threads: any.
    """

    def __init__(self, path: Path, breaker: Breaker, stores: dict[int, OwnedStore]) -> None:
        self.path = path
        self.breaker = breaker
        self.stores = stores
        self.upkeep = DiskThread("flexkv-upkeep")
        self.journal = DiskThread("flexkv-journal")
        self.neighbours = DiskThread("flexkv-neighbours")
        self._threads = (self.upkeep, self.journal, self.neighbours)

    @property
    def idle(self) -> bool:
        """Has every job ended, also one that hung?"""
        return all(thread.idle for thread in self._threads)

    @property
    def locked(self) -> bool:
        """Does this process hold an owner's lock there?"""
        return any(store.lock.held for store in self.stores.values())

    def hangs(self, now: float) -> bool:
        """Is a job under way overdue at ``now`` (monotonic seconds)?"""
        return any(thread.hangs(now) for thread in self._threads)

    def stop(self, deadline: float) -> bool:
        """End the threads; waits until ``deadline`` for jobs under way. False: one still runs."""
        ended = [thread.stop(deadline) for thread in self._threads]
        return all(ended)


@dataclass(frozen=True, slots=True)
class Duty:
    """Regular work on the files of one directory, on its own thread, every ``every_s`` seconds while it is in use.

    ``work`` may hang: a directory where it takes ``limit_s`` and a second more is bypassed. It handles the errors that
    it expects; what it raises is counted as ``upkeep_exceptions`` and logged, and the duty comes again.
    ``in_order``: on the thread of the journals, between two appends. A duty of the other thread that changes a
    journal, or the slots that it names, hands this part over: ``directory.journal.run(part, deadline)``.
    ``always``: also while the directory is bypassed, unless a job still hangs there.
    """

    work: Callable[[Directory], None]
    every_s: float
    limit_s: float = 5.0
    in_order: bool = False
    always: bool = False


class Plan:
    """Which duties are due, per directory. One thread."""

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._duties = tuple(duties)
        self._due: dict[tuple[Directory, Duty], float] = {}

    def take(self, directory: Directory) -> list[Duty]:
        """The duties that are due in ``directory`` now; their next turn is ``every_s`` from now."""
        now, in_use = time.monotonic(), directory.breaker.is_readable
        due = []
        for duty in self._duties:
            if not in_use and not duty.always:
                continue
            if self._due.setdefault((directory, duty), now + duty.every_s) <= now:
                self._due[directory, duty] = now + duty.every_s
                due.append(duty)
        return due


def directories_of(stores: Sequence[OwnedStore], places: Sequence[Path]) -> list[Directory]:
    """The directories of ``stores`` (region by region) and of ``places``, each once."""
    found: dict[Path, dict[int, OwnedStore]] = {place: {} for place in places}
    for region, store in enumerate(stores):
        found.setdefault(store.lock.directory, {})[region] = store
    return [
        Directory(path, next(iter(mine.values())).breaker if mine else Breaker(), mine)
        for path, mine in found.items()
    ]
