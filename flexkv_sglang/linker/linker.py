"""FlexKVLinker: SGLang's external-linker interface on the same stores as the storage backend.

A linker moves pages between the device pools and the tiers without a host cache in between:

    leases.py    which prefixes can be restored, and the pins that keep them restorable
    load.py      tiers -> staging -> device slots, layer by layer
    offload.py   device slots -> staging -> tiers, in order
    backfill.py  pages of neighbours and other nodes -> own files

Its pages have the bytes and the identity of a HiCache replica's with ``--hicache-mem-layout page_first_direct``.

The boundary: after construction nothing is raised into SGLang. A failed lookup finds nothing,
``finish_layer_wise_loading`` reports a failed load (SGLang aborts its requests), a failed offload has the result False.

Threads: SGLang calls from its scheduler, and ``layer_done_counter`` calls back from the forward thread. The threads
``flexkv-load``, ``flexkv-offload`` and ``flexkv-linker-backfill`` do the work; ``flexkv-watch`` ends overdue loads.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any, ClassVar

import torch
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
from sglang.srt.mem_cache.unified_cache.unified_cache_linker import (
    LayerWiseLoadCounter,
    UnifiedCacheLinker,
)
from sglang.srt.runtime_context import get_parallel

from flexkv_sglang.cache.assembly import prepare_tiers
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import WEIGHTS
from flexkv_sglang.integration.boundary import Boundary, answers, no_lengths
from flexkv_sglang.integration.compat import as_text
from flexkv_sglang.integration.pool_identity import PoolSpecs
from flexkv_sglang.integration.weight_updates import agree_before_attach, install_now
from flexkv_sglang.linker.backfill import LinkerBackfill
from flexkv_sglang.linker.device_models import REPLICATED_CLASSES, device_pools, transfer_layers
from flexkv_sglang.linker.device_pages import DevicePages, DevicePool
from flexkv_sglang.linker.leases import Leases
from flexkv_sglang.linker.load import Loader, LoadTimes
from flexkv_sglang.linker.offload import OFFLOAD_S, Offloader
from flexkv_sglang.linker.staging import StagingRows
from flexkv_sglang.pools.pool_rules import KV, MAMBA
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.threads import PeriodicThread

logger = logging.getLogger(__name__)

WATCH_S = 0.1
"""Seconds between two looks for overdue loads and leases."""

QUIET_S = 5.0
"""Seconds that ``reset`` and ``close`` wait for running offloads, and then for each thread."""


class FlexKVLinker(UnifiedCacheLinker, Boundary):  # type: ignore[misc]  # SGLang ships no types
    """One per SGLang rank process. Construction opens all files; raises ``ConfigError`` for settings it cannot serve.

    ``extra_config``: as ``--hicache-storage-backend-extra-config`` of the storage backend. ``components``: of
    SGLang's tree. ``forward_stream``: the stream that writes the device pools. ``metrics``: of KV pages.
    """

    load_times: ClassVar[LoadTimes] = LoadTimes()
    offload_seconds: ClassVar[float] = OFFLOAD_S

    def __init__(
        self,
        server_args: Any,
        params: Any,
        *,
        components: Any,
        extra_config: dict[str, Any] | None = None,
        forward_stream: Any = None,
    ) -> None:
        self.forward_stream = forward_stream
        self._config = FlexKVConfig.parse(extra_config)
        logger.info("flexkv: linker: %s", self._config.describe())
        kvcache = params.token_to_kv_pool_allocator.get_kvcache()
        unified = bool(getattr(server_args, "enable_unified_memory", False))
        self._pools = device_pools(
            kvcache, params, dcp_size=int(get_parallel().attn_dcp_size), unified=unified
        )
        _check_components(components, self._pools)
        replicated = type(kvcache).__name__ in REPLICATED_CLASSES
        storage_config = _storage_config(params, replicated, dict(extra_config or {}))
        specs = PoolSpecs(self._config, storage_config)
        self.metrics = specs.metrics_of(KV)
        prepared = prepare_tiers(self._config)
        self._sharing = Sharing.of(self._config, self.metrics)
        self._stores = PoolStores(self._config, prepared, specs.describe, sharing=self._sharing)
        device = self._pools[0].device
        self._staging = {pool.name: StagingRows(pool.shape, device) for pool in self._pools}
        for pool in self._pools:
            pool.warm_up()
        self.pools = {PoolName(pool.name): pool for pool in self._pools}
        layers = transfer_layers(self._pools)
        self.layer_done_counter = LayerWiseLoadCounter(layers, self._follow_layer)
        self._epoch = 0
        self._closed = False
        install_now()
        self._open_stores()
        self._backfill = LinkerBackfill(self._stores, self._staging)
        self._leases = Leases(self._stores, self._pools, self._backfill.request)
        self._loader = Loader(
            self._stores,
            self._staging,
            self.layer_done_counter,
            layers,
            device,
            self.metrics,
            lambda: self._epoch,
            self.load_times,
        )
        self._offloader = Offloader(
            self._stores,
            self._staging,
            device,
            self.metrics,
            lambda: self._epoch,
            self.offload_seconds,
        )
        self._watch = PeriodicThread(
            "flexkv-watch",
            self._look,
            lambda: self.metrics.count("watch_exceptions"),
            first_s=WATCH_S,
            retry_s=WATCH_S,
        )
        self._watch.start()
        if MAMBA in self._staging:
            params.req_to_token_pool.register_layer_transfer_counter(self.layer_done_counter)
        WEIGHTS.attach(self)

    def _open_stores(self) -> None:
        agree_before_attach()
        try:
            self._stores.open_kv(self._staging[KV], opens=WEIGHTS.settled)
            for name, staging in self._staging.items():
                self._stores.add(name, staging)
            self._stores.registration_done()
        except BaseException:
            self._stores.close()
            raise

    @answers(miss=no_lengths)
    def lookup(self, rid: str, transfers: list[Any]) -> list[int]:
        """Every prefix length, in pages, that can be restored at once. Memory only; renews the request's lease."""
        if self._closed:
            return []
        return self._leases.answer(
            rid, {as_text(transfer.name): transfer.keys or () for transfer in transfers}
        )

    @answers(miss=False)
    def load(self, rid: str, transfers: list[Any]) -> bool:
        """Queue pages for ``start_layer_wise_loading``. ``device_indices``: int64, one per token, whole pages.

        The answer depends on the transfers alone, so it is the same on every rank.
        """
        by_name = {as_text(transfer.name): transfer for transfer in transfers}
        pages = [found for pool in self._pools if (found := _pages_of(pool, by_name))]
        accepted = bool(pages) and self._loader.queue(rid, pages)
        if accepted:
            self._leases.loading(rid)
        return accepted

    @answers(miss=-1)
    def start_layer_wise_loading(self) -> int:
        """Start the queued loads as one batch; its index for ``layer_done_counter``, -1 if none is queued."""
        return self._loader.start()

    @answers(miss=False)
    def finish_layer_wise_loading(self, counter_index: int) -> bool:
        """Wait until no copy of the batch writes device memory, bounded; True if every layer is loaded."""
        loaded, rids = self._loader.finish(counter_index)
        for rid in rids:
            if loaded:
                self._leases.loaded(rid)
            else:
                self._leases.end(rid)
        return loaded

    @answers(miss=False)
    def cancel_queued_load(self, rid: str) -> bool:
        """True if a load of this request was queued and had not been started."""
        cancelled = self._loader.cancel(rid)
        if cancelled:
            self._leases.end(rid)
        return cancelled

    @answers(miss=False)
    def offload(self, transfers: list[Any], session_id: str | None = None) -> bool:
        """Queue pages to be stored. True: exactly one result follows. The answer depends on the transfers alone."""
        by_name = {as_text(transfer.name): transfer for transfer in transfers}
        # KV last: a lookup must not find a page before its sidecars are stored.
        pools = reversed(self._pools)
        pages = [found for pool in pools if (found := _pages_of(pool, by_name))]
        if not pages:
            return False
        try:
            parent = self._leases.page_before(pages[-1].texts[0])
            self._offloader.accept(pages, self.record_offload_ready(), parent)
        except Exception as exc:  # noqa: BLE001 - boundary: all ranks must give one answer
            self._report("offload", exc)
            self._offloader.refuse()
        return True

    @answers(miss=0)
    def num_completed_offloads(self) -> int:
        """Number of results that can be popped, oldest first."""
        return self._offloader.completed()

    @answers(miss=False)
    def pop_completed_offload(self) -> bool:
        """Take the oldest result: True if all its pages are stored."""
        return self._offloader.pop()

    @answers(miss=None)
    def reset(self) -> None:
        """End all transfers, bounded, and forget all results: SGLang empties its cache. Idempotent."""
        self._quiesce(QUIET_S)
        self.layer_done_counter.reset()
        if not self._closed:
            WEIGHTS.flushed()

    def close(self) -> None:
        """End all transfers, bounded, and release the files. Idempotent, never raises."""
        if self._closed or self._stores.process != os.getpid():  # a child's files are the parent's
            return
        self._closed = True
        try:
            WEIGHTS.detach(self)
            self._quiesce(QUIET_S)
            self._watch.stop()
            ended = [
                worker.stop(QUIET_S) for worker in (self._loader, self._offloader, self._backfill)
            ]
            if not all(ended):
                logger.error("flexkv: a transfer hangs while the linker is closed")
            self._watch.join(time.monotonic() + QUIET_S)
            self._stores.close()
            if self._sharing is not None:
                self._sharing.close()
        except Exception as exc:  # noqa: BLE001 - boundary: SGLang calls this while it shuts down
            self._report("close", exc)

    @answers(miss=None)
    def leave_epoch(self) -> None:
        """Called before a weight update: nothing is found or stored from now on; running transfers fail."""
        self._epoch += 1
        self._leases.end_all()
        super().leave_epoch()

    def _quiesce(self, seconds: float) -> None:
        self._loader.quiesce()
        self._leases.end_all()
        self._offloader.quiesce(seconds)

    def _follow_layer(self, index: int, layer: int) -> None:
        try:
            self._loader.follow_layer(index, layer)
        except Exception as exc:  # noqa: BLE001 - boundary: called in the forward pass
            self._report("follow_layer", exc)

    def _look(self) -> float:
        self._loader.fail_overdue()
        self._leases.expire()
        return WATCH_S


def _pages_of(pool: DevicePool, transfers: dict[str, Any]) -> DevicePages | None:
    """The pages of a pool in the transfers; None if there is none, or its indices are not whole pages."""
    transfer = transfers.get(pool.source)
    if transfer is None or not transfer.keys or transfer.device_indices is None:
        return None
    texts, indices = list(transfer.keys), transfer.device_indices
    if len(indices) != len(texts) * pool.page_size:
        return None
    return DevicePages(pool, texts, pool.page_ids(indices), pool.misfit(indices))


def _check_components(components: Any, pools: list[DevicePool]) -> None:
    """Raises ``ConfigError`` when a part of SGLang's tree has no pool."""
    names = {"FULL": KV, "SWA": "swa", "MAMBA": MAMBA}
    carried = {pool.name for pool in pools}
    for component in components:
        name = getattr(component, "name", str(component))
        if names.get(name) not in carried:
            raise ConfigError(
                f"tree component: {name}: the linker has no pool for it. Valid: {', '.join(sorted(carried))}"
            )


def _storage_config(params: Any, replicated: bool, extra: dict[str, Any]) -> HiCacheStorageConfig:
    """The configuration that SGLang's cache controller would give a storage backend of this rank."""
    parallel = get_parallel()
    attention = is_dp_attention_enabled()
    cp_rank, cp_size = 0, 1
    if params.attn_cp_cache_group is not None:
        cp_rank = torch.distributed.get_rank(group=params.attn_cp_cache_group)
        cp_size = torch.distributed.get_world_size(group=params.attn_cp_cache_group)
    return HiCacheStorageConfig(
        tp_rank=parallel.attn_tp_rank if attention else parallel.tp_rank,
        tp_size=parallel.attn_tp_size if attention else parallel.tp_size,
        pp_rank=parallel.pp_rank,
        pp_size=parallel.pp_size,
        attn_cp_rank=cp_rank,
        attn_cp_size=cp_size,
        is_mla_model=replicated,
        enable_storage_metrics=bool(getattr(params, "enable_metrics", False)),
        is_page_first_layout=False,
        model_name=None,
        dp_rank=parallel.attn_dp_rank if attention else 0,
        extra_config=extra,
    )
