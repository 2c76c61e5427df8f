"""Output of ``flexkv``: sizes, aligned columns, progress on stderr, one JSON object as the last line.

Every text goes through ``printable``: names and contents of files cannot steer a terminal, and no password is shown.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from flexkv_sglang.printable import printable, without_secrets

_PLAIN_PROGRESS_S = 5.0


def human_bytes(count: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_seconds(seconds: float) -> str:
    """``3.2 h``."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def counted(count: int, noun: str) -> str:
    """``1 page``, ``2 pages``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def table(head: Sequence[str], rows: Sequence[Sequence[object]], indent: str = "  ") -> list[str]:
    """Lines with columns as wide as needed; numbers and sizes to the right, the first column to the left."""
    cells = [list(head), *[[printable(str(cell)) for cell in row] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    return [
        indent
        + "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def emit(lines: Sequence[str], fields: Mapping[str, object], *, as_json: bool) -> None:
    """Print the lines, or with ``--json`` only the JSON line."""
    if as_json:
        print(json.dumps(_as_json(without_secrets(fields)), sort_keys=True, allow_nan=False))
    else:
        print("\n".join(printable(line) for line in lines))


def complain(text: str) -> None:
    """One line on stderr."""
    print(f"flexkv: {printable(text)}", file=sys.stderr)


def _as_json(value: Any) -> Any:
    """With null for infinity and NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class ProgressLine:
    """Shows progress on stderr: one moving line on a terminal, else a line every few seconds."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._done = 0
        self._bytes = 0
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()
        self._shown = self._started

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def add(self, pages: int, byte_count: int) -> None:
        """Count pages and bytes that were read."""
        self._done += pages
        self._bytes += byte_count
        now = time.monotonic()
        if now - self._shown >= (0.2 if self._live else _PLAIN_PROGRESS_S):
            self._shown = now
            rate = self._bytes / max(now - self._started, 1e-9)
            line = f"{self._done} of {self._pages} pages, {human_bytes(rate)}/s"
            print(line, end="\r" if self._live else "\n", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Clear the moving line."""
        if self._live:
            print(" " * 60, end="\r", file=sys.stderr, flush=True)
