"""The boundary to SGLang: every failure of ours is counted, logged once per kind and minute, and becomes an answer
of the right shape. What SGLang calls (``adapter``, ``linker``) is built on it.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.metrics.registry import Metrics
from flexkv_sglang.pools.stores import PoolStores

logger = logging.getLogger(__name__)

_F = TypeVar("_F", bound=Callable[..., Any])


class Boundary:
    """What a class with ``boundary`` methods has. ``metrics``: where their failures are counted."""

    metrics: Metrics
    _stores: PoolStores

    def _report(self, what: str, exc: Exception) -> None:
        """Count a failure of ``what``; log it unless the same kind was logged within a minute. Any thread."""
        self.metrics.count(f"{what}_exceptions")
        log = self.__dict__.setdefault("_failure_log", RateLimitedLog(logger))
        text = "flexkv: %s failed, answered as a miss"
        log.log((what, type(exc)), logging.ERROR, text, what, exc_info=exc)


def boundary(miss: Callable[..., Any], *, moves: bool = False) -> Callable[[_F], _F]:
    """Turn every exception of a method of a ``Boundary`` into ``miss(*the method's arguments)``.

    ``moves``: the method uses the stores, which are not exchanged meanwhile.
    """

    def decorate(method: _F) -> _F:
        @functools.wraps(method)
        def guarded(self: Boundary, *args: Any, **kwargs: Any) -> Any:
            try:
                with self._stores.in_use() if moves else nullcontext():
                    return method(self, *args, **kwargs)
            except Exception as exc:  # noqa: BLE001 - the boundary: one failed call must not end SGLang's threads
                self._report(method.__name__, exc)
                return miss(self, *args, **kwargs)

        return guarded  # type: ignore[return-value]

    return decorate
