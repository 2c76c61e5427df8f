"""Adapter-level SSD speed beside fio and SGLang's ``file`` backend, in one interleaved run.

    .venv/bin/python benchmarks/ssd.py --dir DIR [--mib 512] [--reps 7] [--out benchmarks/results/NAME.csv]

Every repetition runs all contenders in random order, so that a noisy minute hits them alike; what counts
is the median of the ratios within a repetition. Every contender writes its pages once before anything is
timed (first writes into fresh extents are slower for all). The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from contenders import Contender, File, Fio, FlexKV, PagePool

PAGE_KIB = (256, 1024, 4096)
FIELDS = (
    "page_kib",
    "direction",
    "contender",
    "rep",
    "gb_per_s",
    "cpu_s_per_gb",
    "ratio_to_fio",
    "machine",
    "commit",
    "versions",
)


def run_size(
    directory: Path, page_bytes: int, total_bytes: int, reps: int, verify: list[str]
) -> list[dict[str, Any]]:
    """All repetitions of one page size."""
    pages = total_bytes // page_bytes
    pool = PagePool(page_bytes, pages)
    contenders: list[Contender] = [FlexKV(directory, pool, pages, mode) for mode in verify]
    contenders += [File(directory, pool, pages), Fio(directory, page_bytes, pages)]
    rows: list[dict[str, Any]] = []
    try:
        for contender in contenders:
            contender.write(0)
        for rep in range(1, reps + 1):
            for direction in ("write", "read"):
                random.shuffle(contenders)
                for contender in contenders:
                    sample = getattr(contender, direction)(rep)
                    size = pages * page_bytes / 1e9
                    rows.append(
                        {
                            "page_kib": page_bytes >> 10,
                            "direction": direction,
                            "contender": contender.name,
                            "rep": rep,
                            "gb_per_s": round(size / sample.seconds, 4),
                            "cpu_s_per_gb": round(sample.cpu_seconds / size, 4),
                        }
                    )
            print(f"  {page_bytes >> 10} KiB: {rep} of {reps} done", file=sys.stderr, flush=True)
    finally:
        for contender in contenders:
            contender.close()
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each row's speed over fio's in the same repetition."""
    fio = {
        (r["page_kib"], r["direction"], r["rep"]): r["gb_per_s"]
        for r in rows
        if r["contender"] == "fio"
    }
    for row in rows:
        row["ratio_to_fio"] = round(
            row["gb_per_s"] / fio[row["page_kib"], row["direction"], row["rep"]], 4
        )


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of paired ratios: flexkv over fio and over file."""
    speed: dict[tuple[Any, ...], dict[int, float]] = defaultdict(dict)
    for row in rows:
        speed[row["page_kib"], row["direction"], row["contender"]][row["rep"]] = row["gb_per_s"]
    ratio: dict[str, Any] = {}
    for (kib, direction, contender), by_rep in speed.items():
        if contender == "flexkv":
            continue
        ours = speed[kib, direction, "flexkv"]
        pairs = sorted(ours[rep] / by_rep[rep] for rep in by_rep)
        ratio.setdefault(direction, {}).setdefault(contender, {})[str(kib)] = {
            "median": round(statistics.median(pairs), 3),
            "min": round(pairs[0], 3),
            "max": round(pairs[-1], 3),
        }
    return {
        "ratio": ratio,
        "gb_per_s": {
            f"{d} {c} {k}": round(statistics.median(v.values()), 3)
            for (k, d, c), v in sorted(speed.items())
        },
    }


def environment() -> dict[str, str]:
    """Machine, commit and versions for every row."""
    import numpy
    import xxhash

    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"],
        check=False,
        capture_output=True,
        text=True,
    ).stdout.strip()
    fio = subprocess.run(["fio", "--version"], check=True, capture_output=True, text=True).stdout
    machine = f"{platform.machine()} {os.cpu_count()} cpu linux-{platform.release()}"
    versions = (
        f"python-{platform.python_version()} numpy-{numpy.__version__} xxhash-{xxhash.VERSION}"
    )
    return {"machine": machine, "commit": commit, "versions": f"{versions} {fio.strip()}"}


def main() -> None:
    """Run, write the CSV, print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dir", type=Path, required=True, help="an empty place on the disk to measure"
    )
    parser.add_argument("--mib", type=int, default=512, help="data per pass")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument("--page-kib", type=int, nargs="+", default=list(PAGE_KIB))
    parser.add_argument(
        "--verify", nargs="+", default=["full", "off"], choices=["full", "sampled", "off"]
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.disable(logging.INFO)
    rows: list[dict[str, Any]] = []
    options.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as place:
        for kib in options.page_kib:
            rows += run_size(
                Path(place), kib << 10, options.mib << 20, options.reps, options.verify
            )
    add_ratios(rows)
    about = environment()
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    print(json.dumps(summarise(rows)))


if __name__ == "__main__":
    main()
