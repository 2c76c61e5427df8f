"""One side of a read through a real RDMA transport, in a process of that transport's own environment.

``rdma_node.py ENGINE serve COUNT BYTES``: a page server; ``{"op": "counts"}`` on stdin answers its counts.
``rdma_node.py ENGINE read``: a client; ``{"op": "read", "address": a, "count": n, "bytes": b, "seconds": s}`` answers
outcomes, ``right`` (every OK page is), and seconds; with ``"pid"`` and ``"signal"`` that process gets that signal
after the offer and before the fetch, with ``"behind"`` after the fetch has begun. ``{"op": "touched"}``: the pages of
the last read that are not OK and were written to. ``{"op": "state"}``: free bytes of its slab, and its counters. Ends
at the end of input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from typing import Any

from flexkv_sglang.backends.fleet.reader.client import PeerClient
from flexkv_sglang.backends.fleet.reader.read import PageOutcome
from flexkv_sglang.config.share import ShareConfig
from nodes.page_servers import begin, serving
from nodes.page_sources import MemorySource, PageMemory, keys_of, page_of


class Reader:
    """The client's process."""

    def __init__(self, share: ShareConfig) -> None:
        self.counts: Counter[str] = Counter()
        self.client = PeerClient(share, self._count)
        self._last: tuple[PageMemory, list[PageOutcome]] | None = None

    def _count(self, name: str, amount: int) -> None:
        self.counts[name] += amount

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One line of the protocol."""
        if asked["op"] == "read":
            if "pid" in asked:
                self._harm(asked["pid"], asked["signal"], asked.get("behind", False))
            return self._read(asked["address"], asked["count"], asked["bytes"], asked["seconds"])
        if asked["op"] == "touched":
            assert self._last is not None
            memory, outcomes = self._last
            bad = [i for i, outcome in enumerate(outcomes) if outcome is not PageOutcome.OK]
            return {"touched": [i for i in bad if not memory.untouched(i)]}
        transport = self.client._rdma
        assert transport is not None
        return {"free": transport.free_bytes, **self.counts}

    def _harm(self, pid: int, number: int, behind: bool) -> None:
        """Signal the server before the next fetch, or with ``behind`` just after its start."""
        transport = self.client._rdma
        assert transport is not None
        start = transport.start

        def harmed(*arguments: Any) -> None:
            transport.start = start  # type: ignore[method-assign]
            if behind:
                start(*arguments)
            os.kill(pid, number)
            if not behind:
                start(*arguments)

        transport.start = harmed  # type: ignore[method-assign]

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
    os.dup2(2, 1)  # engines log to stdout
    share = ShareConfig(listen="127.0.0.1:0", engine=sys.argv[1])
    if sys.argv[2] == "serve":
        count, byte_count = map(int, sys.argv[3:])
        with serving(MemorySource(keys_of(count), byte_count), share) as (server, address):
            answers.write(json.dumps({"address": address, "engines": server.transports}) + "\n")
            for _ in sys.stdin:
                answers.write(json.dumps(server.counts) + "\n")
        return
    reader = Reader(share)
    answers.write("{}\n")
    for line in sys.stdin:
        answers.write(json.dumps(reader.answer(json.loads(line))) + "\n")
    reader.client.close()


if __name__ == "__main__":
    main()
