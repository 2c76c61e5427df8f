"""Stateful random test of the engine with faults and races; ``tests/support/stores/soak_run.py`` lists the invariants.

Then random prefixes of hybrid models, folded by us and by SGLang's ``HiCacheFile``:
``tests/support/models/fold_oracle.py``.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from models.fold_oracle import compare_with_hicache_file
from stores.soak_run import soak


def main() -> int:
    """Command line; 1 if a problem was found (the directory is kept then)."""
    parser = argparse.ArgumentParser(
        description="Random steps against a model, with a faulty I/O engine."
    )
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--folds", type=int, default=20_000, help="prefixes of hybrid models")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--dir", type=Path, help="where to work (default: a temporary directory)")
    args = parser.parse_args()
    logging.getLogger("flexkv_sglang").setLevel(logging.CRITICAL)  # the faults are ours
    place = Path(tempfile.mkdtemp(prefix="flexkv-soak-", dir=args.dir))
    started = time.monotonic()
    report = soak(place, args.steps, args.seed)
    report.problems += compare_with_hicache_file(args.folds, args.seed)
    seconds = round(time.monotonic() - started, 1)
    if not report.problems:
        shutil.rmtree(place)
    print(json.dumps({**vars(report), "folds": args.folds, "seed": args.seed, "seconds": seconds}))
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
