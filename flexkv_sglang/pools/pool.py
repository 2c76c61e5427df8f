"""Pool: one host pool as it is stored: what is known of it, and its open files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flexkv_sglang.cache.assembly import Quota
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.flat_pages import MarkerPages
from flexkv_sglang.pools.host_pages import PoolPages
from flexkv_sglang.pools.pool_rules import SizeClaim
from flexkv_sglang.prefix import PoolRequirement


@dataclass(frozen=True, slots=True)
class PoolSpec:
    """What the adapter knows of a pool. ``writers``: rank processes of the server that write it; ``writes``: is
    this one of them?"""

    identity: Identity
    writers: int
    writes: bool
    metrics: Metrics


@dataclass(slots=True)
class Pool:
    """One host pool that can be stored. ``store`` is None while its files are not open; ``opened``: what it was last
    opened as, which is what it is ``told`` unless the weights changed.

    ``demand``: what SGLang asked of it last, or is expected to ask.
    """

    name: str
    pages: PoolPages
    spec: PoolSpec
    claim: SizeClaim
    requirement: PoolRequirement
    store: Tiers | None = None
    opened_as: Identity | None = None
    quotas: tuple[Quota, ...] = ()

    def close(self) -> None:
        """Close its files. Idempotent."""
        store, self.store = self.store, None
        if store is not None:
            store.close()

    @property
    def ready(self) -> bool:
        """Is it open as what it is? Not while it waits to be opened anew; opening may take longer than an update."""
        return self.store is not None and self.opened_as == self.spec.identity

    @property
    def is_marker(self) -> bool:
        """The pool has no bytes of its own."""
        return isinstance(self.pages, MarkerPages)

    @property
    def slot_payload(self) -> int:
        """Bytes of what is stored by itself: a page, or one head group of it."""
        return self.pages.geometry.payload_bytes


Describe = Callable[[str, Any, PoolPages], PoolSpec]
"""(name, host pool, its pages) -> what they are."""
