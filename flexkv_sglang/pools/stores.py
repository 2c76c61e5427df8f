"""PoolStores: one store per host pool of a model, and how they divide the configured size.

A plain model has one pool, KV. A hybrid model registers more (Mamba state, sliding windows, indexer keys, ...), and
SGLang says so late: the KV pool comes first and alone, the rest in a burst after it, some at any time. So KV is
opened at once, which is when a wrong setting can still stop the start; the burst reopens it with a smaller
share if there are others. What was found is remembered beside the KV pages: the next start divides at once.

After that nothing raises: a pool that cannot be stored or opened holds nothing, and so what needs it misses.

A weight update moves all pools at once: they ``leave`` their namespaces before it, and ``enter`` those of the new
weights when no call runs that may have begun with the old ones.

Threads: any; ``leave`` and ``enter``: SGLang's scheduler. Calls are made ``in_use``; files are exchanged when none is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.cache.assembly import (
    Quota,
    check_capacity,
    open_tiers,
    reclaim,
    remember,
    remembered,
)
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.config.settings import FlexKVConfig
from flexkv_sglang.errors import ConfigError, FlexKVError, TierUnavailableError
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.pools.call_gate import CallGate
from flexkv_sglang.pools.flat_pages import open_pages
from flexkv_sglang.pools.head_groups import WHOLE, HeadGroups
from flexkv_sglang.pools.host_pages import UnsupportedPoolError
from flexkv_sglang.pools.pool import Describe, Pool
from flexkv_sglang.pools.pool_rules import (
    KV,
    SizeClaim,
    claims_from,
    default_density,
    divide,
    expected_policy,
    part_of,
)
from flexkv_sglang.prefix import POLICIES, PoolRequirement
from flexkv_sglang.sharing.rank import Sharing
from flexkv_sglang.types import SECTOR, round_up

logger = logging.getLogger(__name__)

_EXCHANGE_S = 0.5
"""How long a call waits for files that are being opened, and opening them for the calls that run.

A call may wait for both before it begins; SGLang's threads are given 10 s to end when a backend is detached.
"""

_OPEN_S = 1.0
"""How long a call waits for files that are opened because of it. A disk may never answer: it goes on alone."""

_SUSPEND_S = 9.0
"""How long a weight update waits for calls that run: a little more than the adapter gives one of them."""


class PoolStores:
    """The stores of one attach. ``describe`` is asked once per pool that can be stored and per epoch of weights;
    ``groups``: how pages are cut where that is possible; ``sharing``: with other nodes, not closed with the stores."""

    def __init__(
        self,
        config: FlexKVConfig,
        prepared: Sequence[Mapping[str, IoMode]],
        describe: Describe,
        groups: HeadGroups = WHOLE,
        sharing: Sharing | None = None,
    ) -> None:
        self._config = config
        self._sharing = sharing
        self.prepared = prepared
        self._describe = describe
        self._groups = groups
        self._pools: dict[str, Pool | None] = {}  # None: cannot be stored
        self._host_pools: dict[str, Any] = {}
        self._divided: list[SizeClaim] = []  # what the shares of the open stores assume
        self._unsettled = False
        self._registration_done = False
        self._away = False  # the weights change, or older KV cache may be left: nothing is open
        self._left: list[tuple[Identity, Tiers]] = []  # closed, their files not yet deleted
        self._gate = CallGate()  # shut while files are closed and opened
        self._policies = set(POLICIES)  # and those that were complained about
        self._closed = threading.Event()
        self._owes_clear = False  # a clear that found files closed
        self._unstored: dict[str, str] = {}  # registered pools that hold nothing, and why
        self._opener = threading.Thread()  # settles for calls
        self._opener_guard = threading.Lock()

    def open_kv(self, host_pool: Any, *, opens: bool = True) -> None:
        """The KV pool: start anew with it. Raises ``ConfigError`` for settings that cannot work.

        ``opens``: False as after ``leave``: files are opened by ``enter``.
        """
        self.close()
        self._owes_clear = False
        self._closed.clear()
        self._away = not opens
        self._pools, self._host_pools = {}, {KV: host_pool}
        self._registration_done, self._unstored = False, {}
        kv = self._pools[KV] = self._probe(KV, host_pool)
        if kv is None:
            return
        namespace = kv.spec.identity.namespace
        before = claims_from(remembered(self.prepared, namespace, "pools"))
        self._divided = before if kv.claim in before else [kv.claim]
        others = remembered(self.prepared, namespace, "unstored")
        self._unsettled = len(self._divided) > 1 or bool(others)
        if kv.is_marker or not opens:  # few bytes beside others that must still come; or not yet
            self._unsettled = True
            check_capacity(self._config, self.prepared)
            return
        try:
            self._open(kv, self._quotas(kv, self._divided))
        except ConfigError:
            if len(self._divided) == 1:
                raise
            self._divided = [kv.claim]
            self._open(kv, self._quotas(kv, self._divided))

    def add(self, name: str, host_pool: Any) -> None:
        """A further pool. Its files are opened when the burst is over, or by the first call after it."""
        if name == KV or self._host_pools.get(name) is host_pool:
            return
        self._host_pools[name] = host_pool
        old, self._pools[name] = self._pools.get(name), None
        self._unstored[name] = "it could not be looked at, see the log"
        self._unsettled = True
        if old is not None:
            with self._gate.exclusive(_EXCHANGE_S):
                old.close()
        self._pools[name] = self._probe(name, host_pool)
        if self._registration_done:
            self.open_pending()

    def registration_done(self) -> None:
        """SGLang has registered the pools it knows of; others may come one by one."""
        self._registration_done = True
        self.open_pending()

    def open_pending(self) -> None:
        """Divide the size among the pools there are and open what is not open. Does not raise.

        While calls run that do not end, nothing changes, and the next call tries again.
        """
        with self._gate.exclusive(_EXCHANGE_S) as alone:
            kv = self._pools.get(KV)
            pools = [pool for pool in list(self._pools.values()) if pool is not None]
            if not alone or not self._unsettled or self._away or self._closed.is_set():
                return
            self._leave([pool for pool in pools if pool.opened_as != pool.spec.identity])
            if kv is None or (kv.is_marker and len(pools) == 1) or not self._reclaimed(pools):
                return
            self._unsettled = False
            claims = sorted((pool.claim for pool in pools), key=lambda claim: claim.name)
            changed = claims != self._divided
            quotas = {
                pool.name: self._quotas(pool, claims) if changed or not pool.quotas else pool.quotas
                for pool in pools
            }
            self._divided = claims
            for pool in pools:
                if changed and pool.quotas != quotas[pool.name]:
                    pool.close()
                    pool.quotas = ()
            for pool in pools:
                if pool.store is None:
                    self._try_open(pool, quotas[pool.name])
            if self._owes_clear:
                self._clear()
            self._remember(kv, claims, division=changed or len(claims) > 1)
            for pool in pools:  # what happened meanwhile did not wait for us
                if self._closed.is_set() or self._pools.get(pool.name) is not pool:
                    pool.close()

    def suspend(self) -> None:
        """Weights are about to change: every page misses, none is written. Running calls end in the old namespaces,
        or, past a bound, in an error."""
        self._away = True
        with self._gate.exclusive(_SUSPEND_S):
            self._leave([pool for pool in list(self._pools.values()) if pool is not None])
        if not all(store.released() for _, store in self._left):
            logger.error("flexkv: a transfer hangs in an old namespace: pages miss")

    def _leave(self, pools: Sequence[Pool]) -> None:
        with ExitStack() as stack:  # all, also when one fails
            for pool in pools:
                if pool.store is not None and pool.opened_as is not None:
                    self._left.append((pool.opened_as, pool.store))
                    stack.callback(pool.close)

    def resume(self) -> None:
        """No older KV cache is left: delete the files of the namespaces that were left, open those of the new
        weights. Both together never exceed ``size``. If calls or transfers of before still run, the first call
        after them does it. Raises ``ConfigError`` as ``describe`` does; then all stay away."""
        if not self._away:
            return
        pools = [pool for pool in list(self._pools.values()) if pool is not None]
        specs = [
            self._describe(pool.name, self._host_pools[pool.name], pool.pages) for pool in pools
        ]
        for pool, now in zip(pools, specs, strict=True):
            pool.spec = now
        self._away, self._unsettled = False, True
        self._settle_within(_SUSPEND_S)

    def _settle_within(self, seconds: float) -> None:
        """``settle`` in another thread, which goes on if it takes longer."""
        with self._opener_guard:
            if not self._opener.is_alive():
                self._opener = threading.Thread(
                    target=self._settle_alone, name="flexkv-opener", daemon=True
                )
                self._opener.start()
        self._opener.join(seconds)

    def _settle_alone(self) -> None:
        try:
            self.open_pending()
        except Exception as exc:  # the end of a thread: calls go on to miss
            logger.error("flexkv: files could not be opened", exc_info=exc)

    def _reclaimed(self, pools: Sequence[Pool]) -> bool:
        """Is nothing left of namespaces that were left? Those that are entered again keep their files."""
        if not all(store.released() for _, store in self._left):
            return False
        entered = {pool.spec.identity.namespace for pool in pools}
        try:
            while self._left:
                left = self._left.pop()
                if left[0].namespace not in entered:
                    reclaim(left[1], self.prepared, left[0])
        except OSError as exc:
            self._left.append(left)
            self._away = True
            logger.error("flexkv: old pages cannot be deleted, all miss until a flush: %s", exc)
        return not self._left

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The time of one call, in which no file is exchanged. Raises ``TierUnavailableError`` after a bounded wait."""
        if self._unsettled and not self._away:
            self._settle_within(_OPEN_S)
        with self._gate.shared(_EXCHANGE_S):
            yield

    def get(self, name: str) -> Pool | None:
        """The pool of this name if it is open for the weights as they are now. To be used ``in_use``."""
        pool = self._pools.get(name)
        return pool if pool is not None and pool.ready and not self._away else None

    def sidecars(self) -> list[PoolRequirement]:
        """What every registered pool beside KV asks of a prefix, as far as is known."""
        return [
            pool.requirement if pool is not None else PoolRequirement(name)
            for name, pool in list(self._pools.items())
            if name != KV
        ]

    def learn(self, requirement: PoolRequirement) -> None:
        """SGLang asked for this: the widest window it ever asked for is what a prefix may need."""
        pool = self._pools.get(requirement.pool)
        if requirement.policy not in self._policies:
            self._policies.add(requirement.policy)
            text = "flexkv: host pool %s: hit policy %r is not known: no prefix is found"
            logger.error(text, requirement.pool, requirement.policy)
        if pool is not None and pool.requirement != requirement:
            same = pool.requirement.policy == requirement.policy
            window = (
                max(pool.requirement.window, requirement.window) if same else requirement.window
            )
            pool.requirement = replace(requirement, window=window)

    def clear(self) -> None:
        """Forget every page of this process in all of its namespaces; of files that are closed now, when they open."""
        try:
            with self.in_use():
                self._owes_clear = self._away or self._unsettled
                self._clear()
        except TierUnavailableError:  # they are being opened
            self._owes_clear = self._unsettled = True

    def _clear(self) -> None:
        for pool in list(self._pools.values()):
            if pool is not None and pool.store is not None:
                pool.store.clear()

    def close(self) -> None:
        """Close all stores, also when one fails; they stay closed. Idempotent."""
        self._unsettled = False
        self._closed.set()
        with self._gate.exclusive(_EXCHANGE_S):
            self._close_all()

    def _close_all(self) -> None:
        with ExitStack() as stack:
            for pool in list(self._pools.values()):
                if pool is not None:
                    stack.callback(pool.close)

    def _probe(self, name: str, host_pool: Any) -> Pool | None:
        try:
            pages = open_pages(host_pool, self._groups)
        except UnsupportedPoolError as exc:
            text = "flexkv: host pool %s cannot be stored, every page will miss: %s"
            logger.error(text, name, exc)
            self._unstored[name] = str(exc)
            return None
        specs = self._describe(name, host_pool, pages)
        density = dict(self._config.pool_density).get(name, default_density(name))
        slot_bytes = round_up(pages.geometry.payload_bytes, SECTOR) * pages.groups.count
        claim = SizeClaim.of(name, slot_bytes, max(1, specs.writers), density)
        logger.info(
            "flexkv: host pool %s (%s, %s) is stored by %s",
            name,
            type(host_pool).__name__,
            host_pool.layout,
            pages.how,
        )
        return Pool(name, pages, specs, claim, PoolRequirement(name, expected_policy(name)))

    def _quotas(self, pool: Pool, claims: list[SizeClaim]) -> tuple[Quota, ...]:
        """Per tier, what this process may take for a pool when these claims share the disk."""
        if not pool.spec.writes:
            return tuple(Quota(0) for _ in self._config.tiers)
        quotas = []
        for level, tier in enumerate(self._config.tiers):
            if tier.size is not None:
                quotas.append(Quota(divide(tier.size, claims)[pool.name]))
                continue
            part = part_of(pool.name, claims)
            before = part_of(pool.name, self._divided)
            if pool.name == KV and pool.store is not None and part < before:
                slot_bytes = round_up(pool.slot_payload, SECTOR)
                have = pool.store.tiers[level].slot_count * slot_bytes
                quotas.append(Quota(int(have * part / before)))  # make room for the others
            else:
                quotas.append(Quota(None, part))
        return tuple(quotas)

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
        pool.store, pool.opened_as, pool.quotas = store, identity, quotas
        self._unstored.pop(pool.name, None)
        sizes = [tier.size for tier in self._config.tiers if tier.size is not None]
        if pool.spec.writes and sizes and (pool.spec.writers > 1 or len(self._divided) > 1):
            logger.info(
                "flexkv: size=%s is divided among %d rank processes and %d host pools: %s bytes each for %s",
                "+".join(map(str, sizes)),
                pool.spec.writers,
                len(self._divided),
                "+".join(str(share.byte_count) for share in quotas if share.byte_count is not None),
                pool.name,
            )

    def _try_open(self, pool: Pool, quotas: tuple[Quota, ...]) -> None:
        try:
            self._open(pool, quotas)
        except (FlexKVError, OSError, ValueError) as exc:
            text = "flexkv: host pool %s is not stored, what needs it misses: %s"
            logger.error(text, pool.name, exc)
            self._unstored[pool.name] = str(exc)

    def _remember(self, kv: Pool, claims: list[SizeClaim], *, division: bool) -> None:
        """For the next start (how the size is divided) and for people (what is not stored, and why)."""
        facts: dict[str, object] = {"unstored": self._unstored}
        if division:
            facts["pools"] = [claim.fields() for claim in claims]
        if kv.store is not None:
            remember(self.prepared, kv.spec.identity.namespace, facts)
