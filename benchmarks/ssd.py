"""Adapter-level SSD speed beside fio, SGLang's ``file`` backend and NIXL POSIX, in one interleaved run.

    .venv/bin/python benchmarks/ssd.py --dir DIR [--page-bytes 1048576 ...] [--against fio,file,nixl]
        [--reps 7] [--seconds S] [--out NAME.csv] [--plot NAME.svg] [--beside busy]

Every repetition runs all contenders in random order, each writes and then reads what it wrote, so that a
noisy minute hits them alike; what counts is the median of the ratios within a repetition. fio works in our
slot file. Contenders with a file per page move 64 MiB of pages below 1 MiB, else it would take hours.
Every contender writes and reads its pages once before anything is timed (first writes into fresh extents
are slower for all). Cold reads: O_DIRECT, or the page cache dropped. Whether the disk behind a virtual
machine is cached is out of our sight. The last line printed is one JSON object: ``ratio`` is ours /
theirs. Contenders that are not installed are left out.
"""

from __future__ import annotations

import argparse
import contextlib
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
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beside import beside_busy
from contenders import Contender, File, FlexKV, Missing, PagePool
from peers import Fio, Nixl

FEW_BYTES = 64 << 20
PAGE_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20)
AGAINST = ("fio", "fio-plain", "file", "nixl")
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
Row = dict[str, Any]


def make_contenders(
    directory: Path, page_bytes: int, pages: int, options: argparse.Namespace
) -> list[Contender]:
    """Ours, and those of the peers that are there."""
    pool = PagePool(page_bytes, pages)
    ours = [FlexKV(directory, pool, pages, mode) for mode in options.verify]
    found: list[Contender] = list(ours)
    slots = ours[0].slot_file
    few = pages if page_bytes >= 1 << 20 else min(pages, FEW_BYTES // page_bytes)
    makers: dict[str, list[Callable[[], Contender]]] = {
        "fio": [lambda: Fio(slots, page_bytes, pages, registered=True)],
        "fio-plain": [lambda: Fio(slots, page_bytes, pages, registered=False)],
        "file": [lambda: File(directory, pool, few)],
        "nixl": [
            lambda: Nixl(directory, page_bytes, few, "aio"),
            lambda: Nixl(directory, page_bytes, few, "uring"),
        ],
    }
    for name in options.against:
        for make in makers[name]:
            try:
                found.append(make())
            except Missing as exc:
                say(f"{name} is left out: {exc}")
    return found


def run_size(
    directory: Path, page_bytes: int, options: argparse.Namespace, until: float
) -> list[Row]:
    """All repetitions of one page size; at least one, and no new one after ``until`` (monotonic)."""
    total = (options.mib << 20) if page_bytes >= 1 << 20 else (options.mib << 19)
    pages = max(1, total // page_bytes)
    contenders = make_contenders(directory, page_bytes, pages, options)
    rows: list[Row] = []
    try:
        for contender in contenders[:]:
            try:
                contender.write(0)
                contender.read(0)
            except Missing as exc:
                contenders.remove(contender)
                say(f"{contender.name} is left out: {exc}")
                contender.close()
        for rep in range(1, options.reps + 1):
            random.shuffle(contenders)
            for contender in contenders:
                size = contender.pages * page_bytes / 1e9
                for direction in ("write", "read"):
                    sample = getattr(contender, direction)(rep)
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
            say(f"{page_bytes >> 10} KiB: repetition {rep} of {options.reps} done")
            if time.monotonic() > until:
                break
    finally:
        for contender in contenders:
            contender.close()
    return rows


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Medians and ranges: speeds, CPU per GB, and ours / theirs within a repetition."""
    speed: dict[tuple[int, str, str], dict[int, float]] = defaultdict(dict)
    cpu: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for row in rows:
        case = row["page_kib"], row["direction"], row["contender"]
        speed[case][row["rep"]] = row["gb_per_s"]
        cpu[case].append(row["cpu_s_per_gb"])
    cases: list[Row] = []
    for (kib, direction, contender), by_rep in sorted(speed.items()):
        ours = speed[kib, direction, "flexkv"]
        cases.append(
            {
                "page_kib": kib,
                "direction": direction,
                "contender": contender,
                "gb_per_s": _spread(list(by_rep.values())),
                "cpu_s_per_gb": round(statistics.median(cpu[kib, direction, contender]), 4),
                "ours_over_theirs": _spread([ours[rep] / by_rep[rep] for rep in by_rep]),
            }
        )
    return {"ratio": _ratios(cases), "cases": cases}


def _ratios(cases: list[Row]) -> dict[str, dict[str, Any]]:
    """``{direction: {peer: median}}``; by page bytes where there are several. ``nixl``: its better engine."""
    several = len({case["page_kib"] for case in cases}) > 1
    found: dict[str, dict[str, Any]] = {"read": {}, "write": {}}
    for case in cases:
        name, value = case["contender"], case["ours_over_theirs"]["median"]
        if name == "flexkv":
            continue
        for label in {name, "nixl" if name.startswith("nixl-") else name}:
            of_peer = found[case["direction"]].setdefault(label, {})
            page = str(case["page_kib"] << 10)
            of_peer[page] = min(value, of_peer.get(page, value))
    if several:
        return found
    return {
        direction: {peer: next(iter(by_page.values())) for peer, by_page in peers.items()}
        for direction, peers in found.items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


def table(cases: list[Row]) -> str:
    """For people."""
    lines = [
        f"{'KiB':>5} {'':5} {'contender':18} {'GB/s [min-max]':20} {'CPU s/GB':>8}  ours/theirs"
    ]
    for case in cases:
        gb, ratio = case["gb_per_s"], case["ours_over_theirs"]
        lines.append(
            f"{case['page_kib']:>5} {case['direction']:5} {case['contender']:18} "
            f"{gb['median']:5.2f} [{gb['min']:.2f}-{gb['max']:.2f}]{'':5} {case['cpu_s_per_gb']:8.3f}  "
            f"{ratio['median']:.2f} [{ratio['min']:.2f}-{ratio['max']:.2f}]"
        )
    return "\n".join(lines)


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
    versions = [
        f"python-{platform.python_version()}",
        f"numpy-{numpy.__version__}",
        f"xxhash-{xxhash.VERSION}",
    ]
    with contextlib.suppress(OSError):
        versions.append(Fio.version())
    versions += [path.name.split("-")[1] for path in _nixl_packages()]
    machine = f"{platform.machine()} {os.cpu_count()} cpu linux-{platform.release()}"
    return {"machine": machine, "commit": commit, "versions": " ".join(versions)}


def _nixl_packages() -> list[Path]:
    from peers import NIXL_PYTHON

    return sorted(NIXL_PYTHON.parents[1].glob("lib/*/site-packages/nixl_cu12-*.dist-info"))


def say(what: str) -> None:
    """Progress goes to stderr: stdout is for the result."""
    print(f"  {what}", file=sys.stderr, flush=True)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ssd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path(), help="a place on the disk to measure")
    parser.add_argument("--page-bytes", type=int, nargs="+", default=list(PAGE_BYTES))
    parser.add_argument("--mib", type=int, default=512, help="per pass; half of it below 1 MiB")
    parser.add_argument("--reps", type=int, default=7)
    parser.add_argument(
        "--seconds", type=float, help="begin no repetition after this time; one at least"
    )
    parser.add_argument(
        "--against", type=lambda text: text.split(","), default=list(AGAINST), metavar="A,B"
    )
    parser.add_argument("--verify", nargs="+", default=["full"], choices=["full", "sampled", "off"])
    parser.add_argument("--beside", choices=["busy"], help="and a busy Python thread, at 1 MiB")
    parser.add_argument("--json", action="store_true", help="no table, the JSON line only")
    parser.add_argument("--out", type=Path, help="CSV with all rows")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    options = parser.parse_args(argv)
    unknown = set(options.against) - set(AGAINST)
    if unknown:
        parser.error(f"--against: {', '.join(sorted(unknown))}. Valid: {', '.join(AGAINST)}")
    if "full" not in options.verify:
        parser.error("--verify: full is what the ratios are about; name others beside it")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write CSV and plot, print the summary. Returns the exit status."""
    options = _options(argv)
    logging.disable(logging.WARNING)
    started = time.monotonic()
    rows: list[Row] = []
    options.dir.mkdir(parents=True, exist_ok=True)
    beside: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="flexkv-bench-") as place:
        for number, page_bytes in enumerate(options.page_bytes, 1):
            share = number / len(options.page_bytes)
            until = float("inf") if options.seconds is None else started + options.seconds * share
            rows += run_size(Path(place), page_bytes, options, until)
        if options.beside:
            say("beside a busy Python thread")
            beside = {"beside_busy": beside_busy(Path(place), options.reps)}
    about = environment()
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows({**row, **about} for row in rows)
    summary = summarise(rows) | beside | {"about": about}
    if options.plot:
        from ssd_plot import plot

        plot(summary["cases"], options.plot, f"{about['machine']}, {about['commit']}")
    say(f"took {time.monotonic() - started:.0f} s")
    if not options.json:
        print(table(summary["cases"]))
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
