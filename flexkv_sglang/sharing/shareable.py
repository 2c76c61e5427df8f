"""Shareable: which namespaces of this node its agent serves, and which it leaves out. Threads: one.

A directory may hold thousands of namespaces of models and settings of the past. The agent opens the ones that living
rank processes use first, then those that changed last, as long as there are descriptors.
"""

from __future__ import annotations

import logging
import os
import resource
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.backends.fleet.members.redis_entries import is_namespace
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.sharing.node_pages import is_shareable, payload_bytes_of

logger = logging.getLogger(__name__)

UNUSED_MAX = 256
"""Namespaces that no living rank process uses, at most."""

_LIST_S = 5.0
_RESERVED_FDS = 256
_FDS_PER_OWNER = 2
_NAME_CHARS = 26


@dataclass(frozen=True, slots=True)
class _Folder:
    """A namespace's folder as it was at ``changed_ns``. ``payload_bytes``: None if it has nothing to share."""

    changed_ns: int
    payload_bytes: int | None
    owners: int


class Shareable:
    """``left_out``: number of namespaces that could be served and are not. ``troubles``: directory -> reason."""

    def __init__(self) -> None:
        self.left_out = 0
        self.troubles: dict[str, str] = {}
        self._folders: dict[Path, _Folder] = {}
        self._listed_at: dict[Path, float] = {}
        self._log = RateLimitedLog(logger)

    def find(self, directories: Iterable[Path], used: Iterable[str]) -> dict[str, int]:
        """Namespace -> bytes of a page, of those to serve. ``used``: namespaces of living rank processes."""
        wanted = frozenset(used)
        places = tuple(directories)
        now = time.monotonic()
        for directory in places:
            self._look(directory, wanted, now)
        self._folders = {at: each for at, each in self._folders.items() if at.parent in places}
        return self._choose(wanted)

    def _look(self, directory: Path, wanted: frozenset[str], now: float) -> None:
        """Look at the folders that are used, and every 5 s at all."""
        try:
            if now - self._listed_at.get(directory, -_LIST_S) >= _LIST_S:
                self._listed_at[directory] = now
                with os.scandir(directory) as entries:
                    names = [e.name for e in entries if len(e.name) == _NAME_CHARS]
                found = {directory / name for name in names if is_namespace(name)}
                for gone in [
                    at for at in self._folders if at.parent == directory and at not in found
                ]:
                    del self._folders[gone]
            else:
                found = {directory / name for name in wanted}
        except OSError as exc:  # a disk that fails does not hide the pages of others
            self.troubles[str(directory)] = f"cannot be listed: {exc.strerror or exc}"
            return
        self.troubles.pop(str(directory), None)
        for folder in found:
            self._look_into(folder)

    def _look_into(self, folder: Path) -> None:
        """Read what a folder holds if it has changed. A bad one is left out, with a line a minute."""
        try:
            changed_ns = folder.stat().st_mtime_ns
        except OSError:
            self._folders.pop(folder, None)
            return
        known = self._folders.get(folder)
        if known is not None and known.changed_ns == changed_ns and known.payload_bytes:
            return
        try:
            payload_bytes = payload_bytes_of(folder) if is_shareable(folder) else None
            count = len(owners(folder)) if payload_bytes else 0
        except Exception as exc:  # noqa: BLE001 - whatever lies there, it must not hide other namespaces
            self._log.log(
                folder,
                logging.WARNING,
                "flexkv: %s is not served: %s: %s",
                folder,
                type(exc).__name__,
                exc,
            )
            payload_bytes, count = None, 0
        self._folders[folder] = _Folder(changed_ns, payload_bytes, count)

    def _choose(self, wanted: frozenset[str]) -> dict[str, int]:
        spaces: dict[str, tuple[int, int, int]] = {}  # name -> (bytes, owners, changed)
        for at, each in self._folders.items():
            if each.payload_bytes:
                former = spaces.get(at.name, (each.payload_bytes, 0, 0))
                changed = max(former[2], each.changed_ns)
                spaces[at.name] = former[0], former[1] + each.owners, changed
        order = sorted(spaces, key=lambda name: (name not in wanted, -spaces[name][2], name))
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _RESERVED_FDS
        found: dict[str, int] = {}
        unused = 0
        for name in order:
            descriptors -= _FDS_PER_OWNER * spaces[name][1]
            unused += name not in wanted
            if name in wanted or (descriptors >= 0 and unused <= UNUSED_MAX):
                found[name] = spaces[name][0]
        self._say(len(spaces) - len(found))
        return found

    def _say(self, left_out: int) -> None:
        if left_out and left_out != self.left_out:
            text = (
                "flexkv: %d namespaces that no server uses are not served to other nodes: there are too many. "
                "flexkv gc removes old ones"
            )
            self._log.log("left out", logging.WARNING, text, left_out)
        self.left_out = left_out


def used_by(reports: Mapping[str, Mapping[str, object]]) -> set[str]:
    """Namespaces that living rank processes use, of ``RunDir.reports``."""
    found: set[str] = set()
    for report in reports.values():
        names = report.get("namespaces", ())
        found |= {str(name) for name in names} if isinstance(names, list) else set()
    return found
