"""PoolStores: the stores of a model's host pools, one for each, opened, exchanged and closed together.

A plain model has one pool, KV. A hybrid model has more (Mamba state, sliding windows, indexer keys, ...): SGLang
registers the KV pool first, then the others in a quick series, and some later. So KV is opened at once, which is when
a wrong setting can still stop the start. After the series it is opened again with a smaller quota, if there are
others. The division is remembered (``quotas``): the next start divides at once.

After that nothing raises: a pool that cannot be stored or opened has no pages, so a prefix that needs it misses.

A weight update moves all pools together: ``suspend`` closes their namespaces before it, ``resume`` opens those of the
new weights when no call runs that may have begun with the old ones.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.cache.assembly import Quota, check_capacity, open_tiers
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError, FlexKVError, TierUnavailableError
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.pools.call_gate import CallGate
from flexkv_sglang.pools.head_groups import WHOLE, HeadGroups
from flexkv_sglang.pools.host_pages import UnsupportedPoolError, first_page, open_pages
from flexkv_sglang.pools.opener import Opener
from flexkv_sglang.pools.pool import Describe, Pool, SizeClaim
from flexkv_sglang.pools.pool_rules import KV, default_density, expected_policy
from flexkv_sglang.pools.quotas import Quotas
from flexkv_sglang.pools.state import Event, State, StoresState
from flexkv_sglang.pools.suspended import SuspendedNamespaces
from flexkv_sglang.prefix import POLICIES, PoolRequirement
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.types import SECTOR, round_up

logger = logging.getLogger(__name__)

_EXCHANGE_S = 0.5
"""How long a call waits while files are exchanged, and how long an exchange waits for the calls that run.

A call may wait for both before it begins; SGLang's threads are given 10 s to end when a backend is detached.
"""

_OPEN_S = 1.0
"""How long a call waits for files that are opened because of it. A disk may never answer: opening goes on alone."""

_SUSPEND_S = 9.0
"""How long a weight update waits for calls that run: a little more than the time limit of one call."""


class PoolStores:
    """The stores of one attach. ``StoresState`` has the table of their states and of the events, the methods here.

    ``process``: the only one that may use them, not one that it forks. ``describe`` is called once per pool that can
    be stored and per weight update. ``groups``: how pages are cut into head groups where that is possible.
    ``sharing``: with other nodes; it is not closed with the stores.

    Threads: any; ``suspend`` and ``resume``: SGLang's scheduler. Calls run ``in_use``; files are exchanged while no
    call runs.
    """

    def __init__(
        self,
        config: FlexKVConfig,
        prepared: Sequence[Mapping[str, IoMode]],
        describe: Describe,
        groups: HeadGroups = WHOLE,
        sharing: Sharing | None = None,
    ) -> None:
        self.process = os.getpid()
        self.prepared = prepared
        self._config = config
        self._describe = describe
        self._groups = groups
        self._sharing = sharing
        self._state = StoresState()
        self._gate = CallGate()  # exclusive while files are closed and opened
        self._quotas = Quotas(config, prepared)
        self._suspended = SuspendedNamespaces(prepared)
        self._opener = Opener(self.open_pending)
        self._pools: dict[str, Pool | None] = {}  # None: cannot be stored
        self._host_pools: dict[str, Any] = {}
        self._unstored: dict[str, str] = {}  # why a registered pool has no pages
        self._adds_open = False  # registration is done: a pool that is added now opens at once
        self._clear_owed = False  # a clear found files closed, and reaches them when they open
        self._unknown_policies = RateLimitedLog(logger, math.inf)

    def open_kv(self, host_pool: Any, *, opens: bool = True) -> None:
        """Begin with the KV pool. Raises ``ConfigError`` for settings that cannot work.

        ``opens``: False while the weights change: ``resume`` opens the files.
        """
        self.close()
        self._clear_owed = self._adds_open = False
        self._pools, self._host_pools, self._unstored = {}, {KV: host_pool}, {}
        kv = self._pools[KV] = self._probe(KV, host_pool)
        expects_more = kv is not None and (self._quotas.recall(kv) or kv.is_marker)
        if not opens:
            self._state.start(State.SUSPENDED)
        else:
            self._state.start(State.PENDING if expects_more else State.OPEN)
        if kv is None:
            return
        if kv.is_marker or not opens:  # a marker pool needs little space: wait for the others
            check_capacity(self._config, self.prepared)
            return
        try:
            self._open(kv, self._quotas.of(kv, self._quotas.claims))
        except ConfigError:
            if len(self._quotas.claims) == 1:
                raise
            self._quotas.claims = [kv.claim]
            self._open(kv, self._quotas.of(kv, self._quotas.claims))

    def add(self, name: str, host_pool: Any) -> None:
        """Add a further pool. Its files are opened when registration is done, or by the first call after that."""
        if name == KV or self._host_pools.get(name) is host_pool:
            return
        self._host_pools[name] = host_pool
        old, self._pools[name] = self._pools.get(name), None
        self._unstored[name] = "it could not be looked at, see the log"
        try:
            if old is not None:
                with self._gate.exclusive(_EXCHANGE_S):
                    old.close()
            self._pools[name] = self._probe(name, host_pool)
        finally:  # a pool that failed is noted in the next exchange
            self._state.apply(Event.ADD)
        if self._adds_open:
            self.open_pending()

    def registration_done(self) -> None:
        """SGLang has registered the pools it starts with; others may follow one by one."""
        self._adds_open = True
        self.open_pending()

    def open_pending(self) -> None:
        """Divide the size among the pools and open the files that are not open. Does not raise.

        If running calls do not end in time, nothing changes, and the next call tries again.
        """
        with self._gate.exclusive(_EXCHANGE_S) as alone:
            if not alone or self._state.now is not State.PENDING:
                return
            kv, pools = self._pools.get(KV), self._storable()
            self._suspended.take(pool for pool in pools if pool.opened_as != pool.spec.identity)
            if kv is None or (kv.is_marker and len(pools) == 1) or not self._deleted_old(pools):
                return
            if self._state.apply(Event.EXCHANGE) is State.OPEN:
                self._exchange(kv, pools)

    def _exchange(self, kv: Pool, pools: Sequence[Pool]) -> None:
        quotas = self._quotas.divide(pools)
        for pool in pools:
            if pool.quotas != quotas[pool.name] or (pool.store is not None and pool.store.may_grow):
                pool.close()
                pool.quotas = ()
        for pool in pools:
            if pool.store is None:
                self._try_open(pool, quotas[pool.name])
        if self._clear_owed:
            self._clear_owed = any(pool.store is None for pool in pools)
            self._clear_open()
        self._quotas.remember(kv, self._unstored)
        for pool in pools:  # those that were removed or replaced while we opened files
            if self._state.now is State.CLOSED or self._pools.get(pool.name) is not pool:
                pool.close()

    def suspend(self) -> None:
        """Weights are about to change: from now on every page misses and none is written.

        Calls that run end in the old namespaces or, after a bounded wait, with an error.
        """
        self._state.apply(Event.SUSPEND)
        with self._gate.exclusive(_SUSPEND_S):
            self._suspended.take(self._storable())
        if not self._suspended.released():
            logger.error("flexkv: a transfer hangs in an old namespace: pages miss")

    def resume(self) -> None:
        """No older KV cache is left: delete the files of suspended namespaces, and open those of the new weights.

        Both together never exceed ``size``. If older calls or transfers still run, the first call after them does it.
        Raises ``ConfigError`` as ``describe`` does; then all stay suspended.
        """
        if self._state.now is not State.SUSPENDED:
            return
        pools = self._storable()
        specs = [
            self._describe(pool.name, self._host_pools[pool.name], pool.pages) for pool in pools
        ]
        for pool, spec in zip(pools, specs, strict=True):
            pool.spec = spec
        self._state.apply(Event.RESUME)
        self._opener.run(_SUSPEND_S)

    def _deleted_old(self, pools: Sequence[Pool]) -> bool:
        """Delete the files of suspended namespaces; those of the current weights stay. True if none is left."""
        if not self._suspended.released():
            return False
        try:
            self._suspended.delete(keep={pool.spec.identity.namespace for pool in pools})
        except OSError as exc:
            self._state.apply(Event.DELETE_FAILED)
            logger.error("flexkv: old pages cannot be deleted, all miss until a flush: %s", exc)
            return False
        return True

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The time of one call, in which no file is exchanged. Raises ``TierUnavailableError`` after a bounded wait."""
        if self._state.now is State.OPEN and self._may_grow():
            self._state.apply(Event.GROW)
        if self._state.now is State.PENDING:
            self._opener.run(_OPEN_S)
        with self._gate.shared(_EXCHANGE_S):
            yield

    def get(self, name: str) -> Pool | None:
        """The pool of this name if it is open for the current weights. Use it ``in_use`` only."""
        pool = self._pools.get(name)
        available = pool is not None and pool.ready and self._state.now is not State.SUSPENDED
        return pool if available else None

    def sidecars(self) -> list[PoolRequirement]:
        """What each registered pool beside KV requires of a prefix, as far as is known."""
        return [
            pool.requirement if pool is not None else PoolRequirement(name)
            for name, pool in list(self._pools.items())
            if name != KV
        ]

    def learn(self, requirement: PoolRequirement) -> None:
        """Note a requirement of SGLang. Of windows the widest one counts: a prefix may need it."""
        pool = self._pools.get(requirement.pool)
        if requirement.policy not in POLICIES:
            text = "flexkv: host pool %s: hit policy %r is not known: no prefix is found"
            pool_name, policy = requirement.pool, requirement.policy
            self._unknown_policies.log(policy, logging.ERROR, text, pool_name, policy)
        if pool is not None and pool.requirement != requirement:
            same = pool.requirement.policy == requirement.policy
            widest = max(pool.requirement.window, requirement.window)
            pool.requirement = replace(requirement, window=widest) if same else requirement

    def clear(self) -> None:
        """Forget every page of this process in all its namespaces. Files that are closed now follow when they open."""
        try:
            with self.in_use():
                self._clear_owed = self._state.now in (State.PENDING, State.SUSPENDED)
                self._clear_open()
        except TierUnavailableError:  # files are being exchanged
            self._clear_owed = True
            self._state.apply(Event.CLEAR_LATER)

    def _clear_open(self) -> None:
        for pool in self._storable():
            if pool.store is not None:
                pool.store.clear()

    def close(self) -> None:
        """Close all stores. One that fails keeps no other open. They stay closed. Idempotent."""
        self._state.apply(Event.CLOSE)
        with self._gate.exclusive(_EXCHANGE_S), ExitStack() as stack:
            for pool in self._storable():
                stack.callback(pool.close)

    def _may_grow(self) -> bool:
        return any(pool.store is not None and pool.store.may_grow for pool in self._storable())

    def _storable(self) -> list[Pool]:
        return [pool for pool in list(self._pools.values()) if pool is not None]

    def _probe(self, name: str, host_pool: Any) -> Pool | None:
        try:
            pages = open_pages(host_pool, self._groups)
        except UnsupportedPoolError as exc:
            text = "flexkv: host pool %s cannot be stored, every page will miss: %s"
            logger.error(text, name, exc)
            self._unstored[name] = str(exc)
            return None
        spec = self._describe(name, host_pool, pages)
        density = dict(self._config.pool_density).get(name, default_density(name))
        slot_bytes = round_up(pages.geometry.payload_bytes, SECTOR) * pages.groups.count
        claim = SizeClaim.of(name, slot_bytes, max(1, spec.writers), density)
        text = "flexkv: host pool %s (%s, %s) is stored by %s"
        logger.info(text, name, type(host_pool).__name__, host_pool.layout, pages.how)
        return Pool(name, pages, spec, claim, PoolRequirement(name, expected_policy(name)))

    def _open(self, pool: Pool, quotas: tuple[Quota, ...]) -> None:
        identity = pool.spec.identity
        store = open_tiers(
            self._config,
            self.prepared,
            identity.namespace,
            identity.fields(),
            pool.slot_payload,
            quotas,
            pool.spec.metrics,
            self._sharing,
        )
        for address, byte_count in pool.pages.memory():
            store.register_memory(address, byte_count)
        page = first_page(pool.pages)
        if page is not None:
            store.prepare(page.buffers)
        pool.store, pool.opened_as, pool.quotas = store, identity, quotas
        self._unstored.pop(pool.name, None)
        self._quotas.log(pool)

    def _try_open(self, pool: Pool, quotas: tuple[Quota, ...]) -> None:
        try:
            self._open(pool, quotas)
        except (FlexKVError, OSError, ValueError) as exc:
            text = "flexkv: host pool %s is not stored, prefixes that need it miss: %s"
            logger.error(text, pool.name, exc)
            self._unstored[pool.name] = str(exc)
