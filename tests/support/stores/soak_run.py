"""Random calls on two engines of one directory, with injected faults in every I/O path and injected races.

The model is a set of keys per engine: what it may hold. Page content is a function of the key. From that:

- bytes are right whenever a get says True, whatever was injected;
- no page is served without a put since the last clear;
- without a fault, what a put answered with True is served right after, unless pages of it were declined, and
  so is what prefix counted;
- no call takes longer than its deadline and the injected delay (plus ``slack_s``);
- after a clear every slot can be filled again: no pin, no slot, no promise has leaked; ``check()`` holds.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flexkv_sglang.backends.io.probe import IoMode, make_engine, probe_directory
from flexkv_sglang.backends.io.read_priority import ReadPriority
from flexkv_sglang.backends.io.transfer import IoEngine
from flexkv_sglang.backends.slots import breaker
from flexkv_sglang.cache import upkeep
from flexkv_sglang.cache.engine import CacheEngine
from stores.engines import Bytes, keys, open_engine, page_memory
from stores.faulty_io import READ_FAULTS, WRITE_FAULTS, CallGate, Fault, Faults, FaultyIo

CHAIN, CHAINS = 8, 12
SLOTS = (32, 16)
KEYS = CHAIN * CHAINS
HUNG_S = 0.02
FAR_S = 20.0
SETTINGS = (("io_uring", 4096), ("threads", 6144), ("buffered", 4096), ("io_uring", 6144))
_FOLLOWED_S = 0.2  # journals of neighbours are looked at every 20 ms


@dataclass
class Report:
    """Result of a run. ``problems`` must stay empty."""

    steps: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    races: Counter[str] = field(default_factory=Counter)
    engines: Counter[str] = field(default_factory=Counter)
    pages_compared: int = 0
    refused: int = 0
    breaker_opened: int = 0
    overrun_max_s: float = 0.0
    problems: list[str] = field(default_factory=list)


class Member:
    """One of the two engines with its model."""

    def __init__(self, engine: CacheEngine, slots: int) -> None:
        self.engine = engine
        self.slots = slots
        self.may: set[int] = set()

    @property
    def healthy(self) -> bool:
        return not any(store.breaker.is_open for store in self.engine._tier.stores)


class Segment:
    """A few thousand steps in one fresh directory with one kind of I/O and one page size."""

    def __init__(self, directory: Path, seed: int, report: Report, slack_s: float) -> None:
        self._rng = random.Random(seed)
        self._report = report
        self._slack_s = slack_s
        self._directory = directory
        kind, self._payload = SETTINGS[seed % len(SETTINGS)]
        directory.mkdir(parents=True)
        self._mode: IoMode = probe_directory(str(directory), kind)
        report.engines[f"{self._mode.engine} {self._payload}"] += 1
        self._faults = Faults(random.Random(seed + 1))
        self._content: Bytes = np.random.default_rng(5).integers(
            0, 256, (KEYS, self._payload), dtype=np.uint8
        )
        self._keys = keys(KEYS)
        # Keys that may be stored with damaged bytes by one of the engines. A right copy at the other one
        # proves nothing: it may be evicted first. Only clearing both does.
        self._tainted: set[int] = set()
        self._members = [Member(self._open(slots), slots) for slots in SLOTS]

    def _open(self, slots: int) -> CacheEngine:
        def make(kind: str, traffic: ReadPriority) -> IoEngine:
            return FaultyIo(make_engine(kind, traffic), self._faults)

        slot_bytes = -(-self._payload // 4096) * 4096
        return open_engine(
            self._directory, self._payload, slots * slot_bytes, mode=self._mode, make=make
        )

    def run(self, steps: int) -> None:
        """Take ``steps`` steps, or stop at the first problem."""
        actions: list[tuple[Callable[[Member], None], float]] = [
            (self._put, 42),
            (self._get, 40),
            (self._exists, 12),
            (self._check, 1.5),
            (self._clear, 0.4),
            (self._reopen, 0.15),
            (self._fill, 0.3),
            (self._race, 1.5),
            (self._storm, 0.1),
        ]
        names, weights = zip(*actions, strict=True)
        for _ in range(steps):
            action = self._rng.choices(names, weights)[0]
            member = self._rng.choices(self._members, (2, 1))[0]
            self._report.steps += 1
            self._report.calls[action.__name__.strip("_")] += 1
            action(member)
            if self._report.problems:
                break
        for member in self._members:
            self._count_metrics(member)
            member.engine.close()
        self._report.faults.update(self._faults.injected)

    def _problem(self, text: str) -> None:
        self._report.problems.append(f"step {self._report.steps}: {text}")

    def _count_metrics(self, member: Member) -> None:
        counts = member.engine._metrics.snapshot()
        self._report.refused += int(counts.get("corrupt_pages", 0))
        self._report.breaker_opened += int(counts.get("breaker_opened", 0))
        if counts.get("upkeep_exceptions"):
            self._problem("an exception in the upkeep thread")

    def _run_of_keys(self) -> range:
        first = self._rng.randrange(CHAINS) * CHAIN
        start = self._rng.choice((0, 0, 0, self._rng.randrange(CHAIN)))
        return range(first + start, first + self._rng.randint(start + 1, CHAIN))

    def _timed(self, call: Callable[[float], list[bool]], fault: Fault | None) -> list[bool]:
        allowed = HUNG_S if fault is Fault.HUNG else FAR_S
        self._faults.next, delayed = fault, self._faults.delayed_s
        started = time.monotonic()
        result = call(started + allowed)
        took = time.monotonic() - started
        self._faults.next = None
        late = took - allowed - (self._faults.delayed_s - delayed)
        self._report.overrun_max_s = max(self._report.overrun_max_s, late)
        if late > self._slack_s:
            self._problem(f"a call took {took:.2f} s with {allowed} s allowed, fault {fault}")
        return result

    def _fault(self, which: tuple[Fault, ...]) -> Fault | None:
        return self._rng.choice(which) if self._rng.random() < 0.15 else None

    def put(self, member: Member, run: range, fault: Fault | None) -> list[bool]:
        """Put ``run``; the model learns that it may be there."""
        memory, buffers = page_memory(len(run), self._payload)
        memory[:] = self._content[run.start : run.stop]
        parent = self._keys[run.start - 1] if run.start % CHAIN else None
        names = self._keys[run.start : run.stop]
        member.may.update(run)
        if fault is Fault.CORRUPT:
            self._tainted.update(run)
        done = self._timed(lambda end: member.engine.put(names, buffers, parent, end), fault)
        if not np.array_equal(memory, self._content[run.start : run.stop]):
            self._problem("a put changed its source")
        return done

    def get(self, member: Member, run: range, fault: Fault | None) -> list[bool]:
        """Get ``run``; compare the served pages, and check that each may exist."""
        memory, buffers = page_memory(len(run), self._payload)
        names = self._keys[run.start : run.stop]
        done = self._timed(lambda end: member.engine.get(names, buffers, end), fault)
        for i, key in enumerate(run):
            if not done[i]:
                continue
            self._report.pages_compared += 1
            if not np.array_equal(memory[i], self._content[key]):
                self._problem(f"wrong bytes for key {key}, fault {fault}")
            if not any(key in each.may for each in self._members):
                self._problem(f"key {key} is served without a put")
        return done

    def _certain(self, run: range) -> bool:
        return all(m.healthy for m in self._members) and self._tainted.isdisjoint(run)

    def _put(self, member: Member) -> None:
        run, fault = self._run_of_keys(), self._fault(WRITE_FAULTS)
        if self._rng.random() < 0.7 or fault is not None:
            self.put(member, run, fault)
            return
        sure = self._certain(
            run
        )  # before the call: a directory that returns meanwhile is loaded again
        before = self._declined(member)
        done = self.put(member, run, None)
        if self._declined(member) > before:  # True as well, as if evicted at once
            self._report.calls["put, some declined"] += 1
            return
        stored = range(run.start, run.start + sum(done))
        if not (sure and stored and all(done[: len(stored)])) or all(
            self.get(member, stored, None)
        ):
            return
        time.sleep(_FOLLOWED_S)  # True as well for what a neighbour has just given up
        again = self.put(member, stored, None)
        if self._declined(member) > before:
            return
        if all(again) and not all(self.get(member, stored, None)):
            self._problem(f"put said True for {stored} and get did not find it")

    @staticmethod
    def _declined(member: Member) -> int:
        return member.engine._metrics.snapshot().get("write_declined_pages", 0)

    def _get(self, member: Member) -> None:
        self.get(member, self._run_of_keys(), self._fault(READ_FAULTS))

    def _exists(self, member: Member) -> None:
        run = self._run_of_keys()
        sure = self._certain(run)
        count = member.engine.prefix(self._keys[run.start : run.stop])
        found = range(run.start, run.start + count)
        if not sure or not found or all(self.get(member, found, None)):
            return
        time.sleep(_FOLLOWED_S)  # it may have counted what a neighbour has just given up
        still = member.engine.prefix(self._keys[found.start : found.stop]) == len(found)
        if still and not all(self.get(member, found, None)):
            self._problem(f"prefix counted {found} and get did not find it")

    def _check(self, member: Member) -> None:
        member.engine.check()
        if member.engine.page_count() > member.slots:
            self._problem("more pages than slots")

    def _clear(self, member: Member) -> None:
        if member.healthy:
            member.engine.clear()
            member.may.clear()

    def _reopen(self, member: Member) -> None:
        self._count_metrics(member)
        member.engine.close()
        member.engine = self._open(member.slots)
        member.engine.check()

    def _fill(self, member: Member) -> None:
        """Check that every slot can be used: none has leaked."""
        if not all(each.healthy for each in self._members):
            return
        for each in self._members:
            each.engine.clear()
            each.may.clear()
        self._tainted.clear()
        time.sleep(_FOLLOWED_S)  # a page that a neighbour seems to have is not stored
        for first in range(0, member.slots, CHAIN):
            if not all(self.put(member, range(first, first + CHAIN), None)) and member.healthy:
                self._problem("a slot cannot be filled: something leaked")
        if member.healthy and member.engine.page_count() != member.slots:
            self._problem(f"{member.engine.page_count()} pages after filling {member.slots} slots")
        member.engine.check()

    def _storm(self, member: Member) -> None:
        """After failures in a row the directory is bypassed, and used again later."""
        before = member.healthy
        for _ in range(8):
            run, direction = self._run_of_keys(), self._rng.random() < 0.5
            if direction:
                self.put(member, run, Fault.BROKEN)
            else:
                self.get(member, run, Fault.BROKEN)
        if before and self._rng.random() < 0.5:
            end = time.monotonic() + 10
            while not member.healthy and time.monotonic() < end:
                time.sleep(0.01)
            if not member.healthy:
                self._problem("the breaker does not close although the disk works")

    def _race(self, member: Member) -> None:
        """Stop one call in the middle of its transfer and do something else meanwhile."""
        other = self._members[1 - self._members.index(member)]
        run = range(first := self._rng.randrange(CHAINS) * CHAIN, first + CHAIN)
        everything = [
            range(c * CHAIN, (c + 1) * CHAIN) for c in range(CHAINS) if c * CHAIN != first
        ]
        # (name, direction that stops, the call that stops, what happens meanwhile)
        races: tuple[tuple[str, str, Callable[[], object], Callable[[], object]], ...] = (
            # its slots are doomed: nothing of it may be found, every slot comes back
            ("put x clear", "write", lambda: self._put_raw(member, run), lambda: self._clear(member)),
            # no reader sees WRITING pages
            ("put x get", "write", lambda: self._put_raw(member, run),
             lambda: self._get_raw(member, run)),
            # the second one must not write the same slots
            ("put x put", "write", lambda: self._put_raw(member, run),
             lambda: self._put_raw(member, run)),
            # a snapshot is made while tombstones are appended and records are not
            ("put x rotation", "write", lambda: self._put_raw(member, run),
             lambda: self._rotate(member)),
            # pinned pages are not evicted, so their bytes stay
            ("get x evict", "read", lambda: self._get_raw(member, run),
             lambda: [self._put_raw(member, each) for each in everything[:5]]),
            # pinned pages are doomed, their slots come back with the last unpin
            ("get x clear", "read", lambda: self._get_raw(member, run), lambda: self._clear(member)),
            # the owner rewrites what a neighbour reads: only the second look can tell
            ("neighbour's get x evict", "read", lambda: self._get_raw(member, run),
             lambda: [self._put_raw(other, each) for each in everything[:3]]),
            # close waits for the transfer, and nothing moves after it
            ("get x close", "read", lambda: self._get_raw(member, run), lambda: self._reopen(member)),
        )  # fmt: skip
        name, direction, stopped, meanwhile = self._rng.choice(races)
        self._report.races[name] += 1
        self._put_raw(other if "neighbour" in name else member, run)
        if direction == "write":
            self._clear(member)
        self._run_race(name, direction, stopped, meanwhile)
        for each in self._members:
            each.engine.check()

    def _run_race(
        self,
        name: str,
        direction: str,
        stopped: Callable[[], object],
        meanwhile: Callable[[], object],
    ) -> None:
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                stopped()
            except BaseException as exc:  # noqa: BLE001 - reported by the thread that waits
                errors.append(exc)

        self._faults.gate = gate = CallGate(direction)
        thread = threading.Thread(target=guarded)
        thread.start()
        gate.arrived.wait(0.05)  # a call that has nothing to move never arrives
        closing = threading.Timer(0.01, gate.go_on.set) if "close" in name else None
        if closing is not None:
            closing.start()
        meanwhile()
        gate.go_on.set()
        thread.join(30)
        if closing is not None:
            closing.join()
        self._faults.gate = None
        if thread.is_alive() or errors:
            self._problem(f"{name}: {errors or 'a call does not return'}")

    def _put_raw(self, member: Member, run: range) -> None:
        memory, buffers = page_memory(len(run), self._payload)
        memory[:] = self._content[run.start : run.stop]
        member.may.update(run)
        member.engine.put(self._keys[run.start : run.stop], buffers, None, time.monotonic() + FAR_S)
        member.may.update(run)  # a clear may have come in between

    def _get_raw(self, member: Member, run: range) -> None:
        memory, buffers = page_memory(len(run), self._payload)
        done = member.engine.get(
            self._keys[run.start : run.stop], buffers, time.monotonic() + FAR_S
        )
        for i, key in enumerate(run):
            if done[i] and not np.array_equal(memory[i], self._content[key]):
                self._problem(f"wrong bytes for key {key} in a race")

    def _rotate(self, member: Member) -> None:
        for store in member.engine._tier.stores:
            store.journal.should_rotate = lambda _live: True  # type: ignore[method-assign]
        for directory in member.engine._upkeep.directories:
            member.engine._upkeep.rotate_if_due(directory)
        for store in member.engine._tier.stores:
            del store.journal.should_rotate


def soak(
    directory: Path, steps: int, seed: int, *, segment_steps: int = 2500, slack_s: float = 2.0
) -> Report:
    """Run ``steps`` steps in segments; stop at the first problem."""
    report = Report()
    saved = breaker._PAUSE_S, upkeep._ROUND_S
    breaker._PAUSE_S, upkeep._ROUND_S = 0.02, 0.02  # type: ignore[misc]  # bypassed for a few steps only
    try:
        for number in range(-(-steps // segment_steps)):
            place = directory / f"segment{number}"
            count = min(segment_steps, steps - report.steps)
            Segment(place, seed * 10007 + number, report, slack_s).run(count)
            if report.problems:
                break
            shutil.rmtree(place)
            if steps > 5 * segment_steps and not number % 8:
                print(f"{report.steps} steps", flush=True)
    finally:
        breaker._PAUSE_S, upkeep._ROUND_S = saved  # type: ignore[misc]
    return report
