"""The subjects of ``kernels.py``: geometries of real models, pools of them, streams and clocks of either device."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from flexkv_sglang.triton_kernels.ops import PtrTable


@dataclass(frozen=True, slots=True)
class Geometry:
    """One rank's pool: ``buffers`` per-layer tensors (K and V counted apart), ``row_bytes`` per token in each."""

    name: str
    buffers: int
    row_bytes: int

    def block_bytes(self, page_size: int) -> int:
        """Bytes of a page."""
        return self.buffers * self.row_bytes * page_size


GEOMETRIES = (
    Geometry("llama-3.1-8b tp1", 64, 2048),
    Geometry("llama-3.1-70b tp8", 160, 256),
    Geometry("qwen3-32b tp2", 128, 1024),
    Geometry("deepseek-v3 mla", 61, 1152),
    Geometry("dsa fp8", 61, 656),
)
PAGE_SIZES = (1, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the repetitions of one thing."""

    seconds: list[float]

    def rates(self, moved: int) -> dict[str, float]:
        """GB/s of ``moved`` bytes: the median, and a fifth from both ends."""
        cuts = sorted(moved / 1e9 / s for s in self.seconds)
        last = len(cuts) - 1
        return {
            "gb_per_s": round(statistics.median(cuts), 4),
            "p20": round(cuts[round(last * 0.2)], 4),
            "p80": round(cuts[round(last * 0.8)], 4),
        }


class Device:
    """A GPU, or the CPU in its place: there all work is done at once, without streams."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.is_gpu = self.device.type == "cuda"

    def seconds(self, work: Callable[[], None]) -> float:
        """Seconds of ``work`` on the current stream, launches included when the device waits for them."""
        if not self.is_gpu:
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        first.record()
        work()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    def stream(self, priority: int = 0) -> Any:
        """A new stream, or ``None``."""
        return torch.cuda.Stream(self.device, priority=priority) if self.is_gpu else None

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Work goes to ``stream``."""
        return torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext()

    def mark(self) -> Any:
        """An event behind the work of the current stream."""
        if not self.is_gpu:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def wait(self, event: Any) -> None:
        """The current stream goes on after ``event``."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def join(self) -> None:
        """Wait until all work is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)

    def pinned(self, *shape: int) -> torch.Tensor:
        """Host memory for copies; its bytes are touched."""
        return torch.zeros(shape, dtype=torch.uint8, pin_memory=self.is_gpu)


class Pool:
    """Random bytes in a pool of a geometry, and pages of it in random order.

    ``payload``: approximate bytes of one pass; the pool has a third more.
    """

    def __init__(
        self, geometry: Geometry, payload: int, device: Device, page_max: int = 64
    ) -> None:
        self.geometry = geometry
        self.payload = payload
        blocks = max(2, payload // geometry.block_bytes(page_max))
        self.rows = (blocks + max(1, blocks // 3)) * page_max
        self.usable = blocks * page_max
        maker = torch.Generator(device.device).manual_seed(1)
        self.buffers = [
            torch.randint(
                0,
                256,
                (self.rows, geometry.row_bytes),
                dtype=torch.uint8,
                device=device.device,
                generator=maker,
            )
            for _ in range(geometry.buffers)
        ]
        self.space = torch.empty(
            blocks * geometry.block_bytes(page_max), dtype=torch.uint8, device=device.device
        )

    def paged(self, page_size: int) -> tuple[PtrTable, torch.Tensor, torch.Tensor]:
        """(table, ids of distinct pages in random order, blocks for them)."""
        table = PtrTable(self.buffers, page_size)
        count = self.usable // page_size
        maker = torch.Generator().manual_seed(page_size)
        ids = torch.randperm(table.page_count, generator=maker)[:count].to(table.device)
        return table, ids, self.space.view(count, self.geometry.block_bytes(page_size))
