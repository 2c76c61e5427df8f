"""SSD speed of the storage backend beside its peers, for the committed results (``flexkv_sglang.bench.ssd`` measures).

    .venv/bin/python benchmarks/ssd.py --dir DIR [--page-bytes 1048576 ...] [--against fio,file,nixl]
        [--reps 7] [--seconds S] [--out NAME.csv] [--plot NAME.svg] [--beside busy]

Run it from the checkout (NIXL is looked for in .venv-nixl, made by scripts/setup-nixl). The last line
printed is one JSON object: ``ratio`` is ours / theirs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from flexkv_sglang.bench.ssd import AGAINST, PAGE_BYTES, BenchOptions, measure, table
from ssd_beside import beside_busy
from ssd_plot import plot

FIELDS = (
    "page_kib",
    "direction",
    "contender",
    "rep",
    "gb_per_s",
    "cpu_s_per_gb",
    "machine",
    "commit",
    "versions",
)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ssd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="a place on the disk to measure")
    parser.add_argument("--page-bytes", type=int, nargs="+", default=list(PAGE_BYTES))
    parser.add_argument("--mib", type=int, default=512, help="per pass; half of it below 1 MiB")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, help="per page size: begin no repetition after it; one at least"
    )
    parser.add_argument("--against", type=lambda text: text.split(","), default=list(AGAINST))
    parser.add_argument("--verify", nargs="+", default=["full"], choices=["full", "sampled", "off"])
    parser.add_argument("--beside", choices=["busy"], help="and a busy Python thread, at 1 MiB")
    parser.add_argument("--json", action="store_true", help="no table, the JSON line only")
    parser.add_argument("--out", type=Path, help="CSV with all rows")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    given = parser.parse_args(argv)
    if unknown := set(given.against) - set(AGAINST):
        parser.error(f"--against: {', '.join(sorted(unknown))}. Valid: {', '.join(AGAINST)}")
    if "full" not in given.verify:
        parser.error("--verify: full is what the ratios are about; name others beside it")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write CSV and plot, print the summary. Returns the exit status."""
    given = _arguments(argv)
    rows, summary = measure(
        BenchOptions(
            given.dir,
            given.page_bytes,
            given.mib,
            given.reps,
            given.seconds,
            given.against,
            given.verify,
        )
    )
    if given.beside:
        with tempfile.TemporaryDirectory(dir=given.dir, prefix="flexkv-bench-") as place:
            summary["beside_busy"] = beside_busy(Path(place), given.reps)
    about = summary["about"]
    if given.out:
        with given.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    if given.plot:
        plot(summary["cases"], given.plot, f"{about['machine']}, {about['commit']}")
    if not given.json:
        print(table(summary["cases"]))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
