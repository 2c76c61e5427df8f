"""NIXL's POSIX plug-in as a child process: one O_DIRECT file per page, registered by path per call, as SGLang does.

Runs in NIXL's own environment (``scripts/setup-nixl``) and imports nothing of this project. Arguments:
directory, memory file, page bytes, pages of memory, pages, "aio" or "uring". Protocol: one JSON object per
line. In: ``{"op": "WRITE" | "READ" | "CLEAR", "generation": n}``. Out: ``{"seconds": s, "cpu_seconds": s}``;
the first line, before any request, is ``{"version": ...}``. Ends at the end of input.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config

BATCH = 128  # SGLang's STORAGE_BATCH_SIZE


class NixlChild:
    """Host memory registered once; files registered and released per batch of pages."""

    def __init__(
        self, directory: str, memory: str, page_bytes: int, rows: int, pages: int, engine: str
    ) -> None:
        self._directory, self._page_bytes, self._pages = directory, page_bytes, pages
        self._rows = rows
        self._agent: Any = nixl_agent("bench", nixl_agent_config(backends=[]))
        options = {"aio": {"use_aio": "true"}, "uring": {"use_uring": "true"}}[engine]
        self._agent.create_backend("POSIX", options)
        with open(memory, "r+b") as file:
            self._memory = np.frombuffer(mmap.mmap(file.fileno(), page_bytes * rows), np.uint8)
        self._base = self._memory.ctypes.data
        self._agent.register_memory([(self._base, page_bytes * rows, 0, "")], "DRAM")
        self._ids = itertools.count(1)

    def clear(self) -> None:
        """Forget all pages."""
        for entry in os.scandir(self._directory):
            os.unlink(entry.path)

    def move(self, operation: str, generation: int) -> None:
        """All pages, in batches."""
        flags = "rw,create,direct" if operation == "WRITE" else "ro,direct"
        for start in range(0, self._pages, BATCH):
            pages = range(start, min(start + BATCH, self._pages))
            files = self._agent.register_memory(
                [
                    (
                        0,
                        self._page_bytes,
                        next(self._ids),
                        f"{flags}:{self._path(generation, page)}",
                    )
                    for page in pages
                ],
                "FILE",
            )
            local = self._agent.get_xfer_descs(
                [
                    (self._base + page % self._rows * self._page_bytes, self._page_bytes, 0)
                    for page in pages
                ],
                "DRAM",
            )
            request = self._agent.initialize_xfer(operation, local, files.trim(), "bench")
            state = self._agent.transfer(request)
            while state == "PROC":
                time.sleep(0)  # its Python interface has no blocking wait
                state = self._agent.check_xfer_state(request)
            if state != "DONE":
                raise OSError(f"NIXL: {operation} ended as {state}")
            self._agent.release_xfer_handle(request)
            self._agent.deregister_memory(files)

    def _path(self, generation: int, page: int) -> str:
        return f"{self._directory}/{generation}-{page}"


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # NIXL logs to stdout
    directory, memory, page_bytes, rows, pages, engine = sys.argv[1:7]
    child = NixlChild(directory, memory, int(page_bytes), int(rows), int(pages), engine)
    answers.write(json.dumps({"version": version("nixl-cu12")}) + "\n")
    for line in sys.stdin:
        asked = json.loads(line)
        wall, cpu = time.perf_counter(), time.process_time()
        if asked["op"] == "CLEAR":
            child.clear()
        else:
            child.move(asked["op"], asked["generation"])
        took = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
        }
        answers.write(json.dumps(took) + "\n")


if __name__ == "__main__":
    main()
