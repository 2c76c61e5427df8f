"""The boundary to SGLang: each failure of ours is counted, logged once per kind and minute, and answered as a miss.

``FlexKVStorage`` and ``FlexKVLinker``, which SGLang calls, are built on it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

from flexkv_sglang.integration.compat import pool_result
from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.stores import PoolStores
from flexkv_sglang.prefix import RestorablePrefixes

logger = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])


def answers(*, miss: Any, uses_stores: bool = False) -> Callable[[_F], _F]:
    """Turn each exception of a method of a ``Boundary`` into the answer ``miss``.

    ``miss``: the answer, or a function of the method's arguments that makes it; without arguments it makes the answer
    to a call that cannot be understood at all. ``uses_stores``: the method reads or writes pages, so no file is
    exchanged while it runs.
    """

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def guarded(self: Boundary, *args: Any, **kwargs: Any) -> Any:
            try:
                if self._stores.process != os.getpid():
                    return self._forked(miss, *args, **kwargs)
                with self._stores.in_use() if uses_stores else nullcontext():
                    return method(self, *args, **kwargs)
            except Exception as exc:  # noqa: BLE001 - the boundary: one failed call must not end SGLang's threads
                self._report(method.__name__, exc)
            if not callable(miss):
                return miss
            try:
                return miss(*args, **kwargs)
            except Exception as exc:  # noqa: BLE001 - the boundary: these arguments are not what SGLang passes
                self._report(method.__name__, exc)
            return miss()

        return guarded  # type: ignore[return-value]

    return decorate


class Boundary:
    """Base of a class whose methods are decorated with ``answers``. ``metrics``: count their failures."""

    metrics: Metrics
    _stores: PoolStores

    def _report(self, what: str, exc: Exception) -> None:
        """Count a failure of ``what``, and log it unless the same kind was logged within a minute. Any thread."""
        self.metrics.count(f"{what}_exceptions")
        log = self.__dict__.setdefault("_failure_log", RateLimitedLog(logger))
        text = "flexkv: %s failed, answered as a miss"
        log.log((what, type(exc)), logging.ERROR, text, what, exc_info=exc)

    def _forked(self, miss: Any, *args: Any, **kwargs: Any) -> Any:
        """In a child of our process: files, rings and locks are the parent's, so nothing of ours is touched."""
        if not self.__dict__.setdefault("_fork_said", False):
            self.__dict__["_fork_said"] = True
            text = "flexkv: process %d forked this one: here, every page misses and none is written"
            logger.warning(text, self._stores.process)
        return miss(*args, **kwargs) if callable(miss) else miss

    @answers(miss=None)
    def leave_epoch(self) -> None:
        """Before a weight update: from now on each page misses and none is written, in all pools."""
        self._stores.suspend()

    @answers(miss=None)
    def enter_epoch(self) -> None:
        """When no KV cache of older weights is left: all pools move to the namespaces of the new ones."""
        self._stores.resume()


def no_pages(keys: Sequence[str] = (), *_args: Any, **_kwargs: Any) -> list[bool]:
    """A miss: False per key."""
    return [False] * len(keys or ())


def no_tensors(keys: Sequence[str] = (), *_args: Any, **_kwargs: Any) -> list[Any]:
    """A miss: None per key."""
    return [None] * len(keys or ())


def no_transfers(
    transfers: Sequence[Any] = (), *_args: Any, **_kwargs: Any
) -> dict[str, list[bool]]:
    """A miss: per pool, False per key. What is no transfer has no answer."""
    named = [item for item in transfers or () if hasattr(item, "name") and hasattr(item, "keys")]
    return {item.name: [False] * len(item.keys or ()) for item in named}


def no_prefix(*_args: Any, **_kwargs: Any) -> Any:
    """A miss: a ``PoolTransferResult`` without a restorable prefix."""
    return pool_result(RestorablePrefixes([], {}))


def no_lengths(*_args: Any, **_kwargs: Any) -> list[int]:
    """A miss: no prefix length."""
    return []
