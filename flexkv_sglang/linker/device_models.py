"""Device models: which device pools a model has, and whether the linker can carry them.

SGLang's own assembler (``linker_pool_assembler``) refuses plain MHA and MLA models, so this module makes the list.
It refuses at start-up, with the reason, every model whose stored bytes would differ from SGLang's host layout, or
whose state would be stored in part. Pools are duck types, recognised by their class names; no SGLang import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flexkv_sglang.errors import ConfigError, KernelArgumentError
from flexkv_sglang.linker.device_pages import DevicePool, tables_of
from flexkv_sglang.linker.staging import HostShape
from flexkv_sglang.pools.pool_rules import KV, MAMBA
from flexkv_sglang.prefix import ALL_PAGES, TRAILING_PAGES

INDEXER, SWA = "indexer", "swa"
REPLICATED_CLASSES = ("MLATokenToKVPool", "DSATokenToKVPool")
"""KV pools that SGLang treats as equal on all tensor-parallel ranks."""

_VALID = (
    "Valid: plain MHA or MLA, DSA, sliding-window and Mamba models in the default device layout, without "
    "draft pools; other models with HiCache (--enable-hierarchical-cache --hicache-storage-backend flexkv)"
)


def device_pools(kvcache: Any, params: Any, *, dcp_size: int, unified: bool) -> list[DevicePool]:
    """The pools of a model, KV first.

    ``kvcache``: SGLang's device pool or composition of pools; ``params``: its ``CacheInitParams``; ``dcp_size``:
    ranks that share a context while decoding; ``unified``: ``--enable-unified-memory`` is on. Raises ``ConfigError``.
    """
    _refuse("enable_unified_memory", True if unified else None, "pages have virtual indices there")
    _refuse("dcp_size", dcp_size if dcp_size > 1 else None, "a rank holds parts of pages")
    drafts = getattr(params, "mtp_draft_device_pools", ()) or getattr(
        params, "sidecar_draft_device_pools", ()
    )
    _refuse("draft pools", len(drafts) or None, "their pages would not come back")
    page_size = int(params.page_size)
    kind = type(kvcache).__name__
    try:
        if kind == "SWAKVPool":
            return _windows(kvcache, page_size)
        if kind == "HybridLinearKVPool":
            start = int(kvcache.start_layer)
            full = _local(kvcache.full_attention_layer_id_mapping, start)
            state = _mamba(params.req_to_token_pool, start)
            return [*_attention(kvcache.full_kv_pool, page_size, full), state]
        return _attention(kvcache, page_size, {i: i for i in range(int(kvcache.layer_num))})
    except KernelArgumentError as exc:
        raise ConfigError(f"{kind}: {exc}. {_VALID}") from exc


def transfer_layers(pools: list[DevicePool]) -> int:
    """Number of layers that SGLang waits for one by one."""
    return 1 + max(layer for pool in pools for layer in pool.layers)


def _windows(kvcache: Any, page_size: int) -> list[DevicePool]:
    full: dict[int, int] = {}
    window: dict[int, int] = {}
    for layer, (place, is_window) in kvcache.layers_mapping.items():
        (window if is_window else full)[layer - int(kvcache.start_layer)] = place
    _refuse(
        "full attention layers", None if full else 0, "a model of windows alone has no KV pages"
    )
    pools = _attention(kvcache.full_kv_pool, page_size, full)
    swa = kvcache.swa_kv_pool
    _refuse(
        "sliding window pool", None if _is_mha(swa) else type(swa).__name__, "it is no MHA pool"
    )
    return [*pools, _mha(swa, SWA, page_size, window, TRAILING_PAGES)]


def _attention(pool: Any, page_size: int, layers: Mapping[int, int]) -> list[DevicePool]:
    kind = type(pool).__name__
    if int(pool.page_size) != page_size:
        _refuse("page_size", page_size, f"the device pool has pages of {pool.page_size} tokens")
    if _is_mha(pool):
        return [_mha(pool, KV, page_size, layers, ALL_PAGES)]
    if kind == "MLATokenToKVPool":
        return [_mla(pool, page_size, layers)]
    if kind == "DSATokenToKVPool":
        found = [_mla(pool, page_size, layers)]
        return found if all(pool.skip_topk_layers) else [*found, _indexer(pool, page_size, layers)]
    raise ConfigError(f"device pool: {kind}: its pages have no known byte order. {_VALID}")


def _is_mha(pool: Any) -> bool:
    return type(pool).__name__ == "MHATokenToKVPool"


def _mha(
    pool: Any, name: str, page_size: int, layers: Mapping[int, int], policy: str
) -> DevicePool:
    order = pool.kv_cache_layout
    _refuse(
        "kv_cache_layout", None if order == "nhd" else order, "its chunks are not token after token"
    )
    scaled = [
        getattr(pool, n, None) is not None for n in ("k_scale_buffer", "native_k_scale_buffer")
    ]
    _refuse(
        "scaled KV cache", pool.store_dtype if any(scaled) else None, "scales lie in other buffers"
    )
    tables, layout = tables_of([pool.k_buffer, pool.v_buffer], page_size, rows_are_pages=False)
    uneven = pool.head_dim != pool.v_head_dim
    shape = HostShape(
        "AsymmetricMHATokenToKVPoolHost" if uneven else "MHATokenToKVPoolHost",
        pool.store_dtype,
        page_size,
        tuple(part.part_bytes for part in layout.parts),
        {
            **_layers_of(pool, len(pool.k_buffer)),
            "head_num": int(pool.head_num),
            "head_dim": int(pool.head_dim),
            "v_head_dim": int(pool.v_head_dim),
            "head_group_num": 1,
        },
    )
    return DevicePool(name, name, policy, page_size, tables, layout, dict(layers), shape)


def _mla(pool: Any, page_size: int, layers: Mapping[int, int]) -> DevicePool:
    scaled = getattr(pool, "kv_scale_buffer", None) is not None
    _refuse("scaled KV cache", pool.store_dtype if scaled else None, "scales lie in other buffers")
    sharded = bool(getattr(pool, "layer_shard_enabled", False))
    _refuse("layer sharding", True if sharded else None, "a rank holds some of the layers")
    tables, layout = tables_of([pool.kv_buffer], page_size, rows_are_pages=False)
    shape = HostShape(
        "MLATokenToKVPoolHost",
        pool.store_dtype,
        page_size,
        tuple(part.part_bytes for part in layout.parts),
        {
            **_layers_of(pool, len(pool.kv_buffer)),
            "kv_lora_rank": int(pool.kv_lora_rank),
            "qk_rope_head_dim": int(pool.qk_rope_head_dim),
            "kv_cache_dim": int(pool.kv_cache_dim),
        },
    )
    return DevicePool(KV, KV, ALL_PAGES, page_size, tables, layout, dict(layers), shape)


def _indexer(pool: Any, page_size: int, layers: Mapping[int, int]) -> DevicePool:
    """Index keys of the layers that compute their own; a row is a page."""
    compressed = bool(getattr(pool, "kpool_use_compress", False))
    _refuse(
        "index_kpool_compress",
        True if compressed else None,
        "tails of requests lie beside the pages",
    )
    own = [layer for layer, skip in enumerate(pool.skip_topk_layers) if not skip]
    buffers = [pool.index_k_with_scale_buffer[layer] for layer in own]
    tables, layout = tables_of([buffers], page_size, rows_are_pages=True)
    place = {layer: number for number, layer in enumerate(own)}
    shape = HostShape(
        "DSAIndexerPoolHost",
        pool.store_dtype,
        page_size,
        tuple(part.part_bytes for part in layout.parts),
        {**_layers_of(pool, len(own)), "indexer_dtype": buffers[0].dtype},
    )
    mapped = {layer: place[device] for layer, device in layers.items() if device in place}
    return DevicePool(INDEXER, KV, ALL_PAGES, page_size, tables, layout, mapped, shape)


def _mamba(requests: Any, start_layer: int) -> DevicePool:
    """State slots: temporal state of all layers, then each convolution state of all layers."""
    extra = {
        "int8 Mamba checkpoints": getattr(requests, "mamba_ckpt_pool", None) is not None,
        "short convolution state": _enabled(requests, "short_conv_pool"),
        "n-gram state": _enabled(requests, "ngram_pool"),
    }
    for what, there in extra.items():
        _refuse(what, True if there else None, "it lies beside the pages")
    siblings = getattr(requests.mamba_pool, "_slot_siblings", ())
    _refuse("Mamba side states", len(siblings) or None, "they lie beside the pages")
    cache = requests.mamba_pool.mamba_cache
    states = [state for state in (cache.temporal, *cache.conv) if state.numel()]
    parts = [[_as_bytes(layer) for layer in state] for state in states]
    tables, layout = tables_of(parts, 1, rows_are_pages=True)
    shape = HostShape(
        "MambaPoolHost",
        cache.conv[0].dtype,
        1,
        tuple(part.part_bytes for part in layout.parts),
        {"conv_dtype": cache.conv[0].dtype, "temporal_dtype": cache.temporal.dtype},
    )
    layers = _local(requests.mamba_map, start_layer)
    return DevicePool(MAMBA, MAMBA, TRAILING_PAGES, 1, tables, layout, layers, shape)


def _as_bytes(state: torch.Tensor) -> torch.Tensor:
    """One layer's slots as rows of bytes."""
    return state.reshape(state.shape[0], -1).view(torch.uint8)


def _layers_of(pool: Any, count: int) -> dict[str, Any]:
    return {
        "start_layer": int(pool.start_layer),
        "end_layer": int(pool.end_layer),
        "layer_num": count,
        "target_layer_num": count,
    }


def _local(layers: Mapping[int, int], start: int) -> dict[int, int]:
    return {layer - start: place for layer, place in layers.items()}


def _enabled(requests: Any, name: str) -> bool:
    return bool(getattr(getattr(requests, name, None), "enabled", False))


def _refuse(what: str, value: object, why: str) -> None:
    """Raises ``ConfigError`` for a setting that the linker cannot serve, unless ``value`` is None."""
    if value is not None:
        raise ConfigError(f"{what}: {value}: {why}, so the linker cannot store them. {_VALID}")
