"""Starts children, kills them, and judges their ledger. ``scripts/crash`` is its command line.

Children are forked from this process, which has everything imported and no thread and no engine: a life
costs milliseconds, not an interpreter start. Each life first verifies what the last kill left.
"""

from __future__ import annotations

import gc
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from flexkv_sglang.backends.failpoints import Failpoint
from flexkv_sglang.backends.io.probe import probe_directory
from flexkv_sglang.backends.slots.space.places import open_places
from stores.crash_child import IN_FLIGHT, NAMESPACE, Life, Order, Setting, make_content
from stores.crash_ledger import Judge, Ledger, Verdict
from stores.engines import Bytes

WORK_POINTS = tuple(p for p in Failpoint if p < Failpoint.ADOPT_LOCKED)
ADOPT_POINTS = tuple(
    p
    for p in Failpoint
    if Failpoint.ADOPT_LOCKED <= p < Failpoint.CREATE_LOCKED
    or Failpoint.APPEND_BEFORE <= p < Failpoint.ADOPT_LOCKED
)
CREATE_POINTS = (
    Failpoint.CREATE_LOCKED,
    Failpoint.CREATE_SLOTS,
    Failpoint.CREATE_JOURNAL,
    Failpoint.REMOVE_FILE,
    Failpoint.REMOVE_LOCK,
)
CLOSE_POINTS = (Failpoint.CLOSE_SYNCED, Failpoint.CLOSE_RECORDED)
_TORN = (Failpoint.APPEND_BEFORE, Failpoint.PUBLISH_BEFORE)
_FREQUENT = (
    *range(Failpoint.EVICT_BEFORE, Failpoint.CLEAR_BEFORE),
    *range(Failpoint.APPEND_BEFORE, Failpoint.PUBLISH_BEFORE),
)
_LIFE_MAX_S = 0.5
_FOR_EVER = 10**6


@dataclass(frozen=True)
class Scene:
    """Settings of a piece of the campaign. ``sizes``: quotas in slots, one per life in turn."""

    name: str
    sizes: tuple[int, ...]
    chains: int
    payload: int
    verify: str
    lossless: bool
    reader: bool = False
    writers: int = 1
    durable: bool = False


SCENES = (
    Scene("roomy", (320,), 30, 4096, "full", lossless=True, reader=True),
    Scene("roomy-off", (320,), 30, 4096, "off", lossless=True),
    Scene("roomy-durable", (320,), 30, 4096, "full", lossless=True, durable=True),
    Scene("tight", (48,), 30, 6000, "full", lossless=False, reader=True),
    Scene("tight-off", (48,), 30, 4096, "off", lossless=False, reader=True),
    Scene("resize", (320, 300, 340), 30, 4096, "full", lossless=True),
    Scene("pair", (48,), 30, 4096, "full", lossless=False, reader=True, writers=2),
    Scene("pair-off", (48,), 30, 6000, "off", lossless=False, reader=True, writers=2),
)


@dataclass
class Tally:
    """Result of a campaign."""

    kills: Counter[str] = field(default_factory=Counter)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    neighbour_pages: int = 0
    neighbour_wrong: int = 0
    neighbour_refused: int = (
        0  # a torn read that the second look confirmed: the checksum had to help
    )

    def bad(self) -> int:
        """Findings of any kind."""
        found = sum(verdict.bad() for verdict in self.verdicts.values())
        return found + self.neighbour_wrong + self.neighbour_refused


def fork(work: Callable[[], None]) -> int:
    """Run ``work`` in a child; exit status 3 if it raises. Returns the child's id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - the end of the process
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(3)


class Piece:
    """One scene in one fresh directory, for a number of kills."""

    def __init__(self, scene: Scene, directory: Path, seed: int, tally: Tally) -> None:
        self._scene = scene
        self._rng = random.Random(seed)
        self._tally = tally
        directory.mkdir(parents=True)
        mode = probe_directory(str(directory))
        self._modes = {str(directory): mode}
        self._setting = Setting(
            directory,
            mode,
            max(scene.sizes),
            scene.payload,
            scene.chains,
            scene.verify,
            durable=scene.durable,
            alone=scene.writers == 1,
        )
        self._content: Bytes = make_content(self._setting.key_count, scene.payload)
        self._judges = [self._new_judge() for _ in range(scene.writers)]
        self._ledgers = [directory / f"writer{i}.ledger" for i in range(scene.writers)]
        open_places(self._modes, NAMESPACE, {})

    def _new_judge(self) -> Judge:
        scene, one_size = self._scene, len(self._scene.sizes) == 1
        return Judge(
            self._setting.key_count,
            min(scene.sizes) if scene.writers == 1 else 0,
            IN_FLIGHT,
            scene.lossless,
            clears_all=one_size and scene.writers == 1,
            cut_max=max(scene.sizes) - min(scene.sizes),
        )

    def run(self, kills: int) -> None:
        """Kill ``kills`` lives, then let one end normally."""
        reader = self._start_reader() if self._scene.reader else None
        lives = [self._start(index) for index in range(len(self._judges))]
        for turn in range(kills):
            index = turn % len(lives)
            self._end(index, *lives[index])
            lives[index] = self._start(index, last=turn >= kills - len(lives))
        for index, life in enumerate(lives):
            self._end(index, *life)
        if reader is not None:
            self._stop_reader(reader)
        merged = self._tally.verdicts.setdefault(self._scene.name, Verdict())
        for judge in self._judges:
            for name in vars(merged):
                setattr(merged, name, getattr(merged, name) + getattr(judge.verdict, name))

    def _order(self, *, last: bool) -> Order:
        rng = self._rng
        sizes = self._scene.sizes
        seed, slots = rng.randrange(1 << 30), rng.choice(sizes)
        if last:
            return Order(seed, slots, 20)
        if len(sizes) > 1 and rng.random() < 0.15:
            return Order(seed, min(sizes), _FOR_EVER, Failpoint.ADOPT_CUT)
        group = rng.choices(
            (WORK_POINTS, ADOPT_POINTS, CREATE_POINTS, CLOSE_POINTS, ()), (10, 6, 2, 1, 8)
        )[0]
        if not group:
            return Order(seed, slots, _FOR_EVER)
        point = rng.choice(group)
        early = group is ADOPT_POINTS or point in CREATE_POINTS
        passes = 1 if early else rng.randint(1, 60 if point in _FREQUENT else 4)
        cut = rng.choice((None, rng.random())) if point in _TORN else None
        steps = rng.randint(1, 30) if group is CLOSE_POINTS else _FOR_EVER
        return Order(seed, slots, steps, point, passes, cut)

    def _start(self, index: int, *, last: bool = False) -> tuple[int, Order, float]:
        order = self._order(last=last)
        setting = self._setting
        if order.point in CREATE_POINTS and setting.alone:
            self._make_reachable(order)

        def live() -> None:
            Life(setting, order, Ledger(self._ledgers[index]), self._content).run()

        patience = 30.0 if last else _LIFE_MAX_S
        if order.point is None and not last:
            patience = self._rng.uniform(0, 0.15)
        return fork(live), order, time.monotonic() + patience

    def _make_reachable(self, order: Order) -> None:
        """Owners are created in an empty directory; a half-created one is removed."""
        directory = self._setting.directory / NAMESPACE
        shutil.rmtree(directory)
        open_places(self._modes, NAMESPACE, {})
        for judge in self._judges:
            judge.wiped()
        if order.point in (Failpoint.REMOVE_FILE, Failpoint.REMOVE_LOCK):
            (directory / "0123456789ab.lock").touch()
            (directory / f"0123456789ab.{self._setting.slot_bytes}.slots").write_bytes(b"half")

    def _end(self, index: int, pid: int, order: Order, deadline: float) -> None:
        """Wait until the child dies at its failpoint; kill it at the deadline."""
        by = order.point.name if order.point is not None else "random moment"
        if order.cut is not None:
            by += " (torn)"
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() >= deadline:
                by = "random moment" if order.point is None else "point not reached"
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                break
            time.sleep(0.001)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            self._tally.kills[by] += 1
        elif status:
            self._tally.failures.append(f"{self._scene.name}: status {status} under {order}")
        if self._ledgers[index].exists():
            self._judges[index].read(self._ledgers[index])

    def _start_reader(self) -> int:
        setting, path = self._setting, self._setting.directory / "reader.ledger"
        order = Order(self._rng.randrange(1 << 30), 0, _FOR_EVER)
        return fork(lambda: Life(setting, order, Ledger(path), self._content).read_for_ever())

    def _stop_reader(self, pid: int) -> None:
        if os.waitpid(pid, os.WNOHANG)[0]:
            self._tally.failures.append(f"{self._scene.name}: the reader died")
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        judge = Judge(0, 0, 0, lossless=False)
        judge.read(self._setting.directory / "reader.ledger")
        self._tally.neighbour_pages += judge.verdict.checked
        self._tally.neighbour_wrong += judge.verdict.wrong
        self._tally.neighbour_refused += judge.verdict.refused


def campaign(directory: Path, kills: int, seed: int, scenes: str, piece_kills: int = 50) -> Tally:
    """``kills`` kills over all scenes whose name contains ``scenes``, in pieces with fresh directories."""
    tally = Tally()
    chosen = [scene for scene in SCENES if scenes in scene.name]
    piece_kills = min(piece_kills, -(-kills // len(chosen)))
    gc.collect()
    gc.freeze()  # children share these pages
    piece = 0
    while sum(tally.kills.values()) < kills and not tally.failures:
        scene = chosen[piece % len(chosen)]
        place = directory / f"{piece}-{scene.name}"
        Piece(scene, place, seed * 1000 + piece, tally).run(piece_kills)
        if tally.bad() or tally.failures:
            print(f"findings: directory kept: {place}", flush=True)
            break
        shutil.rmtree(place)
        piece += 1
        print(f"{sum(tally.kills.values())} kills, last piece {scene.name}", flush=True)
    return tally
