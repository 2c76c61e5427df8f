"""Contenders inside this process: this package's storage backend and SGLang's ``file`` backend.

Each contender writes and reads the same number of pages of the same size, and reports seconds and CPU seconds. Both
are called through the interface that SGLang uses for them (zero-copy v1 and generic). Every call uses the memory of
one batch again. The contenders in ``peers`` are other processes.
"""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheFile, HiCacheStorageConfig

from flexkv_sglang.bench.memory import HostMemory
from flexkv_sglang.integration.storage import FlexKVStorage

BATCH = 128  # pages per call: SGLang's STORAGE_BATCH_SIZE


class MissingContender(Exception):  # noqa: N818 - not an error: the run goes on without it
    """A contender that is not installed; the message says how to install it."""


@dataclass(frozen=True)
class PassDuration:
    """Time of one pass over all pages."""

    seconds: float
    cpu_seconds: float


class Contender(Protocol):
    """Writes ``pages`` pages, then reads them back cold."""

    name: str
    pages: int

    def write(self, generation: int, /) -> PassDuration: ...
    def read(self, generation: int, /) -> PassDuration: ...
    def close(self) -> None: ...


class BenchPool:
    """A ``page_first`` MHA host pool in ``memory``: K of all its pages, then V. ``page_size`` is in tokens."""

    layout = "page_first"
    dtype = torch.bfloat16
    start_layer, layer_num = 0, 1

    def __init__(self, memory: HostMemory, page_size: int = 64) -> None:
        self.page_size, self.pages = page_size, memory.pages
        self.half = memory.page_bytes // 2
        self.bytes = memory.bytes
        self.base = self.bytes.ctypes.data
        self.kv_buffer = torch.from_numpy(self.bytes)
        self.v_offset = self.half * self.pages

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        """Addresses and lengths, as of SGLang's MHA pool."""
        addresses: list[int] = []
        for token in indices.tolist()[:: self.page_size]:
            k = self.base + token // self.page_size * self.half
            addresses += [k, k + self.v_offset]
        return addresses, [self.half] * len(addresses)

    def flat_page(self, page: int) -> torch.Tensor:
        """One flat page for the generic interface, as SGLang's ``get_data_page(flat=True)``: a copy."""
        k = self.bytes[page * self.half : (page + 1) * self.half]
        v = self.bytes[self.v_offset + page * self.half : self.v_offset + (page + 1) * self.half]
        return torch.from_numpy(np.concatenate([k, v]))


def page_names(generation: int, count: int) -> list[str]:
    """Hashes as SGLang makes them: 64 hex digits, different in each generation."""
    return [hashlib.sha256(f"{generation}:{i}".encode()).hexdigest() for i in range(count)]


def storage_config(extra: dict[str, Any]) -> HiCacheStorageConfig:
    """One rank, MHA."""
    return HiCacheStorageConfig(
        tp_rank=0,
        tp_size=1,
        pp_rank=0,
        pp_size=1,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_mla_model=False,
        enable_storage_metrics=False,
        is_page_first_layout=True,
        model_name="bench",
        extra_config=extra,
    )


class FlexKVContender:
    """This package, through ``batch_set_v1`` / ``batch_get_v1``."""

    def __init__(self, directory: Path, pool: BenchPool, pages: int, verify: str = "full") -> None:
        self.name = "flexkv" if verify == "full" else f"flexkv-verify-{verify}"
        self._pool, self.pages = pool, pages
        self._directory = directory / self.name
        size = pages * (2 * pool.half + 4096)
        self.storage = FlexKVStorage(
            storage_config(
                {"path": str(self._directory), "size": size, "verify": verify, "model_id": "bench"}
            )
        )
        self.storage.register_mem_pool_host(pool)

    def write(self, generation: int) -> PassDuration:
        """New pages into slots that were written before (except in the warm-up)."""
        self.storage.clear()
        return self._pass(self.storage.batch_set_v1, generation)

    def read(self, generation: int) -> PassDuration:
        """Cold reads, with O_DIRECT."""
        return self._pass(self.storage.batch_get_v1, generation)

    @property
    def slot_file(self) -> Path:
        """The file of the pages."""
        return next(self._directory.rglob("*.slots"))

    def close(self) -> None:
        self.storage.close()
        shutil.rmtree(self._directory)

    def _pass(self, call: Any, generation: int) -> PassDuration:
        names = page_names(generation, self.pages)
        tokens = torch.arange(self._pool.pages * self._pool.page_size)
        with Stopwatch() as watch:
            for start in range(0, self.pages, BATCH):
                keys = names[start : start + BATCH]
                done = call(keys, tokens[: len(keys) * self._pool.page_size])
                assert all(done), "a page was not moved"
        return watch.sample


class FileContender:
    """SGLang's ``file`` backend through its generic interface, as the controller drives it."""

    name = "file"

    def __init__(self, directory: Path, pool: BenchPool, pages: int) -> None:
        self._pool, self.pages = pool, pages
        self._directory = directory / "file"
        self._directory.mkdir()
        self.storage = HiCacheFile(storage_config({}), str(self._directory))
        size = 2 * pool.half
        self._targets = [
            torch.from_numpy(pool.bytes[row * size : (row + 1) * size]) for row in range(pool.pages)
        ]

    def write(self, generation: int) -> PassDuration:
        """New files. Buffered, so the pass ends with a sync of the file system."""
        for path in self._directory.iterdir():
            path.unlink()
        os.sync()
        names = page_names(generation, self.pages)
        with Stopwatch() as watch:
            for start in range(0, self.pages, BATCH):
                pages = range(start, min(start + BATCH, self.pages))
                assert self.storage.batch_set(
                    names[start : start + BATCH],
                    [self._pool.flat_page(p % self._pool.pages) for p in pages],
                )
            os.sync()
        return watch.sample

    def read(self, generation: int) -> PassDuration:
        """Cold: the page cache of every file is dropped first."""
        os.sync()
        for path in self._directory.iterdir():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        names = page_names(generation, self.pages)
        with Stopwatch() as watch:
            for start in range(0, self.pages, BATCH):
                batch = names[start : start + BATCH]
                found = self.storage.batch_get(batch, self._targets[: len(batch)])
                assert all(page is not None for page in found)
        return watch.sample

    def close(self) -> None:
        shutil.rmtree(self._directory)


class Stopwatch:
    """Wall and CPU seconds of a block, all threads of this process."""

    def __enter__(self) -> Stopwatch:
        self._cpu, self._wall = _cpu(), time.perf_counter()
        return self

    def __exit__(self, *_exc: object) -> None:
        self.sample = PassDuration(time.perf_counter() - self._wall, _cpu() - self._cpu)


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
