"""The phases of ``kernels.py``: each adds rows to a ``Run``."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

import kernel_baselines as baselines
from flexkv_sglang.triton_kernels.ops import PtrTable, gather_pages, scatter_pages, warmup
from kernel_cases import Device, Geometry, Pool, Timing

QUOTAS = (1, 2, 4, 8, 16, 32, 64, 132)
QUOTA_CASES = (("llama-3.1-8b tp1", 64), ("llama-3.1-70b tp8", 16))
STAGE_BYTES = 64 << 20
Row = dict[str, Any]
Work = Callable[[], None]


class WrongBytesError(Exception):
    """A copy wrote wrong bytes."""


@dataclass
class Run:
    """One run: device, sizes and results."""

    device: Device
    payload: int
    reps: int
    matmul: int
    geometries: tuple[Geometry, ...] = ()
    page_sizes: tuple[int, ...] = ()
    rows: list[Row] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, contender: str, ceiling: str = "", **values: Any) -> Row:
        """Note a result, with its ratio to a ceiling of the run."""
        row = {"phase": phase, "contender": contender} | values
        if ceiling and "gb_per_s" in row:
            row |= {
                "ceiling": ceiling,
                "of_ceiling": round(row["gb_per_s"] / self.ceilings[ceiling], 3),
            }
        self.rows.append(row)
        return row


def timed(run: Run, work: dict[str, Work]) -> dict[str, Timing]:
    """Each once to warm up, then ``reps`` rounds of all in random order."""
    for one in work.values():
        one()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(run.reps):
        for name in random.sample(sorted(work), len(work)):
            seconds[name].append(run.device.seconds(work[name]))
    return {name: Timing(values) for name, values in seconds.items()}


def measure_ceilings(run: Run) -> None:
    """The ceilings: copies of whole tensors on this machine."""
    size = run.payload // 4
    big = torch.empty(2, run.payload, dtype=torch.uint8, device=run.device.device)
    host, near = run.device.pinned(2, size), big[0, : 2 * size].view(2, size)
    side = run.device.stream()

    def both() -> None:
        start = run.device.mark()
        with run.device.on(side):
            run.device.wait(start)
            host[1].copy_(near[1], non_blocking=True)
            end = run.device.mark()
        near[0].copy_(host[0], non_blocking=True)
        run.device.wait(end)

    moved = {"d2d": run.payload, "h2d": size, "d2h": size, "both ways": 2 * size}
    work: dict[str, Work] = {
        "d2d": lambda: big[1].copy_(big[0]),
        "h2d": lambda: near[0].copy_(host[0], non_blocking=True),
        "d2h": lambda: host[1].copy_(near[1], non_blocking=True),
        "both ways": both,
    }
    for name, timing in timed(run, work).items():
        rates = timing.rates(moved[name])
        run.ceilings[name] = rates["gb_per_s"]
        run.add("ceiling", name, **rates)


def check(pool: Pool, page_size: int) -> None:
    """Gather against slicing, scatter into a cleared pool against the gather, before any speed."""
    table, ids, blocks = pool.paged(page_size)
    blocks.fill_(0xA5)
    gather_pages(table, ids, blocks)
    width = table.chunk_bytes
    for row in {0, len(ids) // 2, len(ids) - 1}:
        first = int(ids[row]) * page_size
        want = torch.cat([b[first : first + page_size].flatten() for b in pool.buffers])
        if not torch.equal(blocks[row], want):
            raise WrongBytesError(
                f"gather: {pool.geometry.name}, page size {page_size}, block {row}"
            )
    sums = [int(b.view(torch.uint8).sum(dtype=torch.int64)) for b in pool.buffers]
    few = ids[: max(1, min(len(ids), (256 << 20) // blocks.shape[1]))]
    for j in range(table.buffer_count):
        table.pages(j)[few] = 0
    scatter_pages(table, few, blocks[: len(few)])
    for j in range(table.buffer_count):
        part = blocks[: len(few), j * width : (j + 1) * width]
        if not torch.equal(table.pages(j)[few], part):
            raise WrongBytesError(f"scatter: {pool.geometry.name}, page size {page_size}")
    if sums != [int(b.view(torch.uint8).sum(dtype=torch.int64)) for b in pool.buffers]:
        raise WrongBytesError(f"scatter touched other bytes: {pool.geometry.name}, {page_size}")


def measure_copies(run: Run) -> None:
    """Kernels and baselines, all geometries and page sizes; the whole table twice."""
    for turn in (1, 2):
        for geometry in run.geometries:
            pool = Pool(geometry, run.payload, run.device, max(run.page_sizes))
            for page_size in run.page_sizes:
                if turn == 1:
                    warmup(PtrTable(pool.buffers, page_size))
                    check(pool, page_size)
                measure_case(run, pool, page_size, turn)
            del pool


def measure_case(run: Run, pool: Pool, page_size: int, turn: int) -> None:
    """One line of the table."""
    table, ids, blocks = pool.paged(page_size)
    whole = blocks.numel()
    chunks, chunk_bytes_moved = baselines.chunk_copies(table, ids, blocks)
    moved = {"gather": whole, "scatter": whole, "index_select": whole, "copies": chunk_bytes_moved}
    work: dict[str, Work] = {
        "gather": lambda: gather_pages(table, ids, blocks, trusted_ids=True),
        "scatter": lambda: scatter_pages(table, ids, blocks, trusted_ids=True),
        "index_select": baselines.index_select(table, ids, blocks),
        "copies": chunks,
    }
    stream = run.device.stream()
    with run.device.on(stream):
        try:
            batched, moved["batched copies"] = baselines.batched_copies(table, ids, blocks, stream)
            batched()
            work["batched copies"] = batched
        except baselines.MissingBaseline as reason:
            if turn == 1:
                run.add(
                    "copies", "batched copies", geometry=pool.geometry.name, missing=str(reason)
                )
        for name, timing in timed(run, work).items():
            run.add(
                "copies",
                name,
                "d2d",
                geometry=pool.geometry.name,
                page_size=page_size,
                chunk_bytes=table.chunk_bytes,
                turn=turn,
                **timing.rates(moved[name]),
            )
    run.device.join()


def measure_quotas(run: Run) -> None:
    """Speed with few programs, the loss of a matmul loop beside them, the delay of a launch behind it."""
    matrix = torch.randn(run.matmul, run.matmul, device=run.device.device).to(torch.bfloat16)
    main, side = run.device.stream(), run.device.stream(priority=-1)
    rounds = 12 if run.device.is_gpu else 1

    def multiply() -> None:
        for _ in range(rounds):
            matrix @ matrix

    for name, page_size in QUOTA_CASES:
        geometry = next((g for g in run.geometries if g.name == name), run.geometries[0])
        pool = Pool(geometry, run.payload, run.device, page_size)
        for quota in (*QUOTAS, None):
            gather = gather_of(pool, page_size, quota)
            with run.device.on(main):
                alone = timed(run, {"matmul": multiply, "gather": gather})
                gather_s = min(alone["gather"].seconds)
                times = max(1, round(min(alone["matmul"].seconds) / gather_s))
                slower, delay = disturbed(run, multiply, gather, times, side)
            run.add(
                "quota",
                "gather",
                "h2d",
                geometry=geometry.name,
                page_size=page_size,
                chunk_bytes=geometry.row_bytes * page_size,
                quota=quota or 0,
                matmul_slowdown=round(slower / min(alone["matmul"].seconds), 3),
                start_delay_ms=round((delay - gather_s) * 1e3, 3),
                **alone["gather"].rates(pool.space.numel()),
            )
        del pool, gather


def gather_of(pool: Pool, page_size: int, quota: int | None) -> Work:
    """The gather of a whole pool."""
    table, ids, blocks = pool.paged(page_size)
    return lambda: gather_pages(table, ids, blocks, quota=quota, trusted_ids=True)


def disturbed(run: Run, multiply: Work, gather: Work, times: int, side: Any) -> tuple[float, float]:
    """(seconds of the matmuls beside ``times`` gathers, seconds from launch to end of a gather behind them)."""
    seconds: list[float] = []

    def beside() -> None:
        start = run.device.mark()
        with run.device.on(side):
            run.device.wait(start)
            for _ in range(times):
                gather()
        multiply()

    for _ in range(run.reps):
        seconds.append(run.device.seconds(beside))
        run.device.join()
    multiply()  # the device is busy now
    with run.device.on(side):
        if not run.device.is_gpu:
            return min(seconds), run.device.seconds(gather)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        gather()
        last.record()
    last.synchronize()
    delay = float(first.elapsed_time(last)) / 1e3
    run.device.join()
    return min(seconds), delay


def measure_staging(run: Run, quota: int = 16) -> None:
    """Through two device stages to pinned memory and back: as fast as the plain copy?"""
    for geometry in run.geometries:
        for page_size in (p for p in run.page_sizes if p >= 16):
            size = max(4 * geometry.block_bytes(page_size), min(1 << 30, run.payload))
            pool = Pool(geometry, size, run.device, page_size)
            table, ids, blocks = pool.paged(page_size)
            host = run.device.pinned(*blocks.shape)
            work = {
                direction: staged(run, (table, ids), host, direction, quota)
                for direction in ("d2h", "h2d")
            }
            for direction, timing in timed(run, work).items():
                run.add(
                    "staged",
                    "offload" if direction == "d2h" else "restore",
                    direction,
                    geometry=geometry.name,
                    page_size=page_size,
                    chunk_bytes=table.chunk_bytes,
                    quota=quota,
                    **timing.rates(host.numel()),
                )
            gather_pages(table, ids, blocks)
            if not torch.equal(host.to(blocks.device), blocks):
                raise WrongBytesError(f"staged: {geometry.name}, page size {page_size}")
            del pool, table, blocks, host


def staged(
    run: Run, pages: tuple[PtrTable, torch.Tensor], host: torch.Tensor, direction: str, quota: int
) -> Work:
    """Two stages in turn: while one is copied over the bus, the other is gathered (or scattered)."""
    table, ids = pages
    width = host.shape[1]
    step = max(1, min(len(ids) // 2, STAGE_BYTES // width))
    stages = torch.empty(2, step, width, dtype=torch.uint8, device=table.device)
    streams = [run.device.stream(priority=-1) for _ in range(2)]

    def work() -> None:
        start = run.device.mark()
        for stream in streams:
            with run.device.on(stream):
                run.device.wait(start)
        for number, begin in enumerate(range(0, len(ids), step)):
            some = ids[begin : begin + step]
            stage, far = stages[number % 2, : len(some)], host[begin : begin + step]
            with run.device.on(streams[number % 2]):
                if direction == "d2h":
                    gather_pages(table, some, stage, quota=quota, trusted_ids=True)
                    far.copy_(stage, non_blocking=True)
                else:
                    stage.copy_(far, non_blocking=True)
                    scatter_pages(table, some, stage, quota=quota, trusted_ids=True)
        for stream in streams:
            with run.device.on(stream):
                end = run.device.mark()
            run.device.wait(end)

    return work
