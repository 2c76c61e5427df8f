"""One of two ranks, of which the second cannot attach its store: ``python attach_rank.py PLACE RANK FIRST``.

``FIRST``: "attach" or "update" (of the weights) comes first.
"""

from __future__ import annotations

import json
import sys
import types
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # tests/support

import torch.distributed as dist

from flexkv_sglang import FlexKVStorage
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import WEIGHTS
from flexkv_sglang.integration import weight_updates
from models.plain_pools import Pool, attach, config


def main(place: str, rank: str, first: str) -> None:
    """Print the epoch after an update and an attach, and the result of SGLang's next collective of the group."""
    store = Path(place) / "store"
    bound = timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=bound
    )
    weight_updates._group = lambda: dist.group.WORLD  # there is no SGLang server around us
    result = types.SimpleNamespace(success=True, message="")
    manager = types.SimpleNamespace(tp_cpu_group=dist.group.WORLD)
    storage: FlexKVStorage | None = None
    for step in ("attach", "update") if first == "attach" else ("update", "attach"):
        if step == "update":
            weight_updates.around_update(lambda *_: result, manager, None)
            continue
        path = Path(place) / rank
        if rank == "1":
            path.write_text("a file, not a directory")
        try:
            storage = attach(config(path), Pool(seed=1), {})
        except ConfigError:
            assert rank == "1"
    ranks = [None, None]
    dist.all_gather_object(ranks, rank)
    epoch = WEIGHTS.epoch
    print(json.dumps({"nonce": epoch.nonce, "agreed": epoch.agreed, "ranks": ranks}))
    if storage is not None:
        storage.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
