"""``benchmarks/kernels.py`` on the CPU: all of it runs, with tiny sizes and no meaning of its speeds."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kernel_phases
import kernels
from flexkv_sglang.triton_kernels.ops import PtrTable
from kernel_cases import GEOMETRIES, Device, Geometry, Pool, Timing
from kernel_phases import Run, WrongBytesError

TINY = (Geometry("tiny", 4, 64), Geometry("odd", 3, 48))


@pytest.fixture
def tiny_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Geometries and page sizes of a few kilobytes."""
    monkeypatch.setattr(kernels, "GEOMETRIES", TINY)
    monkeypatch.setattr(kernels, "PAGE_SIZES", (1, 16))
    monkeypatch.setattr(kernel_phases, "QUOTAS", (1, 16))


def run_it(*arguments: str) -> int:
    return kernels.main(
        ["--device", "cpu", "--mib", "1", "--reps", "2", "--matmul", "8", *arguments]
    )


def test_the_whole_run(tiny_run: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.csv"
    assert run_it("--out", str(out)) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(summary["ceilings"]) == {"d2d", "h2d", "d2h", "both ways"}
    assert summary["device"] == "cpu, no measurement"
    assert summary["served_by"] == "torch"
    assert "targets" not in summary
    with out.open() as file:
        rows = list(csv.DictReader(file))
    copies = {
        (r["geometry"], r["page_size"], r["contender"], r["turn"])
        for r in rows
        if r["phase"] == "copies" and not r["missing"]
    }
    names = ("gather", "scatter", "index_select", "copies")
    assert copies == {
        (g.name, p, name, turn)
        for g in TINY
        for p in ("1", "16")
        for name in names
        for turn in "12"
    }
    assert {r["missing"] for r in rows if r["contender"] == "batched copies"} == {"no CUDA device"}
    assert {r["quota"] for r in rows if r["phase"] == "quota"} == {"1", "16", "0"}
    assert {r["contender"] for r in rows if r["phase"] == "staged"} == {"offload", "restore"}
    assert all(r["commit"] and r["machine"] and "torch-" in r["versions"] for r in rows)
    assert out.with_suffix(".svg").stat().st_size > 1000


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == kernels.NO_GPU == 3
    assert "nothing was measured" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["gather_pages", "scatter_pages"])
def test_a_wrong_byte_ends_the_run_without_speeds(
    broken: str, tiny_run: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = getattr(kernel_phases, broken)

    def off_by_one(
        table: PtrTable, ids: torch.Tensor, blocks: torch.Tensor, **options: Any
    ) -> None:
        whole(table, (ids + 1) % table.page_count, blocks, **options)

    monkeypatch.setattr(kernel_phases, broken, off_by_one)
    assert run_it() == 1
    printed = capsys.readouterr().out
    assert "WRONG BYTES" in printed
    assert "gb_per_s" not in printed


def test_a_write_outside_of_the_pages_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kernel_phases.scatter_pages

    def careless(table: PtrTable, ids: torch.Tensor, blocks: torch.Tensor, **options: Any) -> None:
        whole(table, ids, blocks, **options)
        free = sorted(set(range(table.page_count)) - set(ids.tolist()))
        table.pages(0)[free[0]] ^= 1

    monkeypatch.setattr(kernel_phases, "scatter_pages", careless)
    pool = Pool(TINY[0], 1 << 16, Device("cpu"), 16)
    with pytest.raises(WrongBytesError, match="other bytes"):
        kernel_phases.check(pool, 16)


def test_figures_of_known_times() -> None:
    rates = Timing([1.0, 2.0, 4.0, 0.5, 1.0]).rates(4_000_000_000)
    assert rates == {"gb_per_s": 4.0, "p20": 2.0, "p80": 4.0}
    run = Run(Device("cpu"), 1, 1, 1, ceilings={"d2d": 8.0})
    assert run.add("copies", "gather", "d2d", **rates)["of_ceiling"] == 0.5


def test_targets_are_judged_by_the_worst_case_and_the_best_quota() -> None:
    rows = [
        {"phase": "copies", "contender": "gather", "chunk_bytes": 16384, "of_ceiling": 0.9},
        {"phase": "copies", "contender": "scatter", "chunk_bytes": 32768, "of_ceiling": 0.7},
        {"phase": "copies", "contender": "gather", "chunk_bytes": 8192, "of_ceiling": 0.1},
        {"phase": "copies", "contender": "index_select", "chunk_bytes": 16384, "of_ceiling": 0.2},
        {"phase": "quota", "contender": "gather", "quota": 8, "of_ceiling": 1.5},
        {"phase": "quota", "contender": "gather", "quota": 16, "of_ceiling": 2.5},
        {"phase": "quota", "contender": "gather", "quota": 32, "of_ceiling": 9.0},
        {"phase": "quota", "contender": "gather", "quota": 0, "of_ceiling": 9.0},
    ]
    assert list(kernels.judge(rows).values()) == [0.7, 2.5, None]


def test_geometries_are_those_of_the_models() -> None:
    blocks = {g.name: g.block_bytes(64) for g in GEOMETRIES}
    assert blocks["llama-3.1-8b tp1"] == 8 << 20
    assert blocks["llama-3.1-70b tp8"] == 160 * 16 << 10
    assert blocks["dsa fp8"] == 2_561_024
