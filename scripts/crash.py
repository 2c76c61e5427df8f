"""Kill campaign and bit flips over the real store. docs/TESTING.md lists the findings."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path

from stores.crash_campaign import campaign
from stores.crash_ledger import Verdict
from stores.damage import flip_bits


def kill(directory: Path, args: argparse.Namespace) -> int:
    """Run the kill campaign; 1 if anything was found."""
    started = time.monotonic()
    tally = campaign(directory, args.kills, args.seed, args.scene)
    seconds = time.monotonic() - started
    total = {
        name: sum(getattr(verdict, name) for verdict in tally.verdicts.values())
        for name in (field.name for field in fields(Verdict))
    }
    total["wrong"] += tally.neighbour_wrong
    total["refused"] += tally.neighbour_refused
    result = {
        "kills": sum(tally.kills.values()),
        "seed": args.seed,
        "seconds": round(seconds, 1),
        **total,
        "neighbour_pages": tally.neighbour_pages,
        "failures": tally.failures,
        "by_scene": {name: asdict(verdict) for name, verdict in tally.verdicts.items()},
        "by_point": dict(sorted(tally.kills.items())),
    }
    print(json.dumps(result))
    return 1 if tally.bad() or tally.failures else 0


def flip(directory: Path, args: argparse.Namespace) -> int:
    """Flip bits, one at a time; 1 if a page was wrong, or missing for another reason than the flip."""
    started = time.monotonic()
    damage = flip_bits(directory / "flips", args.flips, args.seed)
    seconds = round(time.monotonic() - started, 1)
    print(json.dumps({**vars(damage), "seed": args.seed, "seconds": seconds}))
    return 1 if damage.wrong or damage.missing else 0


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="Kill children of the store, or flip bits in its files."
    )
    parser.add_argument("--kills", type=int, default=0, help="how many SIGKILLs")
    parser.add_argument("--flips", type=int, default=0, help="how many single-bit flips")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scene", default="", help="only scenes whose name contains this")
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="flexkv-crash-", dir=args.dir))
    status = kill(place, args) if args.kills else 0
    status |= flip(place, args) if args.flips else 0
    if not status:
        for left in sorted(place.rglob("*"), reverse=True):
            left.unlink() if left.is_file() else left.rmdir()
        place.rmdir()
    return status


if __name__ == "__main__":
    sys.exit(main())
