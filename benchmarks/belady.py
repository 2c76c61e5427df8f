"""The best that can be done with a trace: Belady's choice among leaves, knowing the future.

L. A. Belady, "A study of replacement algorithms", IBM Systems Journal 5(2), 1966; here a page may also be
refused when its next use is farther away than that of each cached page.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

NEVER = 1 << 60


def next_uses(requests: Sequence[Sequence[int]]) -> list[list[int]]:
    """Per request and page: the number of the next request with this page, or NEVER."""
    upcoming: dict[int, int] = {}
    answer: list[list[int]] = []
    for number in reversed(range(len(requests))):
        answer.append([upcoming.get(one, NEVER) for one in requests[number]])
        upcoming.update((one, number) for one in requests[number])
    return answer[::-1]


class Clairvoyant:
    """A cache of ``capacity`` pages that knows each page's next use. Not thread-safe."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._next_use: dict[int, int] = {}
        self._parent: dict[int, int | None] = {}
        self._children: dict[int, int] = {}
        self._leaves: list[tuple[int, int]] = []  # (-next use, page); stale if that has changed

    def request(self, pages: Sequence[int], uses: Sequence[int]) -> int:
        """Serve one request; ``uses`` are its pages' next uses. Returns the hits of the leading run."""
        run = 0
        while run < len(pages) and pages[run] in self._next_use:
            run += 1
        for position in reversed(range(run)):
            self._next_use[pages[position]] = uses[position]
            self._offer(pages[position])
        for position in range(run, len(pages)):
            above = pages[position - 1] if position else None
            if not self._admit(pages[position], uses[position], above):
                break
        return run

    def _admit(self, page: int, use: int, above: int | None) -> bool:
        if use == NEVER or page in self._next_use:
            return False
        if len(self._next_use) >= self._capacity and not self._make_room(use, above):
            return False
        self._next_use[page], self._children[page], self._parent[page] = use, 0, above
        if above is not None:
            self._children[above] += 1
        self._offer(page)
        return True

    def _make_room(self, use: int, above: int | None) -> bool:
        while self._leaves:
            farthest, page = -self._leaves[0][0], self._leaves[0][1]
            if self._next_use.get(page) == farthest and not self._children[page]:
                break
            heapq.heappop(self._leaves)
        if not self._leaves or farthest <= use or page == above:
            return False
        heapq.heappop(self._leaves)
        del self._next_use[page], self._children[page]
        parent = self._parent.pop(page)
        if parent is not None:
            self._children[parent] -= 1
            self._offer(parent)
        return True

    def _offer(self, page: int) -> None:
        if not self._children[page]:
            heapq.heappush(self._leaves, (-self._next_use[page], page))


def optimum(requests: Sequence[Sequence[int]], capacity: int) -> float:
    """Share of pages that are hits of a leading run."""
    cache = Clairvoyant(capacity)
    hits = sum(map(cache.request, requests, next_uses(requests)))
    return hits / sum(map(len, requests))
