"""Gather and scatter beside the ceilings of the same GPU: speed, speed with few multiprocessors, disturbance.

    .venv/bin/python benchmarks/kernels.py [--out results/kernels-DATE.csv]       # needs a GPU, under 3 minutes
    .venv/bin/python benchmarks/kernels.py --device cpu --mib 8                    # only: does it run?

1. Ceilings: device copy, pinned copies to the device, from it, both ways.
2. Every geometry and page size, correctness first: a wrong byte ends the run and no speed is printed. Then gather,
   scatter and the baselines, interleaved, the whole table twice.
3. Few programs (``quota``), and the loss of a matmul loop meanwhile.
4. Gather and one DMA per block, double buffered, against the plain pinned copy, both ways.

GB/s count the payload once; a device copy is counted the same way, so ratios are fair. Exit status: 0 done, 1 a wrong
byte, 3 no GPU. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch

from flexkv_sglang.bench.ssd import environment
from flexkv_sglang.triton_kernels.dispatch import runs_kernels
from kernel_cases import GEOMETRIES, PAGE_SIZES, Device
from kernel_phases import (
    Row,
    Run,
    WrongBytesError,
    measure_ceilings,
    measure_copies,
    measure_quotas,
    measure_staging,
)
from kernel_plot import plot

NO_GPU = 3


def judge(rows: list[Row]) -> dict[str, Any]:
    """The targets of docs/KERNELS.md that this run can judge."""

    def worst(phase: str, names: tuple[str, ...], least_chunk: int = 0) -> float | None:
        found = [
            row["of_ceiling"]
            for row in rows
            if row["phase"] == phase
            and row["contender"] in names
            and row.get("chunk_bytes", 0) >= least_chunk
            and (phase != "quota" or 0 < row["quota"] <= 16)
        ]
        return (max if phase == "quota" else min)(found, default=None)

    return {
        "gather and scatter of d2d, chunks from 16 KiB (0.8 wanted)": worst(
            "copies", ("gather", "scatter"), 16 << 10
        ),
        "gather with 16 programs of h2d (2 wanted)": worst("quota", ("gather",)),
        "staged of the plain copy (0.9 wanted)": worst("staged", ("offload", "restore")),
    }


def measure(run: Run) -> dict[str, Any]:
    """All phases; the summary."""
    with torch.inference_mode():
        for phase in (measure_ceilings, measure_copies, measure_quotas, measure_staging):
            phase(run)
    if not run.device.is_gpu:
        return {"ceilings": run.ceilings}  # nothing to judge
    return {"targets": judge(run.rows), "ceilings": run.ceilings}


def write_rows(rows: list[Row], path: Path, about: dict[str, str]) -> None:
    """The CSV, machine and versions in every row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, *about])
        writer.writeheader()
        writer.writerows(row | about for row in rows)


def about_device(run: Run) -> dict[str, str]:
    """Fields about the machine, for every row."""
    kernels = runs_kernels(run.device.device)
    versions = [f"torch-{torch.__version__}"]
    if kernels:
        import triton

        versions.append(f"triton-{triton.__version__}")
    name = (
        torch.cuda.get_device_name(run.device.device)
        if run.device.is_gpu
        else "cpu, no measurement"
    )
    about = environment()
    about["versions"] = " ".join([about["versions"], *versions])
    return about | {"device": name, "served_by": "triton" if kernels else "torch"}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write CSV and picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to see that it runs")
    parser.add_argument("--mib", type=int, default=4096, help="payload of one pass")
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--matmul", type=int, help="side of the matrices: 8192, on a CPU 64")
    parser.add_argument("--out", type=Path, help="CSV; a picture of the same name is put beside it")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print("no GPU here: nothing was measured (--device cpu only shows that this runs)")
        return NO_GPU
    run = Run(
        Device(options.device),
        options.mib << 20,
        options.reps,
        options.matmul or (64 if options.device == "cpu" else 8192),
        GEOMETRIES,
        PAGE_SIZES,
    )
    try:
        summary = measure(run)
    except WrongBytesError as error:
        print(f"WRONG BYTES, no speeds: {error}")
        return 1
    about = about_device(run)
    if options.out:
        write_rows(run.rows, options.out, about)
        plot(run.rows, options.out.with_suffix(".svg"), about["device"])
    for row in run.rows:
        print(" ".join(f"{name}={value}" for name, value in row.items() if value != ""))
    print(json.dumps(about | summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
