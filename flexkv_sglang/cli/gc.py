"""``flexkv gc``: removes the files of dead owners, each under its lock, never those of a live process.

Namespace folders stay: a server may be creating its files in one at this moment.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.cli.output import counted, emit, human_bytes, human_seconds, table
from flexkv_sglang.cli.scan import Owner, namespaces


@dataclass(frozen=True, slots=True)
class Selection:
    """Selects dead owners: of one namespace (a prefix of its name), or untouched for ``older_than`` seconds."""

    namespace: str | None
    older_than: float | None

    @property
    def empty(self) -> bool:
        """True without a criterion: only show the dead owners."""
        return self.namespace is None and self.older_than is None

    def takes(self, owner: Owner, now: float) -> bool:
        """True if the criterion selects this owner, dead or alive."""
        if self.namespace is not None:
            return owner.directory.name.startswith(self.namespace)
        return self.older_than is None or now - owner.touched_at() >= self.older_than


def run_gc(root: Path, selection: Selection, *, dry_run: bool, yes: bool, as_json: bool) -> int:
    """Returns the exit code."""
    now = time.time()
    everyone = [owner for item in namespaces(root) for owner in item.owners if owner.locked]
    names = {owner.directory.name for owner in everyone if selection.takes(owner, now)}
    if selection.namespace is not None and len(names) > 1:
        which = ", ".join(sorted(names))
        print(f"flexkv: {selection.namespace!r} is not one namespace: {which}", file=sys.stderr)
        return 2
    chosen = [owner for owner in everyone if not owner.alive and selection.takes(owner, now)]
    alive = sum(owner.alive for owner in everyone)
    sizes = {(owner.directory, owner.name): owner.disk_bytes() for owner in chosen}
    preview = dry_run or selection.empty or not chosen
    if not preview and not yes and not _agreed(len(chosen), sum(sizes.values())):
        return 2
    lines = [_table(chosen, now)] if chosen else []
    removed = [] if preview else [owner for owner in chosen if _remove(owner)]
    freed = sum(sizes[owner.directory, owner.name] for owner in removed)
    if preview:
        lines.append(
            f"{counted(len(chosen), 'dead owner')}, {human_bytes(sum(sizes.values()))}; {alive} alive. Nothing removed"
            + (": select owners with --namespace or --older-than" if selection.empty else "")
        )
    else:
        lines.append(f"removed {len(removed)} of {len(chosen)} owners, {human_bytes(freed)} freed")
    fields: dict[str, object] = {
        "directory": str(root),
        "dead": [_fields(owner, sizes[owner.directory, owner.name]) for owner in chosen],
        "alive": alive,
        "removed": [owner.name for owner in removed],
        "freed_bytes": freed,
    }
    emit("\n".join(lines), fields, as_json=as_json)
    return 0 if preview or len(removed) == len(chosen) else 1


def _agreed(count: int, size: int) -> bool:
    if not sys.stdin.isatty():
        print("flexkv: no terminal to ask on; --yes removes, --dry-run shows", file=sys.stderr)
        return False
    print(
        f"remove {count} owners, {human_bytes(size)}? [y/N] ", end="", file=sys.stderr, flush=True
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(owner: Owner) -> bool:
    """False if a process adopted the owner meanwhile."""
    lock = OwnerLock.try_take(owner.directory, owner.name)
    if lock is None:
        return False
    with lock:
        lock.remove_files()
    return True


def _table(owners: list[Owner], now: float) -> str:
    return table(
        ("owner", "namespace", "on disk", "untouched for"),
        [
            (
                owner.name,
                owner.directory.name,
                human_bytes(owner.disk_bytes()),
                human_seconds(max(0.0, now - owner.touched_at())),
            )
            for owner in owners
        ],
        indent="",
    )


def _fields(owner: Owner, size: int) -> dict[str, object]:
    return {"namespace": owner.directory.name, "owner": owner.name, "bytes": size}
