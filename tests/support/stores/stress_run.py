"""Four and more processes on one directory that read each other's pages while they are killed.

``scripts/stress`` is its command line; ``stress_member`` is one process, and says what is judged. Phases
alternate between stores with and without checksums: with ``verify`` off the second look at the
neighbour's journal is all that stands between a torn read and the caller. A phase goes on with the files
that the last one of its kind left behind.
"""

from __future__ import annotations

import gc
import mmap
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.io.probe import probe_directory
from flexkv_sglang.backends.slots.journal import recover
from flexkv_sglang.backends.slots.ownership import owners
from flexkv_sglang.backends.slots.space.places import open_places
from flexkv_sglang.errors import JournalError
from stores.crash_campaign import ADOPT_POINTS, CLOSE_POINTS, CREATE_POINTS, WORK_POINTS, fork
from stores.crash_child import NAMESPACE, Setting, make_content
from stores.stress_member import COUNTERS, FINDINGS, Member, StressOrder

CHAINS = 24
SLOTS = (40, 40, 40, 32)
"""Quotas that lives choose from; four members hold less than the 192 pages there are, so all of them evict."""

_LIFE_S = (0.05, 4.0)
_STUCK_S = 60.0
_TICK_S = 0.002
_CENSUS_S = 0.5
_SAY_S = 10.0
_FOR_EVER = 10**9


@dataclass(frozen=True)
class Phase:
    """Settings of one phase. ``payload``: bytes of a page."""

    name: str
    verify: str
    engine: str
    payload: int


PHASES = (
    Phase("off, io_uring, 64 KiB", "off", "io_uring", 65536),
    Phase("full, io_uring, odd size", "full", "io_uring", 6000),
    Phase("off, threads, 16 KiB", "off", "threads", 16384),
    Phase("full, buffered, 16 KiB", "full", "buffered", 16384),
)


@dataclass
class Report:
    """Result of a run. ``problems`` and every counter of ``FINDINGS`` must stay empty."""

    rows: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    seconds: float = 0.0
    kills: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    held: int = 0
    held_twice: int = 0
    held_twice_max: float = 0.0
    problems: list[str] = field(default_factory=list)

    def total(self, name: str) -> int:
        """One counter over all processes."""
        return int(self.rows[:, COUNTERS.index(name)].sum())

    def bad(self) -> bool:
        """True if there are findings."""
        return bool(self.problems) or any(self.total(name) for name in FINDINGS)

    def summary(self) -> dict[str, object]:
        """For people and for JSON."""
        totals = {name: self.total(name) for name in COUNTERS}
        totals["read_own"] = totals["read"] - totals["read_neighbour"]
        return {
            "seconds": round(self.seconds, 1),
            "processes": len(self.rows),
            "kills": sum(self.kills.values()),
            **totals,
            "duplicates": {
                "doubled_share_of_written": _share(totals["doubled"], totals["written"]),
                "held_twice_share": _share(self.held_twice, self.held),
                "held_twice_share_max": round(self.held_twice_max, 4),
            },
            "problems": self.problems,
            "phases": dict(self.phases),
            "by_point": dict(sorted(self.kills.items())),
        }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 5) if whole else 0.0


@dataclass
class _Life:
    """A member's process. At ``deadline`` it is killed."""

    pid: int
    order: StressOrder
    deadline: float


class Stage:
    """One phase in its directory: keeps ``processes`` members alive by starting one for each that dies."""

    def __init__(self, phase: Phase, directory: Path, rng: random.Random, report: Report) -> None:
        self._rng = rng
        self._report = report
        directory.mkdir(parents=True, exist_ok=True)
        mode = probe_directory(str(directory), phase.engine)
        open_places({str(directory): mode}, NAMESPACE, {})
        self._folder = directory / NAMESPACE
        self._setting = Setting(
            directory,
            mode,
            max(SLOTS),
            phase.payload,
            CHAINS,
            phase.verify,
            durable=False,
            alone=False,
        )
        self._content = make_content(self._setting.key_count, phase.payload)
        self._moved = [(time.monotonic(), -1)] * len(report.rows)
        report.phases[f"{phase.name} ({mode.engine})"] += 1

    def run(self, seconds: float, tick: Callable[[], None]) -> None:
        """Run until the time is over or there is a finding. Leaves no process behind."""
        end = time.monotonic() + seconds
        lives = [self._start(number) for number in range(len(self._report.rows))]
        census_at = time.monotonic() + _CENSUS_S
        try:
            while time.monotonic() < end and not self._report.bad():
                for number, life in enumerate(lives):
                    if self._ended(life):
                        lives[number] = self._start(number)
                    self._watch(number)
                if time.monotonic() >= census_at:
                    self._census()
                    census_at = time.monotonic() + _CENSUS_S
                tick()
                time.sleep(_TICK_S)
        finally:
            for life in lives:
                os.kill(life.pid, signal.SIGKILL)
                os.waitpid(life.pid, 0)

    def _start(self, number: int) -> _Life:
        order = self._order()
        setting, content, row = self._setting, self._content, self._report.rows[number]
        pid = fork(lambda: Member(setting, order, content, row).run())
        shortest, longest = _LIFE_S
        patience = shortest + (longest - shortest) * self._rng.random() ** 2
        return _Life(pid, order, time.monotonic() + patience)

    def _order(self) -> StressOrder:
        """Half of the lives die at a failpoint, if they get there in time."""
        rng = self._rng
        groups = (WORK_POINTS, ADOPT_POINTS, CREATE_POINTS, CLOSE_POINTS, ())
        group = rng.choices(groups, (8, 6, 2, 2, 10))[0]
        seed, slots = rng.randrange(1 << 30), rng.choice(SLOTS)
        puts = rng.choice((20, 200, _FOR_EVER))
        if not group:
            return StressOrder(seed, slots, puts)
        passes = 1 if group is not WORK_POINTS else rng.randint(1, 40)
        return StressOrder(seed, slots, puts, rng.choice(group), passes)

    def _ended(self, life: _Life) -> bool:
        done, status = os.waitpid(life.pid, os.WNOHANG)
        by = life.order.point.name if life.order.point is not None else "random moment"
        if not done:
            if time.monotonic() < life.deadline:
                return False
            by = "random moment"
            os.kill(life.pid, signal.SIGKILL)
            _, status = os.waitpid(life.pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self._report.kills[by] += 1
        else:
            self._report.problems.append(f"a process ended with status {status}: {life.order}")
        return True

    def _watch(self, number: int) -> None:
        """Report a member without progress through many lives as stuck."""
        row = self._report.rows[number]
        work = int(row[COUNTERS.index("puts")] + row[COUNTERS.index("gets")])
        since, before = self._moved[number]
        if work != before:
            self._moved[number] = time.monotonic(), work
        elif time.monotonic() - since > _STUCK_S:
            self._report.problems.append(f"member {number} does nothing for {_STUCK_S:.0f} s")

    def _census(self) -> None:
        """(pages in the directory, pages that lie there more than once)."""
        seen: Counter[bytes] = Counter()
        for owner in owners(self._folder):
            try:
                seen.update(recover(self._folder, owner, NAMESPACE).records["key"].tolist())
            except (JournalError, OSError):  # being made or taken over just now
                continue
        copies = seen.total() - len(seen)
        self._report.held += len(seen)
        self._report.held_twice += copies
        self._report.held_twice_max = max(
            self._report.held_twice_max, copies / len(seen) if seen else 0.0
        )


def stress(directory: Path, seconds: float, processes: int, seed: int) -> Report:
    """Run all phases in turn for ``seconds``. Call it in a process without threads: it forks."""
    size = processes * len(COUNTERS)
    memory = mmap.mmap(-1, size * 8)  # shared with the children, and outlives each of them
    report = Report(np.frombuffer(memory, np.int64, size).reshape(processes, len(COUNTERS)))
    rng = random.Random(seed)
    gc.collect()
    gc.freeze()  # children share these pages
    started = time.monotonic()
    phase_s = min(30.0, seconds / len(PHASES))
    say_at = started + _SAY_S

    def tick() -> None:
        nonlocal say_at
        if time.monotonic() >= say_at:
            say_at = time.monotonic() + _SAY_S
            _say(report, time.monotonic() - started)

    turn = 0
    while (left := started + seconds - time.monotonic()) > 0 and not report.bad():
        phase = PHASES[turn % len(PHASES)]
        place = directory / f"{turn % len(PHASES)}"
        Stage(phase, place, rng, report).run(min(left, phase_s), tick)
        turn += 1
    report.seconds = time.monotonic() - started
    if not report.total("read_neighbour") and not report.bad():
        report.problems.append("no page was ever read at a neighbour: this run shows nothing")
    return report


def _say(report: Report, seconds: float) -> None:
    shown = ("verified", "read_neighbour", "rejected", "adoptions", "rotations", "doubled")
    found = {name: report.total(name) for name in (*shown, *FINDINGS)}
    words = ", ".join(f"{name} {number}" for name, number in found.items())
    sys.stdout.write(f"{seconds:.0f} s: kills {sum(report.kills.values())}, {words}\n")
    sys.stdout.flush()
