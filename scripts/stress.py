"""Stress of the neighbour protocol with several processes; docs/TESTING.md lists the findings."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

from stores.stress_run import stress


def main() -> int:
    """Command line; 1 if anything was found (the directory is kept then)."""
    parser = argparse.ArgumentParser(
        description="Processes on one directory read each other's pages while they are killed."
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    if args.processes < 2 or args.minutes <= 0:
        parser.error("at least 2 processes and some time are needed")
    logging.getLogger("flexkv_sglang").setLevel(logging.ERROR)
    place = Path(tempfile.mkdtemp(prefix="flexkv-stress-", dir=args.dir))
    report = stress(place, args.minutes * 60, args.processes, args.seed)
    if report.bad():
        sys.stdout.write(f"findings: directory kept: {place}\n")
    else:
        shutil.rmtree(place)
    print(json.dumps({"ok": not report.bad(), "seed": args.seed, **report.summary()}))
    return 1 if report.bad() else 0


if __name__ == "__main__":
    sys.exit(main())
