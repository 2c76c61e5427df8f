"""One of two ranks that agree after an update.

``python agreement_rank.py PLACE RANK CONTENT CLEAN``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from flexkv_sglang.integration import weight_updates


def main(place: str, rank: str, content: str, clean: str) -> None:
    """Print the agreed epoch as JSON."""
    store = Path(place) / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    epoch, all_clean = weight_updates.agree(dist.group.WORLD, content, clean == "clean")
    print(json.dumps({"content": epoch.content, "nonce": epoch.nonce, "clean": all_clean}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
