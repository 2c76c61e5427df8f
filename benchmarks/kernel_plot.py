"""Picture of a run of ``kernels.py``: speed over chunk size, few programs, the loss of a matmul."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """``rows`` as ``kernels.py`` makes them -> ``path`` (the suffix decides the format)."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "flexkv"  # the same picture from the same figures
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5))
    copies = [row for row in rows if row["phase"] == "copies" and "of_ceiling" in row]
    for name in sorted({row["contender"] for row in copies}):
        mine = [row for row in copies if row["contender"] == name]
        left.scatter(
            [row["chunk_bytes"] / 1024 for row in mine],
            [row["of_ceiling"] for row in mine],
            label=name,
            s=14,
        )
    left.axhline(0.8, color="gray", lw=0.8, ls="--")
    left.set(xlabel="chunk, KiB", ylabel="of the device copy", xscale="log")
    left.legend(fontsize=7)
    quotas = [row for row in rows if row["phase"] == "quota" and row["quota"]]
    for name in sorted({row["geometry"] for row in quotas}):
        mine = [row for row in quotas if row["geometry"] == name]
        programs = [row["quota"] for row in mine]
        middle.plot(programs, [row["of_ceiling"] for row in mine], marker="o", label=name)
        right.plot(programs, [row["matmul_slowdown"] for row in mine], marker="o", label=name)
    middle.axhline(2, color="gray", lw=0.8, ls="--")
    middle.set(xlabel="programs", ylabel="of the pinned copy to the device", xscale="log")
    right.set(xlabel="programs", ylabel="matmul loop: time beside / alone", xscale="log")
    middle.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
