"""Causes outside of the traffic: the plug-in, the server, the directory, the disk. One pure function each.

A cause takes ``Facts`` and returns a ``Finding`` or None. It must not raise or read a file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from flexkv_sglang.cli.doctor.facts import DirectoryFacts, Facts
from flexkv_sglang.cli.doctor.machine import NETWORK
from flexkv_sglang.cli.doctor.server import Server, is_ours
from flexkv_sglang.cli.output import counted, human_bytes, human_seconds

_RELEASE = re.compile(r"^(\d+)\.(\d+)\.(\d+)")
_UNSALTED = (0, 5, 11), (0, 5, 19)
"""First and last release whose storage hash carries no namespace."""

LOW = 0.5
"""Causes that only lower the hit rate are reported below this rate."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A result. ``what``: a stable word for tools. ``severity``: a "note" does not set the exit code."""

    what: str
    title: str
    evidence: str
    remedy: str
    severity: Literal["cause", "note"] = "cause"


def is_low(facts: Facts) -> bool:
    """True before the first question, or with a hit rate below ``LOW``."""
    rate = facts.hit_rate
    return rate is None or rate < LOW


def plugin(facts: Facts) -> Finding | None:
    """SGLang would not load the plug-in, or it does not fit."""
    found = facts.plugin
    if facts.alive or found.sglang is None:
        return None
    if found.error:
        return Finding(
            "plugin_broken",
            "The plug-in does not load",
            f"SGLang {found.sglang}: {found.error}",
            "SGLang only logs this and goes on without the backend flexkv: repair the import",
        )
    if not found.entry_point:
        return Finding(
            "plugin_missing",
            "The plug-in is not installed beside SGLang",
            f"SGLang {found.sglang} is here, an entry point flexkv in sglang.srt.plugins is not",
            "pip install flexkv-sglang into the environment that the server runs in",
        )
    if not found.listed:
        return Finding(
            "plugin_not_listed",
            "SGLang's white list keeps the plug-in out",
            f"SGLANG_PLUGINS={found.allowed!r} does not contain flexkv"
            if found.allowed
            else "SGLang does not load it: SGLANG_PLATFORM excludes it, see its log",
            "Unset SGLANG_PLUGINS, or add flexkv to it, where the server is started. Another shell may have another "
            "value: see /proc/<pid>/environ of the server",
        )
    if found.misfit is not None:
        return Finding(
            "plugin_misfit",
            "The plug-in does not fit this SGLang",
            f"SGLang {found.sglang}: {found.misfit}",
            "Install a release of flexkv-sglang that knows it (docs/SGLANG.md, Releases), or use the backend dynamic",
        )
    return None


def salts(facts: Facts) -> Finding | None:
    """A release of SGLang whose page hashes do not contain ``cache_salt`` and ``extra_key``."""
    server = facts.server
    told = server.flags.get("version") if server is not None else None
    release = str(told or facts.plugin.sglang or "")
    match = _RELEASE.match(release)
    if match is None or not _UNSALTED[0] <= tuple(map(int, match.groups())) <= _UNSALTED[1]:
        return None
    return Finding(
        "salts_isolate_nothing",
        "cache_salt and extra_key isolate nothing in this SGLang",
        f"SGLang {release}: its names of stored pages come from the tokens alone",
        "Requests of several tenants share stored pages whatever their salt. Use SGLang 0.5.20, or a path (and "
        "cluster_id) for each tenant",
        "note",
    )


def unreachable(facts: Facts) -> Finding | None:
    """The named server does not answer."""
    server = facts.server
    if server is None or not server.error:
        return None
    return Finding(
        "server_unreachable",
        "The server does not answer",
        f"{server.url}{server.error}",
        "Start it, or correct --url. HTTP 401: it has an API key; its flags cannot be read, leave --url out",
    )


def not_attached(facts: Facts) -> Finding | None:
    """The server answers and has no storage backend, or another."""
    server = facts.server
    if server is None or server.error:
        return None
    evidence = _other_backend(server)
    if server.status is None and server.holds_slots is not None:  # its flags are from its start
        evidence = "" if server.holds_slots else evidence or "sglang:flexkv_slots_total is 0"
    elif server.status is None and facts.alive:
        return None  # it may have been attached since
    if not evidence:
        return None
    return Finding(
        "not_attached",
        "The server runs without this storage backend",
        f"{server.url}: {evidence}",
        "Start it with --enable-hierarchical-cache --hicache-storage-backend flexkv, or attach it with "
        "PUT /hicache/storage-backend",
    )


def _other_backend(server: Server) -> str:
    """The setting that excludes this backend; "" if none."""
    name = server.setting("hicache_storage_backend")
    if server.linked is not None:
        return ""
    if not server.flags.get("enable_hierarchical_cache", True):
        return "enable_hierarchical_cache is false"
    if name is None:
        return "hicache_storage_backend is not set"
    return "" if is_ours(server) else f"hicache_storage_backend is {name!r}"


def other_path(facts: Facts) -> Finding | None:
    """The server uses another directory, or has detached the backend."""
    server = facts.server
    if server is None or server.config is None or facts.alive:
        return None
    theirs = [path for tier in server.config.tiers for path in tier.path]
    mine = [str(place.path) for place in facts.places]
    return Finding(
        "other_path",
        "No process holds this directory, though the server is configured for flexkv",
        f"the server's path: {', '.join(theirs)}; looked at: {', '.join(mine)}; no owner's lock is held",
        "Look at the server's path. If it is this one: the server is on another machine or in another container, or "
        "the backend was detached (DELETE /hicache/storage-backend). Its log says 'flexkv: tier ready' when attached",
    )


def no_directory(facts: Facts) -> Finding | None:
    """A directory that does not exist: no server has used it."""
    lost = [str(place.path) for place in facts.places if not place.there]
    if not lost:
        return None
    return Finding(
        "no_directory",
        "The directory does not exist",
        ", ".join(lost),
        "No server has started with this path: compare it with 'path' in the server's extra config (its log: "
        "'flexkv: tiers=[path=...')",
    )


def no_access(facts: Facts) -> Finding | None:
    """Unreadable files, or files of several users, which only their user can read."""
    for place in facts.places:
        trouble = place.trouble or _disk_trouble(place)
        if trouble:
            return Finding(
                "no_access",
                "The directory cannot be used by this user",
                f"{place.path}: {trouble}",
                "Run flexkv doctor as the servers' user. If this is that user: give it the directory (chown -R)",
            )
        if len(place.users) > 1:
            users = ", ".join(map(str, place.users))
            return Finding(
                "several_users",
                "Files of several users are in one directory",
                f"{place.path}: user ids {users}; files are readable by their user only",
                "Run all servers that share it as one user, and give that user the files (chown -R)",
            )
    return None


def _disk_trouble(place: DirectoryFacts) -> str:
    disk = place.disk
    if disk is None or not disk.trouble or disk.free_bytes < disk.floor_bytes:
        return ""
    return f"a file of 4 KiB could not be written and read: {disk.trouble}"


def breaker(facts: Facts) -> Finding | None:
    """A directory that is bypassed after failures, or takes no more pages."""
    states = facts.gauges("breaker_state") if facts.alive else {}
    words = {1.0: "takes no more pages (writes fail, reads go on)", 2.0: "is bypassed"}
    bad = {where: words[state] for where, state in states.items() if state in words}
    if not bad:
        return None
    opened = facts.count("breaker_opened", None)
    failed = facts.count("read_failed_pages", None) + facts.count("write_failed_pages", None)
    return Finding(
        "breaker_open",
        "A directory failed and is not in use",
        "; ".join(f"{where} {word}" for where, word in bad.items())
        + f"; opened {counted(opened, 'time')}, {counted(failed, 'page')} failed",
        "Look at the disk (dmesg) and the log line 'is bypassed' or 'takes no more pages'. A probe brings it back",
    )


def disk_full(facts: Facts) -> Finding | None:
    """Less free space than the floor: slots were or will be given back."""
    given = facts.count("given_back_slots", None)
    full = [p for p in facts.places if p.disk and p.disk.free_bytes < p.disk.floor_bytes]
    if not given and not full:
        return None
    lines = [
        f"{p.path}: {human_bytes(p.disk.free_bytes)} free, min_free is {human_bytes(p.disk.floor_bytes)}"
        for p in full
        if p.disk is not None
    ]
    lines.append(f"{counted(given, 'slot')} given back")
    return Finding(
        "disk_full",
        "Other files fill the disk, so the cache gave space back",
        "; ".join(lines),
        "Free space or configure a smaller size; slots given back return at the next start. flexkv gc removes files of "
        "dead servers",
    )


def not_running(facts: Facts) -> Finding | None:
    """No process holds an owner, or there is none. Only a note when the last run was good."""
    if facts.alive:
        return None
    owners = sum(len(group.owners) for group in facts.groups)
    if not owners:
        return Finding(
            "not_running",
            "There is nothing of ours in this directory",
            ", ".join(str(place.path) for place in facts.places),
            "If a server runs with it, its log says 'host pool kv cannot be stored', and why. Else compare it "
            "with 'path' in the server's log ('flexkv: tiers=[path=...')",
        )
    at = facts.written_at
    last = "never reported" if at is None else f"{human_seconds(max(0.0, facts.now - at))} old"
    return Finding(
        "not_running",
        "No server runs on this directory",
        f"{counted(owners, 'owner')}, no lock is held; the counters are {last}, of the last run of each process",
        "Start a server with this path; it adopts the pages there. These figures are of the last run",
        "note" if facts.hit_rate is not None and not is_low(facts) else "cause",
    )


def network(facts: Facts) -> Finding | None:
    """A file system of another machine."""
    far = [p for p in facts.places if p.disk is not None and p.disk.file_system in NETWORK]
    if not far:
        return None
    return Finding(
        "network_file_system",
        "The directory is on a network file system",
        "; ".join(f"{p.path}: {p.disk.file_system}" for p in far if p.disk is not None),
        "Use a local disk: sharing relies on one page cache and on flock, and reads have deadlines",
    )


def slow_io(facts: Facts) -> Finding | None:
    """Slower I/O than io_uring."""
    slow = [
        f"{p.path}: io_engine={p.disk.mode.engine} o_direct={str(p.disk.mode.o_direct).lower()} ({p.disk.mode.reason})"
        for p in facts.places
        if p.disk and p.disk.mode and not p.disk.memory and p.disk.mode.engine != "io_uring"
    ]
    if not slow:
        return None
    return Finding(
        "slow_io",
        "The fastest I/O is refused here",
        "; ".join(slow),
        "io_uring: allow it (sysctl kernel.io_uring_disabled=0, the container's seccomp profile; io_engine in the "
        "config must be auto). O_DIRECT: use ext4 or XFS on a local disk. Asked by this process: the server may differ",
        "note",
    )
