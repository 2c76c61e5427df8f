"""FlexKVStorage: SGLang's storage interface on top of the engine.

The boundary: after construction nothing is raised into SGLang, except by ``register_mem_pool_host``, which
SGLang calls while it attaches and which is the first moment the page size is known. Every other failure
is counted, logged once per kind and minute, and answered as a miss of the right shape.

Threads: SGLang calls from its prefetch, prefetch I/O, backup and scheduler threads; all may overlap.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from flexkv_sglang.assembly import make_room, open_hierarchy, prepare_tiers
from flexkv_sglang.compat import data_parallel_size, kv_settings, model_identity, pool_geometry
from flexkv_sglang.config import FlexKVConfig
from flexkv_sglang.epochs import WEIGHTS
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.hierarchy import Hierarchy
from flexkv_sglang.host_pages import HostPages, UnsupportedPoolError, tensor_buffers
from flexkv_sglang.keys import Identity, page_key, page_keys
from flexkv_sglang.metrics import Metrics
from flexkv_sglang.prometheus import export
from flexkv_sglang.types import PageBuffers, PageKey
from flexkv_sglang.weight_updates import agree_before_attach, install_now

logger = logging.getLogger(__name__)

READ_SECONDS_PER_KI_TOKEN = 0.2
"""A get may take 0.8 of what SGLang's prefetch timeout adds per 1024 tokens (0.25 s) ..."""

READ_SECONDS_MIN = 0.5
"""... and never less than this."""

WRITE_SECONDS = 8.0
"""Bound of a put. SGLang joins its storage threads for 10 s when a backend is detached."""

EXISTS_SPAN = 512
"""Keys converted and looked up at a time."""

_LOG_INTERVAL_S = 60.0
_F = TypeVar("_F", bound=Callable[..., Any])


def _boundary(miss: Callable[..., Any]) -> Callable[[_F], _F]:
    """Turn every exception of a method into ``miss(*the method's arguments)``, counted and logged."""

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def guarded(self: FlexKVStorage, *args: Any, **kwargs: Any) -> Any:
            try:
                return method(self, *args, **kwargs)
            except Exception as exc:  # noqa: BLE001 - the boundary: one failed call must not end SGLang's threads
                self._report(method.__name__, exc)
                return miss(self, *args, **kwargs)

        return guarded  # type: ignore[return-value]

    return decorate


class FlexKVStorage(HiCacheStorage):  # type: ignore[misc]  # SGLang ships no types
    """HiCache L3 on local SSDs. One instance per SGLang rank process and attach.

    The constructor parses the configuration and proves the directories with real I/O (``ConfigError``
    names key, value and valid choices). ``register_mem_pool_host`` opens the namespace and its files.
    """

    def __init__(self, storage_config: Any, _kwargs: Any = None) -> None:
        self._storage_config = storage_config
        self._config = FlexKVConfig.parse(storage_config.extra_config)
        self.metrics = Metrics()
        export(self.metrics, storage_config)
        self._engine: Hierarchy | None = None
        self._pages: HostPages | None = None
        self._identity: Identity | None = None
        self._left: Hierarchy | None = None  # closed for a weight update, its files not yet deleted
        self._logged_at: dict[str, float] = {}
        logger.info("flexkv: %s", self._config.describe())
        self._prepared = prepare_tiers(self._config)
        install_now()

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn the page geometry, open the namespace, recover what is there.

        Raises ``ConfigError`` (SGLang then refuses to start, or answers 400): size too small for one page
        or too large for the disk. A pool without page buffers is not an error: everything misses.
        """
        super().register_mem_pool_host(mem_pool_host)
        if self._engine is not None:
            self._engine.close()
            self._engine = None
        tokens = int(getattr(mem_pool_host, "logical_page_size", None) or mem_pool_host.page_size)
        try:
            self._pages = HostPages(mem_pool_host, torch.arange(tokens, dtype=torch.int64))
        except UnsupportedPoolError as exc:
            self._pages = None
            logger.error("flexkv: this host pool cannot be stored, every page will miss: %s", exc)
            return
        WEIGHTS.attach(self)
        agree_before_attach()
        self._identity = self._identity_of(mem_pool_host, self._pages)
        if WEIGHTS.settled:
            self._engine = self._open(self._identity)
        else:
            logger.warning("flexkv: weights were updated: pages miss until the cache is flushed")

    @_boundary(lambda self: None)
    def leave_epoch(self) -> None:
        """Before a weight update: every page misses, none is written. Waits for running calls (within their
        limits), which go on in the old namespace."""
        engine, self._engine = self._engine, None
        if engine is not None:
            self._left = engine
            engine.close()

    @_boundary(lambda self: None)
    def enter_epoch(self) -> None:
        """When no KV cache of older weights is left: open the namespace of the new ones. The old one's files
        go first: both together never exceed ``size``."""
        if self._engine is not None or self._pages is None or self._identity is None:
            return
        identity, old = self._identity_of(self.mem_pool_host, self._pages), self._identity
        if not make_room(self._left, self._prepared, old, identity):
            logger.error("flexkv: a transfer hangs in the old namespace: pages miss")
            return
        self._left, self._identity = None, identity
        self._engine = self._open(identity)

    def close(self) -> None:
        """Wait for running transfers, flush, release the files. Idempotent, never raises."""
        WEIGHTS.detach(self)
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.close()
        except Exception as exc:  # noqa: BLE001 - boundary: SGLang calls this from detach and atexit
            self._report("close", exc)

    def _open(self, identity: Identity) -> Hierarchy:
        hierarchy = open_hierarchy(
            self._config,
            self._prepared,
            identity.namespace,
            identity.fields(),
            identity.payload_bytes,
            self._writer_count(),
            self.metrics,
        )
        for address, byte_count in [] if self._pages is None else self._pages.memory():
            hierarchy.register_memory(address, byte_count)
        return hierarchy

    def _writer_count(self) -> int:
        """Rank processes of this server that share the configured sizes; 0 if this one never writes."""
        config = self._storage_config
        if not getattr(config, "is_storage_writer", not config.is_mla_model or config.tp_rank == 0):
            return 0
        tensor_ranks = getattr(config, "dcp_size", 1) if config.is_mla_model else config.tp_size
        writers: int = (
            tensor_ranks
            * getattr(config, "pp_size", 1)
            * getattr(config, "attn_cp_size", 1)
            * data_parallel_size()
        )
        return writers

    def _identity_of(self, pool: Any, pages: HostPages) -> Identity:
        config = self._storage_config
        replicated = bool(config.is_mla_model)
        return Identity(
            model=model_identity(self._config.model_id, WEIGHTS.epoch),
            settings=kv_settings(),
            pool="kv",
            pool_class=type(pool).__name__,
            dtype=str(pool.dtype),
            layout=str(pool.layout),
            page_size=pages.tokens_per_page,
            buffer_bytes=pages.geometry.lengths,
            geometry=pool_geometry(pool),
            first_layer=int(getattr(pool, "start_layer", 0) or 0),
            layer_count=int(getattr(pool, "layer_num", 0) or 0),
            tp=(0, 1) if replicated else (int(config.tp_rank), int(config.tp_size)),
            pp=(int(getattr(config, "pp_rank", 0)), int(getattr(config, "pp_size", 1))),
            attn_cp=(
                int(getattr(config, "attn_cp_rank", 0)),
                int(getattr(config, "attn_cp_size", 1)),
            ),
            dcp=(int(getattr(config, "dcp_rank", 0)), int(getattr(config, "dcp_size", 1))),
            split_heads=int(getattr(config, "tp_lcm_size", None) or 0),
            storage_format_tag=str(getattr(pool, "storage_format_tag", None) or ""),
            epoch=WEIGHTS.epoch.nonce,
        )

    @_boundary(lambda self, keys, *a, **k: 0)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Leading run of pages that are stored here or by a neighbour. Memory only."""
        engine = self._engine
        if engine is None:
            return 0
        started = time.perf_counter()
        count = 0
        for start in range(0, len(keys), EXISTS_SPAN):  # most end early: convert as needed
            span = page_keys(keys[start : start + EXISTS_SPAN])
            found = engine.prefix(span)
            count += found
            if found < len(span):
                break
        self.metrics.asked(len(keys), count, time.perf_counter() - started)
        return count

    @_boundary(lambda self, keys, *a, **k: [False] * len(keys))
    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Read pages into the host pool at ``host_indices`` (int64, ``len(keys) * page_size``)."""
        if self._engine is None or self._pages is None:
            return [False] * len(keys)
        targets = self._pages.buffers(host_indices, len(keys))
        if targets is None:
            return self._mismatch(keys, host_indices)
        return self._get(keys, targets)

    @_boundary(lambda self, keys, *a, **k: [False] * len(keys))
    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Write pages of the host pool at ``host_indices`` (int64, ``len(keys) * page_size``)."""
        if self._engine is None or self._pages is None:
            return [False] * len(keys)
        sources = self._pages.buffers(host_indices, len(keys))
        if sources is None:
            return self._mismatch(keys, host_indices)
        return self._put(keys, sources, extra_info)

    # Pools beside KV (Mamba, SWA, indexer, ...) are not stored yet. A page without its sidecars would be
    # wrong output, so a request that needs any of them misses.

    @_boundary(lambda self, *a, **k: None)
    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Called for every pool of a hybrid model, KV included."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if str(getattr(host_pool_name, "value", host_pool_name)) != "kv":
            logger.warning(
                "flexkv: pool %s is not stored by this release: this model's pages will miss",
                host_pool_name,
            )

    @_boundary(lambda self, *a, **k: _no_hits())
    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """KV pages alone: as ``batch_exists``. With any other pool: nothing."""
        hits = _no_hits()
        if not pool_transfers:
            hits.kv_hit_pages = self.batch_exists(keys, extra_info)
        return hits

    @_boundary(lambda self, transfers, *a, **k: _all_false(transfers))
    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """All False: sidecars are not stored."""
        return _all_false(transfers)

    @_boundary(lambda self, transfers, *a, **k: _all_false(transfers))
    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """All False: sidecars are not stored."""
        return _all_false(transfers)

    @_boundary(lambda self, key: False)
    def exists(self, key: str) -> bool:
        """True if one page is stored here or by a neighbour."""
        return bool(self.batch_exists([key]))

    @_boundary(lambda self, *a, **k: None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Read one flat page into ``target_location`` (a CPU tensor) and return it; None on a miss."""
        found = self.batch_get([key], [target_location])
        return found[0]

    @_boundary(lambda self, keys, *a, **k: [None] * len(keys))
    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        """Read flat pages into ``target_locations``; per key the tensor, or None from the first miss on."""
        if self._engine is None or self._identity is None or not keys or target_locations is None:
            return [None] * len(keys)
        targets = tensor_buffers(list(target_locations), self._identity.payload_bytes)
        if targets is None or len(targets) != len(keys):
            return [None] * len(keys)
        done = self._get(keys, targets)
        return [
            tensor if flag else None for tensor, flag in zip(target_locations, done, strict=True)
        ]

    @_boundary(lambda self, *a, **k: False)
    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Write one flat page (a CPU tensor)."""
        return self.batch_set([key], [value])

    @_boundary(lambda self, *a, **k: False)
    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Write flat pages (CPU tensors). True if all of them are stored now."""
        if self._engine is None or self._identity is None or values is None:
            return False
        if not keys:
            return True
        kept = [
            value.contiguous() for value in values
        ]  # keeps copies alive until the write is done
        sources = tensor_buffers(kept, self._identity.payload_bytes)
        if sources is None or len(sources) != len(keys):
            return False
        return all(self._put(keys, sources, None))

    @_boundary(lambda self: None)
    def clear(self) -> None:
        """Forget every page this process stored in its own namespace. Other models' pages stay."""
        engine = self._engine
        if engine is not None:
            engine.clear()

    @_boundary(lambda self: None)
    def get_stats(self) -> Any:
        """Transfers since the last call, as SGLang's ``StorageMetrics`` (GB/s); our own counters are ``metrics``."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        reads, writes = self.metrics.drain_transfers()
        return StorageMetrics(
            prefetch_pgs=[pages for pages, _ in reads],
            backup_pgs=[pages for pages, _ in writes],
            prefetch_bandwidth=[speed for _, speed in reads],
            backup_bandwidth=[speed for _, speed in writes],
        )

    def _get(self, keys: list[str], targets: PageBuffers) -> list[bool]:
        engine = self._engine  # read once: a weight update may take it away
        if engine is None:
            return [False] * len(keys)
        with self.metrics.timed("get"):
            return engine.get(page_keys(keys), targets, self._read_deadline(len(keys)))

    def _put(self, keys: list[str], sources: PageBuffers, extra_info: Any) -> list[bool]:
        engine = self._engine
        if engine is None:
            return [False] * len(keys)
        deadline = time.monotonic() + WRITE_SECONDS
        with self.metrics.timed("put"):
            return engine.put(page_keys(keys), sources, _parent_of(extra_info), deadline)

    def _read_deadline(self, page_count: int) -> float:
        tokens = page_count * (self._pages.tokens_per_page if self._pages is not None else 1)
        return time.monotonic() + max(READ_SECONDS_MIN, READ_SECONDS_PER_KI_TOKEN * tokens / 1024)

    def _mismatch(self, keys: list[str], host_indices: Any) -> list[bool]:
        if keys:
            self._report(
                "host_indices",
                ConfigError(f"{len(keys)} keys with {int(host_indices.numel())} indices"),
            )
        return [False] * len(keys)

    def _report(self, what: str, exc: Exception) -> None:
        self.metrics.count(f"{what}_exceptions")
        kind = f"{what}:{type(exc).__name__}"
        now = time.monotonic()
        if now - self._logged_at.get(kind, -_LOG_INTERVAL_S) >= _LOG_INTERVAL_S:
            self._logged_at[kind] = now
            logger.error("flexkv: %s failed, answered as a miss", what, exc_info=exc)


def _parent_of(extra_info: Any) -> PageKey | None:
    """The page before the batch: the last of ``prefix_keys``, if SGLang passes them."""
    prefix = getattr(extra_info, "prefix_keys", None)
    return page_key(prefix[-1]) if prefix else None


def _no_hits() -> Any:
    from sglang.srt.mem_cache.hicache_storage import PoolTransferResult

    return PoolTransferResult(0, {})


def _all_false(transfers: list[Any]) -> dict[str, list[bool]]:
    return {transfer.name: [False] * len(transfer.keys or []) for transfer in transfers}
