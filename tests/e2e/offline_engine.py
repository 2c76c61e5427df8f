"""One prompt through ``sglang.Engine`` with flexkv, as a program of its own: a JSON job in, a JSON line out."""

from __future__ import annotations

import json
import sys
from typing import Any

import sglang


def main(job: dict[str, Any]) -> None:
    engine = sglang.Engine(
        model_path=job["model"],
        device="cpu",
        mem_fraction_static=0.1,
        max_total_tokens=4096,
        page_size=job["page_size"],
        enable_hierarchical_cache=True,
        enable_cache_report=True,
        hicache_size=1,
        hicache_mem_layout="page_first",
        hicache_io_backend="kernel",
        hicache_storage_prefetch_policy="wait_complete",
        hicache_storage_backend="flexkv",
        hicache_storage_backend_extra_config=json.dumps(job["extra"]),
    )
    try:
        reply = engine.generate(
            input_ids=job["prompt"],
            sampling_params={"temperature": 0, "max_new_tokens": 8, "ignore_eos": True},
        )
    finally:
        engine.shutdown()
    cached = reply["meta_info"]["cached_tokens_details"]
    print(json.dumps({"output_ids": reply["output_ids"], "cached": cached}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
