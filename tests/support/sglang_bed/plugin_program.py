"""Lets SGLang load our plug-in and uses it as a server would, on whatever release is on the path.

    plugin_program.py PLACE        the last line of its output is JSON; ``tests/contract`` judges it

The controller is SGLang's own class without its device side: attaching, the factory and the transfer
functions are the release's code, pools are plain memory and no thread is started.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from sglang.srt.managers.cache_controller import HiCacheController
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs

from flexkv_bed.tiny_model import write_config
from flexkv_sglang.integration import compat, plugin, weight_updates
from models.plain_pools import KV_PAGES, KVPool, names, tokens
from sglang_bed.releases import storage_config

Seen = dict[str, Any]
_LEFT_OUT = (
    "_stop_storage_threads",
    "_start_storage_threads",
    "_create_prefetch_sync_groups",  # 0.5.20 and later: _create_sync_groups
    "_create_sync_groups",
    "_maybe_register_draft_with_storage",
)


class Complaints(logging.Handler):
    """Keeps log records of level WARNING and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.said.append(record.getMessage())


def controller(pool: KVPool) -> Any:
    """The part of a controller that ``attach_storage_backend`` and the transfer functions use."""
    made = object.__new__(HiCacheController)
    made.enable_storage = False
    made.storage_backend = made.storage_backend_type = None
    made.mem_pool_host = made.storage_host_pool = pool
    made.mem_pool_device = SimpleNamespace(size=0)
    made.page_size = pool.page_size
    made.host_memory_mode = "cache"
    made.storage_stop_event = threading.Event()
    for name in _LEFT_OUT:
        setattr(made, name, lambda *_args, **_kwargs: None)
    made._generate_storage_config = lambda _name, extra: storage_config(extra_config=extra)
    return made


def publish(server_args: ServerArgs) -> None:
    """Make these the process's arguments, as a scheduler does."""
    try:
        from sglang.srt import runtime_context
    except ImportError:
        runtime_context = None
    if not hasattr(runtime_context, "publish"):
        from sglang.srt.server_args import set_global_server_args_for_scheduler

        set_global_server_args_for_scheduler(server_args)
    elif hasattr(runtime_context, "SpawnRanks"):
        ranks = runtime_context.SpawnRanks(world_rank=0)
        runtime_context.publish(server_args, role="scheduler", ranks=ranks)
    else:
        runtime_context.publish(server_args, role="scheduler")


def arguments(model: Path, **more: Any) -> ServerArgs:
    """Server arguments, resolved the way this release does it."""
    made = ServerArgs(
        model_path=str(model),
        load_format="dummy",
        device="cpu",
        page_size=4,
        mem_fraction_static=0.1,
        skip_tokenizer_init=True,
        log_level="warning",
        **more,
    )
    if hasattr(made, "resolve_once"):
        made.resolve_once()
    return made


def refusal(model: Path, **more: Any) -> str:
    """The error for these arguments before a model is loaded, if any."""
    try:
        arguments(model, hicache_storage_backend="flexkv", **more)
    except ValueError as exc:
        return str(exc)
    return "nothing"


def command_line() -> Seen:
    """SGLang's own parser after the hooks."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    (action,) = (a for a in parser._actions if a.dest == "hicache_storage_backend")
    parsed = parser.parse_args(["--model-path", "m", "--hicache-storage-backend", "flexkv"])
    return {"choices": list(action.choices or ()), "parsed": parsed.hicache_storage_backend}


def transfers(place: Path) -> Seen:
    """Attach by our name, then write and read through the functions that the controller chose."""
    made = controller(source := KVPool(seed=1))
    made.attach_storage_backend(
        storage_backend="flexkv",
        prefetch_threshold=4,
        model_name="served name",
        storage_backend_extra_config={"path": str(place / "pages"), "size": "16MB"},
    )
    storage = made.storage_backend
    functions = [made.page_get_func.__name__, made.page_set_func.__name__]
    first, last = names(4)[:1], names(4)[1:]
    stored = made.page_set_func(first, tokens(0), HiCacheStorageExtraInfo())
    chained = HiCacheStorageExtraInfo(prefix_keys=first)
    stored = stored and made.page_set_func(last, tokens(1, 2, 3), chained)
    counted: list[int] = []
    operation = SimpleNamespace(
        request_id="r",
        is_terminated=lambda: False,
        increment=lambda tokens_done: counted.append(tokens_done // 4) or True,
    )
    answer = made.page_get_func(
        operation, [*last, *names(5)[4:]], tokens(10, 11, 12, 13), HiCacheStorageExtraInfo()
    )
    rows, target = [*range(1, 4), *range(KV_PAGES + 1, KV_PAGES + 4)], [10, 11, 12]
    both = [*target, *(KV_PAGES + page for page in target)]
    seen = {
        "attached": [type(storage).__name__, made.storage_backend_type, *functions],
        "stored": bool(stored),
        "fetched": sum(counted) if answer is None else answer,
        "same_bytes": bool(np.array_equal(source.pages[both], source.pages[rows])),
        "generic_stored": bool(made._generic_page_set(names(1, 9), tokens(5))),
    }
    made._generic_page_get(operation, names(1, 9), tokens(20))
    same = np.array_equal(source.pages[[20, KV_PAGES + 20]], source.pages[[5, KV_PAGES + 5]])
    (space,) = place.rglob("NAMESPACE.json")
    storage.close()
    return {
        **seen,
        "generic_same_bytes": bool(same),
        "model": json.loads(space.read_text())["model"],
    }


def main(place: Path) -> Seen:
    """Everything that is to be judged."""
    complaints = Complaints()
    logging.getLogger("sglang.srt.plugins").addHandler(complaints)
    load_plugins()
    model = write_config(place / "model")
    seen: Seen = {
        "complaints": complaints.said,
        "misfit": plugin.misfit(),
        "resolution": str(compat.first_there(*compat.RESOLVE)).rpartition(".")[2],
        "update_hooks": sorted(target.rpartition(".")[2] for target, _ in weight_updates.hooks()),
        "prefix_keys_hook": compat.first_there(compat.RUNTIME_CONFIG) is not None,
        **command_line(),
        "wrong_setting": refusal(model, hicache_storage_backend_extra_config='{"sise": 1}'),
    }
    fits, plugin.misfit = plugin.misfit, lambda: "planted"
    seen["refused"] = refusal(model)
    plugin.misfit = fits
    publish(arguments(model))
    found = compat.server_args()
    seen["server_args"] = found is not None and found.model_path == str(model)
    seen["data_parallel_size"] = compat.data_parallel_size()
    return seen | transfers(place)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    print(json.dumps(main(Path(sys.argv[1]))))
