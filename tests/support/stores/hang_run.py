"""A campaign of hangs: two directories, one on a mount that freezes at random; puts, gets, lookups and clears go on.

Bounds: a call ends ``OVERDUE_S`` after its deadline at the latest, a lookup and a clear at once, and the healthy
directory takes pages in every window of that length. What is read is right, byte for byte.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from flexkv_sglang.cache.assembly import Quota, open_tiers, prepare_tiers
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig, TierConfig
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.threads import OVERDUE_S
from stores.engines import keys, page_memory, wait_until
from stores.hanging_mount import hanging_mount

PAGE = 16384
PAGES = 16
BOUND_S = 0.5
SLACK_S = 1.0
"""For the scheduler of a busy machine."""

SEEDS = 12


@dataclass
class HangReport:
    """What happened. ``findings``: what must not happen."""

    freezes: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    longest_s: dict[str, float] = field(default_factory=dict)
    idle_s: float = 0.0
    read_pages: int = 0
    bypasses: int = 0
    findings: list[str] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """For the last line."""
        longest = {name: round(seconds, 2) for name, seconds in self.longest_s.items()}
        return {**vars(self), "longest_s": longest, "idle_s": round(self.idle_s, 2)}


class _Load:
    """The threads that call. Each has memory of its own."""

    def __init__(self, tiers: Tiers, report: HangReport, seed: int) -> None:
        self._tiers = tiers
        self._report = report
        self._rng = random.Random(seed)
        self._stop = threading.Event()
        self._stored_at = time.monotonic()
        self._right = {number: page_memory(PAGES, PAGE, seed=number) for number in range(SEEDS)}
        steps = {"put": self._put, "get": self._get, "exists": self._exists, "clear": self._clear}
        self._threads = [
            threading.Thread(target=self._repeat, args=item, daemon=True) for item in steps.items()
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(BOUND_S + OVERDUE_S + 10)
            if thread.is_alive():
                self._report.findings.append("a call has not ended")

    def _repeat(self, name: str, step: object) -> None:
        bound = SLACK_S + (BOUND_S + OVERDUE_S if name in ("put", "get") else 0.0)
        longest, calls = self._report.longest_s, self._report.calls
        while not self._stop.is_set():
            begun = time.monotonic()
            try:
                step()  # type: ignore[operator]
            except Exception as exc:  # noqa: BLE001 - a finding
                self._report.findings.append(f"{name} raised {exc!r}")
            took = time.monotonic() - begun
            calls[name] = calls.get(name, 0) + 1
            longest[name] = max(longest.get(name, 0.0), took)
            if took > bound:
                self._report.findings.append(f"{name} took {took:.1f} s")
            self._stop.wait(3.0 if name == "clear" else 0.02)

    def _put(self) -> None:
        number = self._rng.randrange(SEEDS)
        _, buffers = self._right[number]
        wanted = keys(PAGES, number)
        fresh = not all(self._tiers.holds(wanted))
        done = self._tiers.put(wanted, buffers, None, time.monotonic() + BOUND_S)
        now = time.monotonic()
        if any(done) or not fresh:
            self._report.idle_s = max(self._report.idle_s, now - self._stored_at)
            self._stored_at = now
        if now - self._stored_at > BOUND_S + OVERDUE_S + 2 * SLACK_S:
            self._report.findings.append("the healthy directory was idle")
            self._stored_at = now

    def _get(self) -> None:
        number = self._rng.randrange(SEEDS)
        target, buffers = page_memory(PAGES, PAGE)
        flags = self._tiers.get(keys(PAGES, number), buffers, time.monotonic() + BOUND_S)
        count = sum(flags)
        self._report.read_pages += count
        if not np.array_equal(target[:count], self._right[number][0][:count]):
            self._report.findings.append("wrong bytes")

    def _exists(self) -> None:
        self._tiers.prefix(keys(PAGES, self._rng.randrange(SEEDS)))

    def _clear(self) -> None:
        self._tiers.clear()


def hang_campaign(place: Path, freezes: int, seed: int) -> HangReport:
    """Freeze one of two directories ``freezes`` times, for 0.05 to 4 s each."""
    report, rng = HangReport(), random.Random(seed)
    with hanging_mount(place / "hanging") as mount:
        paths = (str(mount.path / "a"), str(place / "b"))
        durability = "journal" if seed % 2 else "none"
        tier = TierConfig(paths, 2 * SEEDS * PAGES * PAGE)
        config = FlexKVConfig(tiers=(tier,), durability=durability, min_free=0)
        tiers = open_tiers(
            config, prepare_tiers(config), "ns", {}, PAGE, [Quota(tier.size)], Metrics()
        )
        load = _Load(tiers, report, seed)
        load.start()
        for _ in range(freezes):
            time.sleep(rng.uniform(0.1, 1.5))
            mount.freeze()
            time.sleep(rng.choice([rng.uniform(0.05, 0.6), rng.uniform(1.0, 4.0)]))
            mount.thaw()
            report.freezes += 1
        breakers = [store.breaker for store in tiers.tiers[0]._tier.stores]  # type: ignore[attr-defined]
        if not wait_until(lambda: not any(breaker.is_open for breaker in breakers), 40.0):
            report.findings.append("the directory has not come back")
        load.stop()
        report.bypasses = tiers._metrics.snapshot().get("breaker_opened", 0)
        tiers.check()
        begun = time.monotonic()
        tiers.close()
        if time.monotonic() - begun > 3.0 + SLACK_S or not tiers.released():
            report.findings.append("close")
    return report
