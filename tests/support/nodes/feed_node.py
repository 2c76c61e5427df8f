"""A node in a process of its own, controlled by lines of JSON: ``feed_node.py SHARE NID``.

It answers each line with the size of its copy of a peer's set and the time each page came (CLOCK_MONOTONIC).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support


from flexkv_sglang.backends.fleet.vocabulary import NodeId, Op
from flexkv_sglang.config.share import ShareConfig
from flexkv_sglang.types import U64
from nodes.fleet_bed import NS, MemorySets, WireNode, fingerprints


class Stamped(MemorySets):
    """Records when each page came."""

    def apply(self, namespace: str, node_id: NodeId, op: Op, keys: U64) -> None:
        super().apply(namespace, node_id, op, keys)
        now = time.monotonic()
        for key in keys.tolist():
            seen[key] = now


seen: dict[int, float] = {}


def main() -> None:
    """Until the input ends."""
    share = ShareConfig(**json.loads(sys.argv[1]))
    node = WireNode(share, sys.argv[2])
    node.peer_sets = Stamped()
    node.meet(share)
    print(json.dumps({"address": node.address}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        node.logs.log(NS).add(fingerprints(*ask.get("add", ())))
        held = node.holds(ask["peer"])
        answer = {
            "held": None if held is None else len(held),
            "status": node.membership and node.membership.status(),
        }
        if ask.get("seen"):
            answer["seen"] = seen
        print(json.dumps(answer), flush=True)
    node.close()


if __name__ == "__main__":
    main()
