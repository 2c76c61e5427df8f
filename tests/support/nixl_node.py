"""One side of a read through the real NIXL, in a process of NIXL's own environment (``scripts/setup-nixl``).

``nixl_node.py serve COUNT BYTES``: a page server; ``{"op": "counts"}`` on stdin answers its counts.
``nixl_node.py read``: a client; ``{"op": "read", "address": a, "count": n, "bytes": b, "seconds": s}`` answers
outcomes, whether every OK page is right, and seconds; with ``"pid"`` and ``"signal"`` that process gets that signal
when the pages lie there and before they are fetched. ``{"op": "touched"}``: which pages of the last read that are not
OK were written to. ``{"op": "state"}``: free bytes of its slab, and what it has counted. Ends at the end of input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

from flexkv_sglang.backends.fleet import ShareConfig
from flexkv_sglang.backends.peer_client import PeerClient
from flexkv_sglang.backends.remote_read import PageOutcome
from page_sources import MemorySource, PageMemory, keys_of, page_of
from serving import begin, serving

SHARE = ShareConfig(listen="127.0.0.1:0", engine="nixl")


class Reader:
    """The client's process."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.client = PeerClient(SHARE, self._count)
        self._last: tuple[PageMemory, list[PageOutcome]] | None = None

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] += amount

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One line of the protocol."""
        if asked["op"] == "read":
            if "pid" in asked:
                self._harm(asked["pid"], asked["signal"])
            return self._read(asked["address"], asked["count"], asked["bytes"], asked["seconds"])
        if asked["op"] == "touched":
            assert self._last is not None
            memory, outcomes = self._last
            bad = [i for i, outcome in enumerate(outcomes) if outcome is not PageOutcome.OK]
            return {"touched": [i for i in bad if not memory.untouched(i)]}
        engine = self.client._engine
        assert engine is not None
        return {"free": engine.free_bytes, **self.counts}

    def _harm(self, pid: int, number: int) -> None:
        """The next fetch, and only that, finds the server like this."""
        engine = self.client._engine
        assert engine is not None
        start = engine.start

        def harmed(*arguments: Any) -> None:
            engine.start = start  # type: ignore[method-assign]
            os.kill(pid, number)
            start(*arguments)

        engine.start = harmed  # type: ignore[method-assign]

    def _read(self, address: str, count: int, byte_count: int, seconds: float) -> dict[str, Any]:
        keys, memory = keys_of(count), PageMemory(count, [byte_count])
        began = time.monotonic()
        outcomes = begin(self.client, address, keys, memory, seconds).wait()
        took = time.monotonic() - began
        self._last = memory, outcomes
        right = all(
            memory.page(i) == page_of(keys[i], byte_count)
            for i, outcome in enumerate(outcomes)
            if outcome is PageOutcome.OK
        )
        return {"outcomes": [o.name for o in outcomes], "right": right, "seconds": took}


def main() -> None:
    """The process."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # NIXL logs to stdout
    if sys.argv[1] == "serve":
        count, byte_count = map(int, sys.argv[2:])
        with serving(MemorySource(keys_of(count), byte_count), SHARE) as (server, address):
            answers.write(json.dumps({"address": address, "engines": server.engines}) + "\n")
            for _ in sys.stdin:
                answers.write(json.dumps(server.counts) + "\n")
        return
    reader = Reader()
    answers.write("{}\n")
    for line in sys.stdin:
        answers.write(json.dumps(reader.answer(json.loads(line))) + "\n")
    reader.client.close()


if __name__ == "__main__":
    main()
