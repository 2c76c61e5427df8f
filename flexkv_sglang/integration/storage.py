"""FlexKVStorage: SGLang's storage interface on top of the pool stores.

The boundary: after construction nothing is raised into SGLang, except by ``register_mem_pool_host``: SGLang calls it
while it attaches, and it is the first to know the page size. Each other failure is counted, logged once per kind and
minute, and answered as a miss of the right shape.

Threads: SGLang calls from its prefetch, prefetch I/O, backup and scheduler threads; all may overlap.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

from flexkv_sglang.cache.assembly import prepare_tiers
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError
from flexkv_sglang.identity.epochs import WEIGHTS
from flexkv_sglang.identity.keys import page_key, page_keys
from flexkv_sglang.integration.boundary import (
    Boundary,
    answers,
    no_pages,
    no_prefix,
    no_tensors,
    no_transfers,
)
from flexkv_sglang.integration.compat import (
    as_text,
    pool_requirement,
    pool_result,
    transfer_stats,
)
from flexkv_sglang.integration.pool_identity import PoolSpecs
from flexkv_sglang.integration.weight_updates import agree_before_attach, install_now
from flexkv_sglang.pools.head_groups import WHOLE, HeadGroups
from flexkv_sglang.pools.pool import Pool
from flexkv_sglang.pools.pool_rules import KV
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.pools.transfers import PoolAnswer, fetch, read, store, usable, write
from flexkv_sglang.prefix import PoolRequirement, RestorablePrefixes
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.types import PageKey

logger = logging.getLogger(__name__)

PREFETCH_TIMEOUT = (1.0, 0.25)
"""SGLang's defaults for the wait for a prefetch: seconds, and further seconds per 1024 tokens."""

READ_SECONDS_MIN = 0.05
"""The shortest time limit of a get."""

CALL_SECONDS_MAX = 6.0
"""The longest time limit of a get, and the limit of a put. With the waits before (``PoolStores.in_use``) and after
(the commit) it must be less than the 10 s for which SGLang joins its storage threads when a backend is detached."""


class FlexKVStorage(HiCacheStorage, Boundary):  # type: ignore[misc]  # SGLang ships no types
    """The third level of HiCache: tiers of this machine and of others. One per SGLang rank process and attach.

    The constructor parses the configuration and tests the directories with real I/O (``ConfigError`` names key, value
    and valid choices). ``register_mem_pool_host`` opens the KV namespace and its files. ``metrics``: of KV pages.
    """

    def __init__(self, storage_config: Any, _kwargs: Any = None) -> None:
        agree_before_attach()  # before steps that may fail on one rank only
        self._config = FlexKVConfig.parse(storage_config.extra_config)
        specs = PoolSpecs(self._config, storage_config)
        self.metrics = specs.metrics_of(KV)
        self._prefetch_timeout = PREFETCH_TIMEOUT
        logger.info("flexkv: %s", self._config.describe())
        groups = HeadGroups.of(storage_config)
        prepared = prepare_tiers(self._config)
        install_now()
        # last: from here on there are threads
        self._sharing = Sharing.of(self._config, self.metrics)
        self._stores = PoolStores(self._config, prepared, specs.describe, groups, self._sharing)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Learn the page geometry, open the namespace, recover its pages.

        Raises ``ConfigError`` (SGLang then refuses to start, or answers 400) for a size that is too small for one page
        or too large for the disk. A pool without page buffers is no error: all its pages miss.
        """
        super().register_mem_pool_host(mem_pool_host)
        if self._stores.process != os.getpid():
            raise ConfigError(
                "this process was forked after the storage backend was made: make its own"
            )
        if not WEIGHTS.settled:
            logger.warning("flexkv: weights were updated: pages miss until the cache is flushed")
        self._stores.open_kv(mem_pool_host, opens=WEIGHTS.settled)
        WEIGHTS.attach(self)

    @answers(miss=None)
    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Called for every pool of a hybrid model, KV included, after ``register_mem_pool_host``."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._stores.add(as_text(host_pool_name), host_pool)

    @answers(miss=None)
    def on_host_pools_registered(self) -> None:
        """SGLang has registered its first pools. Before 0.5.23 it does not call this: the first call opens them."""
        self._stores.registration_done()

    def set_prefetch_timeout(self, base: float, per_ki_token: float) -> None:
        """Set the time SGLang waits for a prefetch, in seconds and seconds per 1024 tokens. It limits a get."""
        given: tuple[Any, Any] = (base, per_ki_token)
        if not all(isinstance(part, int | float) and part >= 0 for part in given):  # nor a NaN
            logger.warning("flexkv: a prefetch timeout of %r is not taken: no seconds", given)
            return
        self._prefetch_timeout = (base, per_ki_token)
        text = "flexkv: SGLang waits %g s and %g s per 1024 tokens for a prefetch; reads keep within that"
        logger.info(text, base, per_ki_token)

    def close(self) -> None:
        """Wait for running transfers, flush, release the files. Idempotent, never raises."""
        if self._stores.process != os.getpid():  # they are the parent's
            return
        try:
            WEIGHTS.detach(self)
            try:
                self._stores.close()
            finally:
                if self._sharing is not None:
                    self._sharing.close()
        except Exception as exc:  # noqa: BLE001 - boundary: SGLang calls this from detach and atexit
            self._report("close", exc)

    @answers(miss=0, uses_stores=True)
    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """Length of the leading run of pages that a get can read. Uses memory only.

        Of a hybrid model: the longest prefix that also has the required pages of the other known pools.
        """
        return self._usable(keys, self._stores.sidecars()).pages

    @answers(miss=no_prefix, uses_stores=True)
    def batch_exists_v2(
        self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None
    ) -> Any:
        """Prefixes for which each pool has the required pages, as ``PoolTransferResult``. Uses memory only."""
        requirements = [pool_requirement(transfer) for transfer in pool_transfers or ()]
        for requirement in requirements:
            self._stores.learn(requirement)
        return pool_result(self._usable(keys, requirements or self._stores.sidecars()))

    def _usable(
        self, keys: Sequence[str], requirements: list[PoolRequirement]
    ) -> RestorablePrefixes:
        kv = self._stores.get(KV)
        if kv is None:
            return RestorablePrefixes([], {})
        started = time.perf_counter()
        found = usable(self._stores, kv, keys, requirements)
        self.metrics.asked(len(keys), found.pages, time.perf_counter() - started)
        return found

    @answers(miss=no_pages, uses_stores=True)
    def batch_get_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Read pages into the host pool at ``host_indices`` (int64, ``len(keys) * page_size``)."""
        pool = self._stores.get(KV)
        flags = read(pool, page_keys(keys), host_indices, self._deadline(len(keys)))
        return self._checked(flags, pool, keys, host_indices)

    @answers(miss=no_pages, uses_stores=True)
    def batch_set_v1(
        self, keys: list[str], host_indices: Any, extra_info: Any = None
    ) -> list[bool]:
        """Write pages of the host pool at ``host_indices`` (int64, ``len(keys) * page_size``)."""
        deadline = time.monotonic() + CALL_SECONDS_MAX
        pool = self._stores.get(KV)
        flags = write(pool, page_keys(keys), host_indices, _parent_of(extra_info), deadline)
        return self._checked(flags, pool, keys, host_indices)

    @answers(miss=no_transfers, uses_stores=True)
    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Read pages of several pools. The answer has each pool, with one bool per key."""
        pages = sum(len(transfer.keys or ()) for transfer in transfers)
        deadline = self._deadline(pages, reads=len(transfers))
        answer = PoolAnswer()
        for transfer in transfers:
            pool = self._stores.get(as_text(transfer.name))
            keys, indices = list(transfer.keys or ()), transfer.host_indices
            flags = read(pool, page_keys(keys), indices, deadline)
            answer.add(transfer.name, self._checked(flags, pool, keys, indices))
        return answer.results

    @answers(miss=no_transfers, uses_stores=True)
    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """Write pages of several pools (SGLang: before the KV pages they go with). Answer: as ``batch_get_v2``."""
        deadline = time.monotonic() + CALL_SECONDS_MAX
        parent = _parent_of(extra_info)
        answer = PoolAnswer()
        for transfer in transfers:
            pool = self._stores.get(as_text(transfer.name))
            keys, indices = list(transfer.keys or ()), transfer.host_indices
            flags = write(pool, page_keys(keys), indices, parent, deadline)
            answer.add(transfer.name, self._checked(flags, pool, keys, indices))
        return answer.results

    @answers(miss=False)
    def exists(self, key: str) -> bool:
        """True if a get can read this page."""
        return bool(self.batch_exists([key]))

    @answers(miss=None)
    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Read one flat page into ``target_location`` (a CPU tensor) and return it; None on a miss."""
        return self.batch_get([key], [target_location])[0]

    @answers(miss=no_tensors, uses_stores=True)
    def batch_get(
        self, keys: list[str], target_locations: Any = None, target_sizes: Any = None
    ) -> list[Any]:
        """Read flat pages into ``target_locations``; per key the tensor, or None from the first miss on."""
        kv = self._stores.get(KV)
        if kv is None or not keys or target_locations is None:
            return [None] * len(keys)
        wanted = page_keys(keys)
        batch = kv.pages.flat(list(target_locations), wanted)
        if batch is None:
            return [None] * len(keys)
        done = fetch(kv, wanted, batch, self._deadline(len(keys)))
        return [
            tensor if flag else None for tensor, flag in zip(target_locations, done, strict=True)
        ]

    @answers(miss=False)
    def set(
        self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None
    ) -> bool:
        """Write one flat page (a CPU tensor)."""
        return self.batch_set([key], [value])

    @answers(miss=False, uses_stores=True)
    def batch_set(
        self,
        keys: list[str],
        values: Any = None,
        target_locations: Any = None,
        target_sizes: Any = None,
    ) -> bool:
        """Write flat pages (CPU tensors). True if all of them are stored now."""
        kv = self._stores.get(KV)
        if kv is None or values is None:
            return False
        if not keys:
            return True
        written = page_keys(keys)
        kept = [value.contiguous() for value in values]  # alive until the write is done
        batch = kv.pages.flat(kept, written)
        if batch is None:
            return False
        deadline = time.monotonic() + CALL_SECONDS_MAX
        return all(store(kv, written, batch, None, deadline))

    @answers(miss=None)
    def clear(self) -> None:
        """Forget each page that this process stored for this model. Pages of files that are being exchanged follow."""
        self._stores.clear()

    @answers(miss=None)
    def get_stats(self) -> Any:
        """Transfers since the last call, as SGLang's ``StorageMetrics`` (GB/s)."""
        kv = self._stores.get(KV)
        groups = WHOLE if kv is None else kv.pages.groups
        return transfer_stats(*self.metrics.drain_transfers(), groups.count)  # of KV only

    def _deadline(self, page_count: int, reads: int = 1) -> float:
        """Deadline of a get of ``page_count`` pages over ``reads`` pools. Each page has the tokens of a KV page.

        A get may take 0.8 of the time that its tokens add to SGLang's prefetch timeout, or half of its base.
        """
        kv = self._stores.get(KV)
        tokens = page_count * (kv.pages.tokens_per_page if kv is not None else 1)
        base, per_ki_token = self._prefetch_timeout
        least = max(0.5 * base, READ_SECONDS_MIN) * reads
        seconds = max(least, 0.8 * per_ki_token * tokens / 1024)
        return time.monotonic() + min(seconds, CALL_SECONDS_MAX)

    def _checked(
        self, flags: list[bool] | None, pool: Pool | None, keys: list[str], host_indices: Any
    ) -> list[bool]:
        """The answer of a transfer; None means that ``host_indices`` are not one whole page of the pool per key."""
        if flags is not None:
            return flags
        given = 0 if host_indices is None else int(host_indices.numel())
        name = pool.name if pool is not None else ""
        text = f"{name}: {given} indices are not {len(keys)} whole pages of the host pool"
        self._report("host_indices", ConfigError(text))
        return [False] * len(keys)


def _parent_of(extra_info: Any) -> PageKey | None:
    """The page before the batch: the last of ``prefix_keys``, if SGLang passes them. 0.5.11 passes ``(None,)``."""
    prefix = getattr(extra_info, "prefix_keys", None)
    return page_key(prefix[-1]) if prefix and prefix[-1] is not None else None
