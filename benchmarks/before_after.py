"""This checkout beside an older commit: reads, writes and lookups of 128 pages, in interleaved pairs.

    .venv/bin/python benchmarks/before_after.py --before cddbd3a --dir DIR [--pairs 15] [--out benchmarks/results/X.csv]

Each side is a process of its own that imports its own tree and uses nothing but ``FlexKVStorage``. They take turns,
and the side that begins changes with each pair, so a slow minute of the machine meets both. Wall and CPU
milliseconds are per call of 128 pages. The last line printed is one JSON object: the median of after / before, with
the lowest and the highest pair.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES, CALLS, LOOKUPS = 128, 8, 400
CASES = (("shm", 64), ("disk", 256), ("disk", 1024))
FIELDS = ("case", "page_kib", "operation", "figure", "pair", "before_ms", "after_ms", "ratio")


class Side:
    """One tree in a process of its own."""

    def __init__(self, tree: Path, directory: Path, page_kib: int) -> None:
        site = Path(tempfile.mkdtemp(prefix="flexkv-site-"))
        (site / "flexkv_sglang").symlink_to(tree / "flexkv_sglang")
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-W",
                "ignore",
                __file__,
                "--child",
                str(directory),
                str(page_kib),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(site), "SGLANG_USE_CPU_ENGINE": "1"},
        )
        imported = self._line()
        assert Path(imported).resolve().is_relative_to(tree.resolve()), imported

    def ask(self, operation: str, generation: int) -> list[float]:
        """Wall and CPU milliseconds per call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{operation} {generation}\n")
        self._process.stdin.flush()
        return [float(word) for word in self._line().split()]

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        while line and not line.startswith("> "):  # log lines of the libraries
            line = self._process.stdout.readline()
        assert line, "a side ended"
        return line[2:].strip()

    def close(self) -> None:
        """End the process; it removes its pages."""
        self._process.communicate("end 0\n", timeout=120)


def child(directory: str, page_kib: int) -> None:
    """Read lines "operation generation", print wall and CPU milliseconds per call."""
    import torch
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

    import flexkv_sglang
    from flexkv_sglang import FlexKVStorage

    half = page_kib * 512

    class HostPool:
        layout, dtype, start_layer, layer_num, page_size = "page_first", torch.bfloat16, 0, 1, 64
        kv_buffer = torch.randint(0, 255, (2 * half * PAGES,), dtype=torch.uint8)

        def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
            k = [self.kv_buffer.data_ptr() + t // 64 * half for t in indices.tolist()[::64]]
            both = [address for a in k for address in (a, a + half * PAGES)]
            return both, [half] * len(both)

    names = ("tp_rank", "pp_rank", "attn_cp_rank"), ("tp_size", "pp_size", "attn_cp_size")
    extra = {"path": directory, "size": CALLS * PAGES * (2 * half + 4096), "model_id": "bench"}
    settings = {**dict.fromkeys(names[0], 0), **dict.fromkeys(names[1], 1)}
    storage = FlexKVStorage(
        HiCacheStorageConfig(
            **settings,
            is_mla_model=False,
            enable_storage_metrics=False,
            is_page_first_layout=True,
            model_name="bench",
            extra_config=extra,
        )
    )
    storage.register_mem_pool_host(HostPool())
    tokens = torch.arange(PAGES * 64)
    print(f"> {flexkv_sglang.__file__}", flush=True)
    for line in sys.stdin:
        operation, generation = line.split()
        if operation == "end":
            break
        chains = [
            [f"{int(generation):032x}{call * PAGES + i:032x}" for i in range(PAGES)]
            for call in range(CALLS)
        ]
        if operation == "write":
            storage.clear()
        wall, cpu = time.perf_counter(), time.process_time()
        if operation == "lookup":
            assert all(storage.batch_exists(chains[0]) == PAGES for _ in range(LOOKUPS))
        else:
            move = storage.batch_set_v1 if operation == "write" else storage.batch_get_v1
            assert all(all(move(keys, tokens)) for keys in chains), "a page was not moved"
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        calls = LOOKUPS if operation == "lookup" else CALLS
        print(f"> {wall / calls * 1e3} {cpu / calls * 1e3}", flush=True)
    storage.close()


def run_case(
    before: Path, place: Path, page_kib: int, pairs: int
) -> dict[str, list[tuple[float, ...]]]:
    """ "operation figure" -> (before, after) per pair."""
    found: dict[str, list[tuple[float, ...]]] = {}
    sides = [Side(tree, place / name, page_kib) for name, tree in (("b", before), ("a", ROOT))]
    for generation in range(pairs + 1):
        for operation in ("write", "read", "lookup"):
            order = sides if generation % 2 else sides[::-1]
            answers = {side: side.ask(operation, generation) for side in order}
            for position, figure in enumerate(("wall", "cpu")):
                pair = tuple(answers[side][position] for side in sides)
                if generation:  # the first writes to new slots
                    found.setdefault(f"{operation} {figure}", []).append(pair)
    for side in sides:
        side.close()
    return found


def main() -> None:
    """Parse arguments, run all cases, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--before", required=True, help="a commit of this repository")
    parser.add_argument("--dir", required=True, help="a directory on the disk to measure")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows, summary = [], {}
    with tempfile.TemporaryDirectory(prefix="flexkv-before-") as folder:
        archive = subprocess.run(
            ["git", "-C", str(ROOT), "archive", options.before], check=True, capture_output=True
        )
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        for case, page_kib in CASES:
            parent = "/dev/shm" if case == "shm" else options.dir
            with tempfile.TemporaryDirectory(prefix="flexkv-pairs-", dir=parent) as place:
                found = run_case(Path(folder), Path(place), page_kib, options.pairs)
            for name, measured in found.items():
                ratios = [after / before for before, after in measured]
                summary[f"{case} {page_kib} KiB {name}"] = [
                    round(value, 3)
                    for value in (statistics.median(ratios), min(ratios), max(ratios))
                ]
                print(f"{case} {page_kib} KiB {name}: {summary[f'{case} {page_kib} KiB {name}']}")
                rows += [
                    (case, page_kib, *name.split(), number, f"{b:.4f}", f"{a:.4f}", f"{a / b:.4f}")
                    for number, (b, a) in enumerate(measured, 1)
                ]
            if options.out:  # after each case: a run takes some minutes
                write_rows(options.out, options.before, rows)
    print(json.dumps(summary))


def write_rows(path: Path, before: str, rows: list[tuple[Any, ...]]) -> None:
    """Write the CSV with machine, versions and both commits in each row."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    machine = f"{platform.machine()} {os.cpu_count()} cpu linux-{platform.release()}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*FIELDS, "machine", "versions", "commit_before", "commit_after"])
        for row in rows:
            writer.writerow([*row, machine, f"python-{platform.python_version()}", before, commit])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], int(sys.argv[3]))
    else:
        main()
