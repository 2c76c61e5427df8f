"""Cost of an eviction policy alone: CPU time per page of a trace, and memory per slot.

    .venv/bin/python benchmarks/policy_cost.py --trace FILE --capacity 1000,10000,50000 --json

The calls of the index are recorded once, then repeated on new policies, in turn with one that does nothing;
the difference is the policy's own share. Medians of ``--repeat`` rounds; a page is
a page of a request, whether it hits or not. Memory is tracemalloc's peak from before the policy is
made to the end of the trace, last_use included. With --json the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flexkv_sglang.cache.eviction.lru import Lru
from flexkv_sglang.cache.eviction.policy import EvictionPolicy
from flexkv_sglang.cache.eviction.reuse_density import ReuseDensity
from flexkv_sglang.types import I64, PageKey
from replay import hit_ratio, read_trace, whole_numbers

Call = tuple[str, tuple[Any, ...]]
POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {"default": ReuseDensity, "lru": Lru}


class Nothing:
    """Answers every call with nothing."""

    def __init__(self) -> None:
        self.last_use = memoryview(b"")

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AttributeError(name)

    def used(self, slots: object, key_of: object, children: object) -> None:
        """No-op."""

    def offer(self, slot: int) -> None:
        """No-op."""

    def forget(self, slot: int, key: PageKey) -> None:
        """No-op."""

    def victim(self, may_go: object, admission_value: float) -> None:
        """No-op."""

    def renew(self, slot: int, child_count: int) -> None:
        """No-op."""

    def admission_values(self, keys: object) -> None:
        """No-op."""

    def declined(self, keys: object) -> None:
        """No-op."""


class Recorder:
    """Passes the calls on to ``policy`` and notes them with their arguments."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self.last_use = policy.last_use
        self.calls: list[Call] = []

    def used(
        self, slots: Sequence[int], key_of: Sequence[PageKey | None], children: Sequence[int]
    ) -> None:
        """Noted with the columns' values of now."""
        seen = ({slot: key_of[slot] for slot in slots}, {slot: children[slot] for slot in slots})
        self.calls.append(("used", (list(slots), *seen)))
        self._policy.used(slots, key_of, children)

    def offer(self, slot: int) -> None:
        """Noted."""
        self.calls.append(("offer", (slot,)))
        self._policy.offer(slot)

    def forget(self, slot: int, key: PageKey) -> None:
        """Noted."""
        self.calls.append(("forget", (slot, key)))
        self._policy.forget(slot, key)

    def renew(self, slot: int, child_count: int) -> None:
        """Noted."""
        self.calls.append(("renew", (slot, child_count)))
        self._policy.renew(slot, child_count)

    def admission_values(self, keys: Sequence[PageKey]) -> Sequence[float] | None:
        """Noted."""
        self.calls.append(("admission_values", (list(keys),)))
        return self._policy.admission_values(keys)

    def declined(self, keys: Sequence[PageKey]) -> None:
        """Noted."""
        self.calls.append(("declined", (list(keys),)))
        self._policy.declined(keys)

    def victim(
        self, may_go: Callable[[int], bool], admission_value: float = math.inf
    ) -> int | None:
        """Noted with the pinned leaves that were met."""
        pinned: set[int] = set()

        def ask(slot: int) -> bool:
            allowed = may_go(slot)
            if not allowed:
                pinned.add(slot)
            return allowed

        found = self._policy.victim(ask, admission_value)
        self.calls.append(("victim", (lambda slot: slot not in pinned, admission_value)))
        return found

    def load(self, slots: I64, leaves: Iterable[int]) -> None:
        """Not part of a replay."""
        raise NotImplementedError

    clear = offers = load  # type: ignore[assignment]


def feed(calls: Sequence[Call], policy: object) -> float:
    """CPU seconds to make ``calls`` on ``policy``."""
    bound = [(getattr(policy, name), arguments) for name, arguments in calls]
    begin = time.process_time()
    for call, arguments in bound:
        call(*arguments)
    return time.process_time() - begin


def cost(requests: Sequence[Sequence[int]], capacity: int, name: str, repeat: int) -> list[float]:
    """Microseconds per page (median), bytes per slot (peak)."""
    recorder = Recorder(POLICIES[name](capacity))
    hit_ratio(requests, capacity, recorder)  # type: ignore[arg-type]
    pages = sum(map(len, requests))
    gc.collect()
    gc.freeze()  # the garbage collector does not scan the recorded calls
    took = [
        feed(recorder.calls, POLICIES[name](capacity)) - feed(recorder.calls, Nothing())
        for _ in range(repeat)
    ]
    tracemalloc.start()
    policy = POLICIES[name](capacity)
    for method, arguments in recorder.calls:
        getattr(policy, method)(*arguments)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    gc.unfreeze()
    return [round(statistics.median(took) / pages * 1e6, 3), round(peak / capacity, 1)]


def main() -> int:
    """Measure, print a table and, if asked for, the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True)
    parser.add_argument(
        "--capacity", type=whole_numbers, default=[1000, 10000, 50000], metavar="N,N,..."
    )
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    requests = read_trace(asked.trace)
    answer: dict[str, dict[str, list[float]]] = {name: {} for name in POLICIES}
    print(f"{'capacity':>9} {'policy':>8} {'us/page':>8} {'B/slot':>7}")
    for capacity in asked.capacity:
        for name in POLICIES:
            row = answer[name][str(capacity)] = cost(requests, capacity, name, asked.repeat)
            print(f"{capacity:9} {name:>8} {row[0]:8.2f} {row[1]:7.1f}", flush=True)
    if asked.json:
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
