"""Pages that a reader's engine fetches out of the server's memory: each hold ends with DONE, or with its time.

A hold's memory is used again only behind its end. A reader that comes later than that reads other bytes: it has given
up by then (its deadline is half a hold, from before it asked), and would see that they do not match.

Threads: the server's loop.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from dataclasses import dataclass

from flexkv_sglang.backends.fleet.server.queue import Reader, Request

HOLD_MS = 5000


@dataclass(frozen=True, slots=True)
class Hold:
    """``offsets``: in the slabs, of the request's pages. ``until``: ``time.monotonic()`` seconds."""

    request: Request
    offsets: list[int]
    until: float


class ServeHolds:
    """What is held, each for ``hold_ms``; the oldest first, which ends first."""

    def __init__(self) -> None:
        self.hold_ms = HOLD_MS
        self._ids = itertools.count(1)
        self._holds: OrderedDict[int, Hold] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holds)

    def hold(self, request: Request, offsets: list[int], now: float) -> int:
        """Keep them from now on; the number to be named in DONE."""
        number = next(self._ids)
        self._holds[number] = Hold(request, offsets, now + self.hold_ms / 1000)
        return number

    def done(self, reader: Reader, number: int) -> Hold | None:
        """The hold that ends; None: there is none of this reader."""
        hold = self._holds.get(number)
        if hold is None or hold.request.reader is not reader:
            return None
        return self._holds.pop(number)

    def ended(self, now: float) -> list[Hold]:
        """Those whose time is over."""
        over = [number for number, hold in self._holds.items() if hold.until <= now]
        return [self._holds.pop(number) for number in over]
