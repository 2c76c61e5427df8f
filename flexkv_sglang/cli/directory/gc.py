"""``flexkv gc``: removes the files of dead owners, each under its lock, never those of a live process.

Namespace folders stay: a server may be creating its files in one at this moment.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from flexkv_sglang.cli.directory.dead_owner import take
from flexkv_sglang.cli.directory.scan import Namespace, Owner, scan
from flexkv_sglang.cli.output import (
    complain,
    counted,
    emit,
    human_bytes,
    human_seconds,
    table,
)

_CLOCKS_APART_S = 60.0
_SHOWN = 5
_YEAR_9999 = 253_402_300_799.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """An owner and its folder."""

    namespace: Namespace
    owner: Owner

    @property
    def place(self) -> tuple[Path, str]:
        """Identifies it."""
        return self.owner.directory, self.owner.name


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
    """Returns the exit code. Raises ``OSError`` if ``root`` cannot be read."""
    now = time.time()
    found = scan(root)
    everyone = [Candidate(item, owner) for item in found.namespaces for owner in item.owners]
    left = [entry for entry in everyone if entry.owner.foreign]
    everyone = [entry for entry in everyone if not entry.owner.foreign]
    names = {entry.namespace.name for entry in everyone if selection.takes(entry.owner, now)}
    if selection.namespace is not None and len(names) > 1:
        complain(f"{selection.namespace!r} is not one namespace: {', '.join(sorted(names))}")
        return 2
    dead = [entry for entry in everyone if not entry.owner.alive]
    chosen = [entry for entry in dead if selection.takes(entry.owner, now)]
    sizes = {entry.place: entry.owner.disk_bytes() for entry in dead}
    total = sum(sizes[entry.place] for entry in chosen)
    preview = dry_run or selection.empty or not chosen
    if not preview and not yes and not _agreed(len(chosen), total):
        return 2
    lines = _table(chosen, now) if chosen else []
    failed: dict[tuple[Path, str], str] = {}
    for entry in () if preview else chosen:
        if why := _remove(entry):
            failed[entry.place] = why
    removed = [] if preview else [entry for entry in chosen if entry.place not in failed]
    freed = sum(sizes[entry.place] for entry in removed)
    alive = len(everyone) - len(dead)
    if preview:
        lines.append(
            f"{counted(len(chosen), 'dead owner')}, {human_bytes(total)}; {alive} alive. Nothing removed"
            + (_command(root, total) if selection.empty and chosen else "")
        )
    else:
        lines.append(f"removed {len(removed)} of {len(chosen)} owners, {human_bytes(freed)} freed")
    trouble = [
        *(f"{name}: {why}" for (_, name), why in failed.items()),
        *(
            f"{entry.owner.name}: {reason}: left alone"
            for entry in left
            for reason in entry.owner.foreign
        ),
        *(item.remedy for item in found.namespaces if item.remedy),
        *(f"{item.path} {item.reason}" for item in found.refused),
    ]
    lines += [*trouble, *_of_tomorrow(dead, chosen, now)]
    fields: dict[str, object] = {
        "directory": str(root),
        "dead": [_fields(entry, sizes[entry.place]) for entry in chosen],
        "alive": alive,
        "removed": [entry.owner.name for entry in removed],
        "freed_bytes": freed,
        "trouble": trouble,
    }
    emit(lines, fields, as_json=as_json)
    refused = any(item.ours for item in found.refused) or (found.refused and not found.namespaces)
    return 1 if failed or left or refused else 0


def _command(root: Path, total: int) -> str:
    return (
        f": select owners with --namespace or --older-than (flexkv gc {root} --older-than 0s --yes frees "
        f"{human_bytes(total)})"
    )


def _of_tomorrow(dead: list[Candidate], chosen: list[Candidate], now: float) -> list[str]:
    """Owners that no age can select, because a clock that was wrong has dated their files."""
    late = [
        e.owner for e in dead if e not in chosen and e.owner.touched_at() > now + _CLOCKS_APART_S
    ]
    if not late:
        return []
    when = time.strftime(
        "%Y-%m-%d", time.gmtime(min(max(o.touched_at() for o in late), _YEAR_9999))
    )
    names = ", ".join(owner.name for owner in late[:_SHOWN])
    text = (
        f"{counted(len(late), 'dead owner')} dated in the future, up to {when} ({names}): no age is known, so "
        "--older-than leaves them; --namespace N removes them"
    )
    return [text]


def _agreed(count: int, size: int) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        complain("no terminal to ask on; --yes removes, --dry-run shows")
        return False
    print(
        f"remove {count} owners, {human_bytes(size)}? [y/N] ", end="", file=sys.stderr, flush=True
    )
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _remove(entry: Candidate) -> str:
    """Returns the reason if it could not be removed, "" if it was."""
    if reason := entry.namespace.not_to_change:
        return reason
    try:
        with entry.namespace.acting():
            lock = take(entry.owner)
            if lock is None:
                return "a process has taken it meanwhile"
            with lock:
                lock.remove_files()
    except OSError as exc:
        return f"{exc.filename or entry.namespace.directory}: {exc.strerror or exc}"
    return ""


def _table(entries: list[Candidate], now: float) -> list[str]:
    return table(
        ("owner", "namespace", "on disk", "untouched for"),
        [
            (
                owner.name,
                namespace.name,
                human_bytes(owner.disk_bytes()),
                human_seconds(max(0.0, now - owner.touched_at())),
            )
            for namespace, owner in ((entry.namespace, entry.owner) for entry in entries)
        ],
        indent="",
    )


def _fields(entry: Candidate, size: int) -> dict[str, object]:
    return {"namespace": entry.namespace.name, "owner": entry.owner.name, "bytes": size}
