"""Picture of a CSV in the form of ``results/replay-conversation-*.csv``: hit ratio over capacity.

.venv/bin/python benchmarks/replay_plot.py CSV SVG
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

NAMES = {"opt": "optimum (knows the future)", "default": "default", "lru": "LRU"}


def plot(source: Path, target: Path) -> None:
    """``source`` -> ``target`` (the suffix decides the format)."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "flexkv"  # the same picture from the same figures
    from matplotlib import pyplot as plt

    lines = [line for line in source.read_text().splitlines() if not line.startswith("#")]
    rows = list(csv.DictReader(lines))
    capacities = [int(row["capacity_pages"]) for row in rows]
    figure, axes = plt.subplots(figsize=(6, 4))
    for name, label in NAMES.items():
        axes.plot(capacities, [float(row[name]) for row in rows], marker="o", ms=4, label=label)
    axes.set_xscale("log")
    axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("capacity, pages")
    axes.set_ylabel("pages that are hits of a leading run")
    axes.legend()
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    plt.close(figure)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
