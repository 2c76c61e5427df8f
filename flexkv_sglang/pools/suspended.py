"""SuspendedNamespaces: files that a weight update has closed, until they are deleted."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack

from flexkv_sglang.backends.io.probe import IoMode
from flexkv_sglang.cache.assembly import reclaim
from flexkv_sglang.cache.tiers import Tiers
from flexkv_sglang.identity.keys import Identity
from flexkv_sglang.pools.pool import Pool


class SuspendedNamespaces:
    """Closed stores and their identities. Called by one thread at a time, while no call runs."""

    def __init__(self, prepared: Sequence[Mapping[str, IoMode]]) -> None:
        self._prepared = prepared
        self._closed: list[tuple[Identity, Tiers]] = []

    def take(self, pools: Iterable[Pool]) -> None:
        """Close the files of these pools. One that fails keeps no other open."""
        with ExitStack() as stack:
            for pool in pools:
                if pool.store is not None and pool.opened_as is not None:
                    self._closed.append((pool.opened_as, pool.store))
                    stack.callback(pool.close)

    def released(self) -> bool:
        """True if no transfer uses these files any more."""
        return all(store.released() for _, store in self._closed)

    def delete(self, keep: Collection[str]) -> None:
        """Delete the files, except those of the namespaces ``keep``, which are opened again. Raises ``OSError``."""
        while self._closed:
            identity, store = self._closed.pop()
            if identity.namespace in keep:
                continue
            try:
                reclaim(store, self._prepared, identity)
            except OSError:
                self._closed.append((identity, store))
                raise
