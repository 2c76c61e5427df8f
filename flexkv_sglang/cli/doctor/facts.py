"""The facts that ``flexkv doctor`` judges: directories, counters, the server, the plug-in, the machine.

Gathering reads and never judges; ``Facts`` is frozen and computes sums over the counters.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexkv_sglang.cli.directory.acting import acting_as
from flexkv_sglang.cli.directory.patience import answers
from flexkv_sglang.cli.directory.scan import (
    Namespace,
    OwnerStats,
    RefusedFolder,
    is_read_only,
    owner_stats,
    said,
    scan,
)
from flexkv_sglang.cli.doctor.fleet_facts import Fleet, look_at_fleets
from flexkv_sglang.cli.doctor.machine import Disk, Machine, look_at_disk, look_at_machine
from flexkv_sglang.cli.doctor.server import Server
from flexkv_sglang.config.settings import FlexKVConfig

_PLUGIN_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Plugin:
    """Answers of ``plugin_check.check_plugin``. ``sglang``: None where it is not installed or was not asked."""

    sglang: str | None = None
    entry_point: bool = False
    allowed: str = ""
    listed: bool = False
    misfit: str | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """One namespace in one directory, and its owners."""

    namespace: Namespace
    owners: tuple[OwnerStats, ...]

    @property
    def pool(self) -> str:
        """The host pool whose pages it holds."""
        return str(self.namespace.fields.get("pool", "kv"))

    @property
    def pages(self) -> int:
        """Pages of all owners."""
        return sum(item.pages for item in self.owners)

    @property
    def alive(self) -> bool:
        """True if a process holds one of the owners."""
        return any(item.owner.alive for item in self.owners)


@dataclass(frozen=True, slots=True)
class DirectoryFacts:
    """One configured directory. ``trouble``: the reason why it cannot be read. ``users``: owners of its namespaces.

    ``refused``: folders that were not looked at. ``hung``: it did not answer, so nothing is known.
    """

    path: Path
    there: bool
    trouble: str = ""
    groups: tuple[Group, ...] = ()
    users: tuple[int, ...] = ()
    disk: Disk | None = None
    refused: tuple[RefusedFolder, ...] = ()
    read_only: bool = False
    hung: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """All input of the causes. ``now``: seconds as ``time.time()``; ``server``: None if none was named."""

    now: float
    places: tuple[DirectoryFacts, ...]
    plugin: Plugin
    machine: Machine
    server: Server | None = None
    fleets: tuple[Fleet, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """Namespaces of all directories."""
        return tuple(group for place in self.places for group in place.groups)

    @property
    def alive(self) -> bool:
        """True if a process holds an owner here."""
        return any(group.alive for group in self.groups)

    @property
    def pages(self) -> int:
        """KV pages in all directories."""
        return sum(group.pages for group in self.groups if group.pool == "kv")

    def runs(self, pool: str | None = None) -> Iterator[dict[str, Any]]:
        """Stats of each process and pool, once: of live processes, or if none is alive, of the last run of each."""
        seen = set()
        for group in self.groups:
            for item in group.owners:
                counts = item.live and (item.owner.alive or not self.alive)
                if counts and pool in (None, group.pool) and item.live["process"] not in seen:
                    seen.add(item.live["process"])
                    yield item.live

    def count(self, name: str, pool: str | None = "kv") -> int:
        """A counter, summed over processes; ``pool`` None: over pools too."""
        return sum(int(run["counters"].get(name, 0)) for run in self.runs(pool))

    def counts_ending(self, ending: str) -> dict[str, int]:
        """Counters above 0 whose names have this ending, over all pools."""
        total: Counter[str] = Counter()
        for run in self.runs():
            total.update({k: v for k, v in run["counters"].items() if k.endswith(ending) and v})
        return dict(total)

    def gauges(self, name: str) -> dict[str, float]:
        """``name:label`` gauges of all runs, by label; the highest of each."""
        found: dict[str, float] = {}
        for run in self.runs():
            for key, value in run.get("gauges", {}).items():
                if key.startswith(name + ":"):
                    label = key.partition(":")[2]
                    found[label] = max(value, found.get(label, value))
        return found

    def median(self, name: str) -> float | None:
        """Upper bound of the bucket with the median of a KV histogram; infinity in the last one; None if empty."""
        bounds: list[float] = []
        counts: list[int] = []
        for run in self.runs("kv"):
            item = run.get("histograms", {}).get(name)
            if item:
                if bounds and item["bounds"] != bounds:
                    continue  # of another release
                bounds = item["bounds"]
                old = counts or [0] * len(item["counts"])
                counts = [a + b for a, b in zip(old, item["counts"], strict=True)]
        half, passed = sum(counts) / 2, 0
        for bound, count in zip([*bounds, float("inf")], counts, strict=bool(counts)):
            passed += count
            if count and passed >= half:
                return bound
        return None

    @property
    def hit_rate(self) -> float | None:
        """KV pages found per page asked for; None before the first question."""
        asked = self.count("asked_pages")
        return self.count("found_pages") / asked if asked else None

    @property
    def written_at(self) -> float | None:
        """Time of the newest stats file; None without one."""
        return max((float(run["written_at"]) for run in self.runs()), default=None)


def look_at_place(path: Path, config: FlexKVConfig | None) -> DirectoryFacts:
    """Never raises: ``trouble`` has the reason when the directory cannot be read."""
    settings = config or FlexKVConfig()
    try:
        if not path.is_dir():
            return DirectoryFacts(path, there=False)
        if not _alive(path):
            return DirectoryFacts(path, True, hung=True)
        looked = scan(path)
        found = [Group(item, _owners(item)) for item in looked.namespaces]
        folder = path.stat()
        with acting_as(folder.st_uid, folder.st_gid):  # a file is written there
            disk = look_at_disk(path, settings.min_free, settings.io_engine)
        return DirectoryFacts(
            path,
            True,
            "",
            tuple(found),
            tuple(sorted({item.uid for item in looked.namespaces})),
            disk,
            looked.refused,
            is_read_only(path),
        )
    except FileNotFoundError as exc:  # removed while we look
        return DirectoryFacts(path, True, f"{exc.filename}: {exc.strerror}; look again")
    except OSError as exc:
        return DirectoryFacts(path, True, f"{exc.filename or path}: {exc.strerror or exc}")
    except Exception as exc:  # noqa: BLE001 - one odd directory must not hide the others
        return DirectoryFacts(path, True, said(exc))


def _alive(path: Path) -> bool:
    folder = path.stat()
    with acting_as(folder.st_uid, folder.st_gid):
        return answers(path)


def look_at_plugin() -> Plugin:
    """Asks a child process, which imports SGLang; at most two minutes."""
    command = [sys.executable, "-P", "-m", "flexkv_sglang.cli.doctor.plugin_check"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PLUGIN_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return Plugin(sglang="?", error=f"importing it failed: {exc}")
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        last = said[-1] if said else f"exit status {done.returncode}"
        return Plugin(sglang="?", error=f"importing it failed: {last}")
    return Plugin(**json.loads(done.stdout.splitlines()[-1]))


def gather(
    paths: Iterable[Path], server: Server | None, plugin: Plugin | None, now: float
) -> Facts:
    """Gather all facts. ``plugin``: None to ask the SGLang of this environment, unless a server holds a directory or
    may hold one that cannot be read."""
    config = server.config if server is not None else None
    places = tuple(look_at_place(path.expanduser(), config) for path in paths)
    fleets = look_at_fleets([place.path for place in places], config, now)
    facts = Facts(now, places, plugin or Plugin(), look_at_machine(None), server, fleets)
    if facts.alive:  # a live store proves that its server has loaded the plug-in
        pid = next((int(run["pid"]) for run in facts.runs() if "pid" in run), None)
        return replace(facts, machine=look_at_machine(pid))
    if any(place.trouble for place in places):
        return facts
    return replace(facts, plugin=plugin or look_at_plugin())


def _owners(namespace: Namespace) -> tuple[OwnerStats, ...]:
    return tuple(owner_stats(namespace, owner) for owner in namespace.owners)
