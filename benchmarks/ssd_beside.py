"""Measures the speed of a busy Python thread while this package moves pages in the same process.

The thread stands for SGLang's scheduler. The same is measured beside fio, which runs outside of this interpreter: a
loss of speed there is due to the machine.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from flexkv_sglang.bench.contenders import (
    BATCH,
    BenchPool,
    Contender,
    FlexKVContender,
    MissingContender,
    PassDuration,
)
from flexkv_sglang.bench.memory import HostMemory
from flexkv_sglang.bench.peers import FioContender

PAGE_BYTES, PAGES = 1 << 20, 512
WINDOW_S = 0.6
_CHUNK = 1000


class BusyThread:
    """A thread that never sleeps and releases the GIL only when the interpreter takes it."""

    def __init__(self) -> None:
        self.rounds = 0
        self._stop = False
        self._thread = threading.Thread(target=self._spin, name="busy", daemon=True)

    def __enter__(self) -> BusyThread:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = True
        self._thread.join()

    def _spin(self) -> None:
        while not self._stop:
            for _ in range(_CHUNK):
                pass
            self.rounds += _CHUNK

    def speed_beside(self, work: Callable[[], PassDuration]) -> tuple[float, float]:
        """(rounds per second, passes per second) while ``work`` is repeated for ``WINDOW_S``."""
        first, start, passes = self.rounds, time.perf_counter(), 0
        while time.perf_counter() - start < WINDOW_S:
            work()
            passes += 1
        seconds = time.perf_counter() - start
        return (self.rounds - first) / seconds, passes / seconds


def _sleep() -> PassDuration:
    time.sleep(WINDOW_S)
    return PassDuration(WINDOW_S, 0.0)


def beside_busy(directory: Path, reps: int) -> dict[str, Any]:
    """At 1 MiB: share of its solo speed that the thread keeps, and GB/s beside it; medians and minima."""
    memory = HostMemory(PAGE_BYTES, BATCH)
    ours = FlexKVContender(directory, BenchPool(memory), PAGES)
    contenders: list[Contender] = [ours]
    with contextlib.suppress(MissingContender):
        contenders.append(FioContender(ours.slot_file, memory, PAGES, registered=True))
    kept: dict[str, list[float]] = {}
    speed: dict[str, list[float]] = {}
    generation = 0
    try:
        for contender in contenders:
            contender.write(0)
            contender.read(0)
        with BusyThread() as busy:
            for _ in range(reps):
                cases = [(c, d) for c in contenders for d in ("read", "write")]
                random.shuffle(cases)
                for contender, direction in cases:
                    generation += 1
                    if direction == "read":
                        contender.write(generation)
                    move = getattr(contender, direction)
                    before, _passes = busy.speed_beside(_sleep)
                    beside, passes = busy.speed_beside(lambda m=move, g=generation: m(g))  # type: ignore[misc]
                    after, _passes = busy.speed_beside(_sleep)
                    name = f"{contender.name} {direction}"
                    kept.setdefault(name, []).append(2 * beside / (before + after))
                    speed.setdefault(name, []).append(passes * PAGES * PAGE_BYTES / 1e9)
    finally:
        for contender in contenders:
            contender.close()
        memory.close()
    return {
        name: {
            "kept": round(statistics.median(values), 3),
            "kept_min": round(min(values), 3),
            "gb_per_s": round(statistics.median(speed[name]), 3),
        }
        for name, values in sorted(kept.items())
    }
