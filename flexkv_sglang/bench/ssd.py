"""SSD speed through the storage backend, beside fio, SGLang's ``file`` backend and NIXL POSIX, in one interleaved run.

``flexkv bench ssd`` and ``benchmarks/ssd.py`` are its two command lines. Each repetition runs all contenders in random
order, and each writes and then reads its pages, so that a noisy minute affects all of them; the result is the median
of the ratios within a repetition. All use the same host memory (``memory``), and fio uses our slot file. Contenders
with a file per page move 64 MiB of pages below 1 MiB, to save hours. Each contender writes and reads its pages once
before anything is timed (first writes into fresh extents are slower). Reads are cold: O_DIRECT, or the page cache is
dropped. A cache behind a virtual disk is not visible here. Contenders that are not installed are left out.
"""

from __future__ import annotations

import contextlib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexkv_sglang.bench.contenders import (
    BATCH,
    BenchPool,
    Contender,
    FileContender,
    FlexKVContender,
    MissingContender,
)
from flexkv_sglang.bench.memory import HostMemory
from flexkv_sglang.bench.peers import NIXL_PYTHON, FioContender, NixlContender

FEW_BYTES = 64 << 20
PAGE_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 8 << 20)
AGAINST = ("fio", "fio-plain", "file", "nixl")
"""Peers by the names of ``BenchOptions.against``."""
Row = dict[str, Any]


@dataclass(frozen=True)
class BenchOptions:
    """Settings of a run. ``mib``: MiB per pass, half of it below 1 MiB. ``seconds`` per page size: no repetition begins
    after that time, but one runs. ``verify``: our settings to measure; the ratios are those of "full"."""

    directory: Path
    page_bytes: Sequence[int] = PAGE_BYTES
    mib: int = 512
    reps: int = 7
    seconds: float | None = None
    against: Sequence[str] = AGAINST
    verify: Sequence[str] = ("full",)


def make_contenders(
    directory: Path, memory: HostMemory, pages: int, options: BenchOptions
) -> list[Contender]:
    """Our contenders, and those of the installed peers."""
    pool, page_bytes = BenchPool(memory), memory.page_bytes
    ours = [FlexKVContender(directory, pool, pages, mode) for mode in options.verify]
    found: list[Contender] = list(ours)
    slots = ours[0].slot_file
    few = pages if page_bytes >= 1 << 20 else min(pages, FEW_BYTES // page_bytes)
    makers: dict[str, list[Callable[[], Contender]]] = {
        "fio": [lambda: FioContender(slots, memory, pages, registered=True)],
        "fio-plain": [lambda: FioContender(slots, memory, pages, registered=False)],
        "file": [lambda: FileContender(directory, pool, few)],
        "nixl": [
            lambda: NixlContender(directory, memory, few, "aio"),
            lambda: NixlContender(directory, memory, few, "uring"),
        ],
    }
    for name in options.against:
        for make in makers[name]:
            try:
                found.append(make())
            except MissingContender as exc:
                say(f"{name} is left out: {exc}")
    return found


def run_size(directory: Path, page_bytes: int, options: BenchOptions, until: float) -> list[Row]:
    """All repetitions of one page size; at least one, and no new one after ``until`` (monotonic)."""
    total = (options.mib << 20) if page_bytes >= 1 << 20 else (options.mib << 19)
    pages = max(1, total // page_bytes)
    memory = HostMemory(page_bytes, min(BATCH, pages))
    contenders: list[Contender] = []
    rows: list[Row] = []
    try:
        contenders += make_contenders(directory, memory, pages, options)
        for contender in contenders[:]:
            try:
                contender.write(0)
                contender.read(0)
            except MissingContender as exc:
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
        memory.close()
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
    """The cases as text."""
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

    root = Path(__file__).resolve().parents[2]
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
        versions.append(FioContender.version())
    versions += [
        f"nixl-{path.name.split('-')[1].removesuffix('.dist')}" for path in _nixl_packages()
    ]
    machine = f"{platform.machine()} {os.cpu_count()} cpu linux-{platform.release()}"
    return {"machine": machine, "commit": commit, "versions": " ".join(versions)}


def _nixl_packages() -> list[Path]:
    return sorted(NIXL_PYTHON.parents[1].glob("lib/*/site-packages/nixl_cu12-*.dist-info"))


def say(text: str) -> None:
    """Print progress to stderr: stdout is for the result."""
    print(f"  {text}", file=sys.stderr, flush=True)


def measure(options: BenchOptions) -> tuple[list[Row], dict[str, Any]]:
    """(rows of all passes, their summary: ``ratio``, ``cases`` and ``about``)."""
    logging.disable(logging.WARNING)
    started = time.monotonic()
    rows: list[Row] = []
    options.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="flexkv-bench-") as place:
        for number, page_bytes in enumerate(options.page_bytes, 1):
            until = float("inf") if options.seconds is None else started + options.seconds * number
            rows += run_size(Path(place), page_bytes, options, until)
    say(f"took {time.monotonic() - started:.0f} s")
    return rows, summarise(rows) | {"about": environment()}
