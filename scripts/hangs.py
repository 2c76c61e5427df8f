"""Campaign of hangs: one of two directories freezes at random times under load; docs/TESTING.md lists the findings."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from pathlib import Path

from stores.hang_run import hang_campaign
from stores.hanging_mount import why_not


def main() -> int:
    """Command line; 1 if anything was found."""
    parser = argparse.ArgumentParser(description="One of two directories hangs under load.")
    parser.add_argument("--freezes", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    if why_not():
        parser.error(why_not())
    logging.getLogger("flexkv_sglang").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="flexkv-hangs-", dir=args.dir) as place:
        report = hang_campaign(Path(place), args.freezes, args.seed)
    print(json.dumps({"ok": not report.findings, "seed": args.seed, **report.summary()}))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
