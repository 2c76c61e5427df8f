"""``flexkv bench ssd``: measures page reads and writes on a disk, beside other ways to do them."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

PEERS = ("fio", "fio-plain", "file", "nixl")


def run_bench(
    directory: Path,
    *,
    page_bytes: Sequence[int],
    seconds: float,
    against: Sequence[str],
    as_json: bool,
) -> int:
    """Measure in ``directory`` and remove all files there. Repeats for ``seconds``, at least once."""
    try:
        # Imported late: only this command needs SGLang.
        ssd = importlib.import_module("flexkv_sglang.bench.ssd")
    except ImportError as exc:
        print(f"flexkv: bench needs sglang and torch in this environment: {exc}", file=sys.stderr)
        return 2
    options = ssd.BenchOptions(
        directory, page_bytes=page_bytes, reps=10_000, seconds=seconds, against=against
    )
    try:
        _, summary = ssd.measure(options)
    except OSError as exc:
        print(f"flexkv: {directory}: {exc.strerror or exc}", file=sys.stderr)
        return 1
    if not as_json:
        print(ssd.table(summary["cases"]))
    print(json.dumps(summary))
    return 0
