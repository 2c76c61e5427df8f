"""Fuzzed messages in bulk; ``tests/support/nodes/wire_fuzz.py`` makes them.

Half go to the decoders, half to a server."""

from __future__ import annotations

import argparse
import json
import logging
import sys

from nodes.wire_fuzz import fuzz_decoders, fuzz_server, memory_bytes

MEMORY_GROWTH_KIB = 64 << 10


def main() -> int:
    """Command line; 1 if an honest client was not served or memory grew. A crash is a crash."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logging.getLogger("flexkv_sglang").setLevel(logging.ERROR)
    decoded = fuzz_decoders(args.messages // 4, args.seed)  # each to both decoders
    served = fuzz_server(args.messages // 2, args.seed + 1)
    good = bool(served["served"]) and served["grown_kib"] < MEMORY_GROWTH_KIB
    report = {"ok": good, "seed": args.seed, **decoded, **served, "rss_mib": memory_bytes() >> 20}
    print(json.dumps(report))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
