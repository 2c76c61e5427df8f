"""Differences between releases of SGLang beyond the storage interface.

The targets of our hooks, the published server arguments, and the types for pools. A release may lack any of them:
then the answer is None, and the caller decides.
"""

from __future__ import annotations

import importlib
import warnings
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from flexkv_sglang.prefix import ALL_PAGES, PoolRequirement, RestorablePrefixes

UNKNOWN = (ImportError, AttributeError, ValueError, AssertionError, RuntimeError)
"""Access to a part that a release does not have raises one of these."""

ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
ATTACH = "sglang.srt.managers.cache_controller.HiCacheController.attach_storage_backend"
CREATE_LINKER = "sglang.srt.mem_cache.unified_cache.linker_factory.create_unified_cache_linker"
"""The function that makes an external linker. SGLang looks it up there at each call."""
RESOLVE = (
    "sglang.srt.server_args.ServerArgs.resolve_once",
    "sglang.srt.server_args.ServerArgs.__post_init__",  # before 0.5.20: resolution happens here
)
"""The methods that resolve a server's arguments, the newest first. From 0.5.23 on ``ServerArgs`` is a msgspec
struct, which ignores a patched ``__post_init__``."""
RUNTIME_CONFIG = (
    "sglang.srt.mem_cache.unified_cache.storage_attachment.StorageAttachment.apply_runtime_config"
)
"""The method by which the tree takes over the storage settings, from 0.5.20 on."""
WEIGHT_UPDATERS = (
    "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager",
    "sglang.srt.managers.scheduler_update_weights_mixin.SchedulerUpdateWeightsMixin",  # older releases
)
"""The classes with the scheduler's methods for weight updates, the newest first."""
RESET = "sglang.srt.managers.cache_controller.HiCacheController.reset"
"""The method that SGLang calls when it flushes its cache."""


def as_text(value: Any) -> str:
    """A name or a setting of SGLang as text; of a member of an enumeration its value."""
    return str(getattr(value, "value", value))


def resolve(path: str) -> Any:
    """``package.module.name`` or ``package.module.Class.name``. Raises ``ImportError`` or ``AttributeError``."""
    home, name = path.rsplit(".", 1)
    module, owner = home.rsplit(".", 1)
    with warnings.catch_warnings():  # where they are errors, an import would be cut off half way
        warnings.simplefilter("ignore")
        if owner[0].isupper():
            return getattr(getattr(importlib.import_module(module), owner), name)
        return getattr(importlib.import_module(home), name)


def first_there(*paths: str) -> str | None:
    """The first of these targets that this release has, or None."""
    for path in paths:
        try:
            resolve(path)
        except (ImportError, AttributeError):
            continue
        return path
    return None


def server_args() -> Any:
    """SGLang's server arguments as it has resolved them; None outside a server or in an unknown release.

    From 0.5.23 on the published record holds the user's values. A view beside it has the resolved ones (the local
    path of a model, defaults that follow from others).
    """
    record = _published()
    try:
        from sglang.srt.arg_groups.model_override_base import resolved_view
    except UNKNOWN:
        return record
    return None if record is None else resolved_view(record)


def _published() -> Any:
    try:
        from sglang.srt.runtime_context import get_server_args  # not in 0.5.14 and before

        return get_server_args()
    except UNKNOWN:
        pass
    try:
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
    except UNKNOWN:
        return None


def data_parallel_size() -> int:
    """The number of engine replicas inside one server, which share the configured ``size``; 1 when unknown."""
    try:
        return max(1, int(server_args().dp_size))
    except (AttributeError, TypeError, ValueError):
        return 1


def pool_result(usable: RestorablePrefixes) -> Any:
    """A ``PoolTransferResult`` of the installed SGLang, with the parts of the answer that it has fields for."""
    answer = {
        "kv_hit_pages": usable.pages,
        "extra_pool_hit_pages": usable.boundaries,
        "restorable_prefix_pages": usable.lengths,
    }
    try:
        from sglang.srt.mem_cache.hicache_storage import PoolTransferResult
    except ImportError:  # before 0.5.10, which never asks
        return SimpleNamespace(**answer)
    known = {item.name for item in fields(PoolTransferResult)}
    return PoolTransferResult(**{name: item for name, item in answer.items() if name in known})


def pool_requirement(transfer: Any) -> PoolRequirement:
    """The requirement that SGLang states in a ``PoolTransfer`` when it calls ``batch_exists_v2``."""
    return PoolRequirement(
        as_text(transfer.name),
        as_text(getattr(transfer, "hit_policy", ALL_PAGES)),
        max(1, len(transfer.keys or ())),
        int(getattr(transfer, "block_pages", 0)),
        int(getattr(transfer, "group_pages", 0)),
    )


def transfer_stats(
    reads: list[tuple[int, float]], writes: list[tuple[int, float]], per_page: int = 1
) -> Any:
    """SGLang's ``StorageMetrics`` of transfers, each (stored groups, GB/s); ``per_page`` groups are a page."""
    from sglang.srt.observability.metrics_collector import StorageMetrics

    return StorageMetrics(
        prefetch_pgs=[-(-stored // per_page) for stored, _ in reads],
        backup_pgs=[-(-stored // per_page) for stored, _ in writes],
        prefetch_bandwidth=[speed for _, speed in reads],
        backup_bandwidth=[speed for _, speed in writes],
    )
