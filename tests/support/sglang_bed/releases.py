"""The SGLang release on the path, and the releases in which parts of it appeared."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import sglang
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig

Release = tuple[int, int, int]

HAS: dict[str, Release] = {
    "publish": (0, 5, 17),  # runtime_context.publish; before: a global in server_args
    "restorable": (0, 5, 19),  # PoolTransferResult.restorable_prefix_pages
    "storage_attachment": (0, 5, 19),
    "namespaces": (0, 5, 20),  # the page hash contains adapters, extra keys and salts
    "resolve_once": (0, 5, 19),
    "dp_rank": (0, 5, 21),
    "block_groups": (0, 5, 22),
    "spawn_ranks": (0, 5, 22),
    "dcp": (0, 5, 23),
    "pools_registered": (0, 5, 23),
    "injector": (0, 5, 23),
}
"""The first of the tested releases that has it."""


def release() -> Release:
    """Of the SGLang that is imported."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", sglang.__version__)
    assert found is not None, sglang.__version__
    return int(found[1]), int(found[2]), int(found[3])


DYNAMIC = {
    "backend_name": "flexkv",
    "module_path": "flexkv_sglang",
    "class_name": "FlexKVStorage",
    "interface_v1": 1,
}
"""The extra config that the backend ``dynamic`` needs."""

KNOWN_FIELDS: dict[str, Any] = {
    "tp_rank": 0,
    "tp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "attn_cp_rank": 0,
    "attn_cp_size": 1,
    "is_mla_model": False,
    "enable_storage_metrics": False,
    "is_page_first_layout": True,
    "model_name": "model",
    "tp_lcm_size": None,
    "should_split_heads": False,
    "dp_rank": 0,
    "extra_config": None,
    "dcp_size": 1,
    "dcp_rank": 0,
    "logical_page_size": None,
}
"""Every field of any release. A new one fails a test: somebody has to decide whether page bytes depend on it."""

OLDEST_FIELDS = tuple(KNOWN_FIELDS)[:12]
"""Those of 0.5.11, less ``extra_config``."""


def storage_config(**changed: Any) -> HiCacheStorageConfig:
    """A ``HiCacheStorageConfig`` with every field that this release has."""
    mine = {field.name for field in dataclasses.fields(HiCacheStorageConfig)}
    given = KNOWN_FIELDS | changed
    return HiCacheStorageConfig(**{name: given[name] for name in given if name in mine})
