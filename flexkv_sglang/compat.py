"""What we ask of the running SGLang beyond its storage interface, in one place.

Only reads: the served model, and the parallel sizes that the storage config does not carry. Everything
here may be absent in another release; then the answer is None and the caller says what follows.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flexkv_sglang.fingerprint import directory_fingerprint
from flexkv_sglang.prefix import ALL_PAGES, Demand, Usable

logger = logging.getLogger(__name__)

_UNKNOWN = (ImportError, AttributeError, ValueError, AssertionError, RuntimeError)

ADD_CLI_ARGS = "sglang.srt.server_args.ServerArgs.add_cli_args"
ATTACH = "sglang.srt.managers.cache_controller.HiCacheController.attach_storage_backend"
RESOLVE = (
    "sglang.srt.server_args.ServerArgs.resolve_once",
    "sglang.srt.server_args.ServerArgs.__post_init__",  # before 0.5.20: resolution happens here
)
"""Where a server's arguments are resolved, the newest first. From 0.5.23 on ``ServerArgs`` is a msgspec
struct, which never looks at a patched ``__post_init__``."""
RUNTIME_CONFIG = (
    "sglang.srt.mem_cache.unified_cache.storage_attachment.StorageAttachment.apply_runtime_config"
)
"""Where the tree takes over the storage settings, from 0.5.20 on."""


def pool_name(name: object) -> str:
    """A ``PoolName`` of any release, or text, as text."""
    return str(getattr(name, "value", name))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model arguments of the server this process belongs to."""

    path: str
    revision: str | None
    load_format: str
    quantization: str | None
    random_seed: int | None


def resolve(path: str) -> Any:
    """``package.module.Class.attribute``. Raises ``ImportError`` or ``AttributeError``."""
    module, class_name, attribute = path.rsplit(".", 2)
    return getattr(getattr(importlib.import_module(module), class_name), attribute)


def first_there(*paths: str) -> str | None:
    """The first of these that this release has."""
    for path in paths:
        try:
            resolve(path)
        except (ImportError, AttributeError):
            continue
        return path
    return None


def server_args() -> Any:
    """SGLang's published server arguments; None outside a server or in an unknown release."""
    try:
        from sglang.srt.runtime_context import get_server_args  # not in 0.5.14 and before

        return get_server_args()
    except _UNKNOWN:
        pass
    try:
        from sglang.srt.server_args import get_global_server_args

        return get_global_server_args()
    except _UNKNOWN:
        return None


def served_model() -> ServedModel | None:
    """From SGLang's published server arguments; None outside a server or in an unknown release."""
    args = server_args()
    try:
        return ServedModel(
            str(args.model_path),
            args.revision,
            str(args.load_format),
            args.quantization,
            args.random_seed,
        )
    except AttributeError:
        return None


def data_parallel_size() -> int:
    """Engine replicas inside one server (they share the configured ``size``); 1 when unknown."""
    try:
        return max(1, int(server_args().dp_size))
    except (AttributeError, TypeError, ValueError):
        return 1


def model_identity(model_id: str | None, model_name: str | None) -> str:
    """One text that differs whenever the weights differ.

    ``model_id`` (configured) wins. Otherwise a fingerprint of the served checkpoint's files. Without
    files to look at (weights from a hub that are not in the cache, a test harness) the name and revision
    have to do, and a warning says so.
    """
    if model_id:
        return f"id:{model_id}"
    model = served_model()
    if model is None:
        logger.warning(
            "flexkv: the served model's files are unknown here; pages are named after %r only. "
            "Set model_id to tell checkpoints apart",
            model_name,
        )
        return f"name:{model_name}"
    extra = f"load_format={model.load_format} quantization={model.quantization}"
    if model.load_format == "dummy":
        extra += f" seed={model.random_seed}"
    directory = _checkpoint_directory(model)
    fingerprint = directory_fingerprint(directory) if directory is not None else None
    if fingerprint is None:
        logger.warning(
            "flexkv: no local files of %r to fingerprint; pages are named after path and revision. "
            "Set model_id to tell checkpoints apart",
            model.path,
        )
        return f"path:{model.path}@{model.revision} {extra}"
    return f"files:{fingerprint} {extra}"


def _checkpoint_directory(model: ServedModel) -> Path | None:
    path = Path(model.path)
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except (ImportError, ValueError, OSError):
        return None
    return Path(found).parent if isinstance(found, str) else None


def pool_result(usable: Usable) -> Any:
    """A ``PoolTransferResult`` of the installed SGLang, with as much of the answer as it has fields for."""
    answer = {
        "kv_hit_pages": usable.pages,
        "extra_pool_hit_pages": usable.boundaries,
        "restorable_prefix_pages": usable.lengths,
    }
    try:
        from sglang.srt.mem_cache.hicache_storage import PoolTransferResult
    except ImportError:  # before 0.5.10; nobody asks there
        return SimpleNamespace(**answer)
    known = {item.name for item in fields(PoolTransferResult)}
    return PoolTransferResult(**{name: item for name, item in answer.items() if name in known})


def pool_demand(transfer: Any) -> Demand:
    """What a ``PoolTransfer`` of an exists-check asks for."""
    return Demand(
        pool_name(transfer.name),
        pool_name(getattr(transfer, "hit_policy", ALL_PAGES)),
        max(1, len(transfer.keys or ())),
        int(getattr(transfer, "block_pages", 0)),
        int(getattr(transfer, "group_pages", 0)),
    )


def transfer_stats(
    reads: list[tuple[int, float]], writes: list[tuple[int, float]], per_page: int = 1
) -> Any:
    """SGLang's ``StorageMetrics`` of transfers given as (stored, GB/s), where ``per_page`` of them are a page."""
    from sglang.srt.observability.metrics_collector import StorageMetrics

    return StorageMetrics(
        prefetch_pgs=[-(-stored // per_page) for stored, _ in reads],
        backup_pgs=[-(-stored // per_page) for stored, _ in writes],
        prefetch_bandwidth=[speed for _, speed in reads],
        backup_bandwidth=[speed for _, speed in writes],
    )
