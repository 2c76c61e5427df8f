"""Picture of a run of ``ssd.py``: speed and CPU per page size, medians with their range."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(cases: list[dict[str, Any]], path: Path, title: str) -> None:
    """``cases`` as ``ssd.summarise`` makes them -> ``path`` (the suffix decides the format)."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "flexkv"  # the same picture from the same figures
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    names = sorted({case["contender"] for case in cases}, key=lambda name: (name != "flexkv", name))
    for column, direction in enumerate(("write", "read")):
        for name in names:
            mine = [c for c in cases if (c["contender"], c["direction"]) == (name, direction)]
            pages = [c["page_kib"] for c in mine]
            speed = [c["gb_per_s"]["median"] for c in mine]
            low = [m - c["gb_per_s"]["min"] for m, c in zip(speed, mine, strict=True)]
            high = [c["gb_per_s"]["max"] - m for m, c in zip(speed, mine, strict=True)]
            width = 2.5 if name == "flexkv" else 1.2
            axes[0][column].errorbar(
                pages, speed, yerr=[low, high], label=name, marker="o", ms=4, lw=width, capsize=2
            )
            axes[1][column].plot(
                pages, [c["cpu_s_per_gb"] for c in mine], label=name, marker="o", ms=4, lw=width
            )
        axes[0][column].set_title(f"{direction}{' (cold)' if direction == 'read' else ''}")
        axes[1][column].set_xscale("log", base=2)
        axes[1][column].set_yscale("log")
        ticks = sorted({case["page_kib"] for case in cases})
        axes[1][column].set_xticks(ticks, [str(t) for t in ticks])
        axes[1][column].set_xlabel("page, KiB")
    axes[0][0].set_ylabel("GB/s, median [min-max]")
    axes[1][0].set_ylabel("CPU s/GB, median")
    axes[0][1].legend(fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
