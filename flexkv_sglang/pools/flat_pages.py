"""Pages that are not moved straight from or to the host pool: copied as flat pages, or markers without bytes.

``open_pages`` finds out once, with one page, which way a host pool takes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flexkv_sglang.pools.head_groups import WHOLE, HeadGroups
from flexkv_sglang.pools.host_pages import (
    PROBE_FAILURES,
    Batch,
    HeadGroupPages,
    HostPages,
    HostPool,
    PageGeometry,
    PoolPages,
    UnsupportedPoolError,
    flat_batch,
    tokens_per_page,
)
from flexkv_sglang.types import SECTOR, PageBuffers, PageKey

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
"""At most this much is copied at a time."""

_MARKER_BYTES = 64
_MARKER_TAIL = b"flexkv: this page has no bytes".ljust(_MARKER_BYTES - 32, b".")


def open_pages(pool: HostPool, groups: HeadGroups = WHOLE) -> PoolPages:
    """Zero-copy where the pool names its buffers, else flat pages. Raises ``UnsupportedPoolError``: neither.

    ``groups``: cut the pages like this if the pool can; else they are whole, and the log says so.
    """
    if getattr(pool, "kv_buffer", pool) is None and getattr(pool, "size_per_token", None) == 0:
        return MarkerPages(pool)
    first_page = torch.arange(tokens_per_page(pool), dtype=torch.int64)
    if groups.split:
        try:
            return HeadGroupPages(pool, first_page, groups)
        except UnsupportedPoolError as exc:
            text = "flexkv: tp_lcm_size=%d has no effect on %s: %s. Servers of other tp_size share none of its pages"
            logger.warning(text, groups.lcm, type(pool).__name__, exc)
    try:
        return HostPages(pool, first_page)
    except UnsupportedPoolError as no_buffers:
        try:
            return FlatPages(pool)
        except UnsupportedPoolError as no_pages:
            raise UnsupportedPoolError(f"{no_buffers}; {no_pages}") from no_pages


class FlatPages:
    """Pages copied by ``get_data_page`` and ``set_from_flat_data_page``. Raises ``UnsupportedPoolError``."""

    how = "flat pages"
    groups = WHOLE

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.tokens_per_page = tokens_per_page(pool)
        try:
            empty = pool.get_dummy_flat_data_page()
            page = pool.get_data_page(0, flat=True)
            self._put = pool.set_from_flat_data_page
        except PROBE_FAILURES as exc:
            raise UnsupportedPoolError(f"no flat pages: {exc}") from exc
        self._dtype = empty.dtype
        payload_bytes = empty.numel() * empty.element_size()
        if not payload_bytes or page.numel() * page.element_size() != payload_bytes:
            raise UnsupportedPoolError("its flat pages are empty or differ in size")
        self.geometry = PageGeometry((payload_bytes,), (0,))
        self.span = max(1, STAGING_BYTES // payload_bytes)

    def outgoing(self, host_indices: Any, keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``."""
        starts = self._starts(host_indices, len(keys))
        if starts is None:
            return None
        rows, buffers = _rows(len(keys), self.geometry.payload_bytes)
        for row, start in zip(rows, starts, strict=True):
            page = self._pool.get_data_page(start, flat=True).contiguous()
            row.copy_(page.reshape(-1).view(torch.uint8))
        return Batch(buffers, rows)

    def incoming(self, host_indices: Any, keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``."""
        starts = self._starts(host_indices, len(keys))
        if starts is None:
            return None
        rows, buffers = _rows(len(keys), self.geometry.payload_bytes)
        return Batch(buffers, rows, functools.partial(self._unpack, rows, starts))

    def _unpack(self, rows: torch.Tensor, starts: list[int], flags: list[bool]) -> list[bool]:
        for row, start, flag in zip(rows, starts, flags, strict=True):
            if flag:
                self._put(start, row.view(self._dtype))
        return flags

    def _starts(self, host_indices: Any, count: int) -> list[int] | None:
        if count == 0 or int(host_indices.numel()) != count * self.tokens_per_page:
            return None
        starts: list[int] = host_indices[:: self.tokens_per_page].tolist()
        return starts

    def flat(self, tensors: list[Any], keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``."""
        return flat_batch(tensors, len(keys), self.geometry.payload_bytes)

    def memory(self) -> list[tuple[int, int]]:
        """Nothing: the host pool's memory is not moved."""
        return []


class MarkerPages:
    """A pool without bytes of its own, whose pages stand for those of other pools (``LogicalHostPool``).

    What is stored is a record that names the page, so that existence stays true; the pool is never touched.
    """

    how = "markers"
    groups = WHOLE
    span = STAGING_BYTES // _MARKER_BYTES

    def __init__(self, pool: HostPool) -> None:
        self.tokens_per_page = tokens_per_page(pool)
        self.geometry = PageGeometry((_MARKER_BYTES,), (0,))

    def outgoing(self, host_indices: Any, keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``."""
        fits = keys and int(host_indices.numel()) == len(keys) * self.tokens_per_page
        return self._batch(keys) if fits else None

    incoming = outgoing

    def flat(self, tensors: list[Any], keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``. The tensors are empty."""
        fits = len(tensors) == len(keys) and not any(tensor.numel() for tensor in tensors)
        return self._batch(keys) if fits else None

    def _batch(self, keys: Sequence[PageKey]) -> Batch:
        text = b"".join(key + _MARKER_TAIL for key in keys)
        expected = torch.frombuffer(bytearray(text), dtype=torch.uint8).view(len(keys), -1)
        rows, buffers = _rows(len(keys), _MARKER_BYTES)
        rows.copy_(expected)

        def landed(flags: list[bool]) -> list[bool]:
            right = (rows == expected).all(1).tolist()
            return [flag and same for flag, same in zip(flags, right, strict=True)]

        return Batch(buffers, rows, landed)

    def memory(self) -> list[tuple[int, int]]:
        """Nothing."""
        return []


def _rows(count: int, payload_bytes: int) -> tuple[torch.Tensor, PageBuffers]:
    """Staging for ``count`` pages that starts on a sector: uint8 ``[count, payload_bytes]``, and its addresses."""
    memory = torch.empty(count * payload_bytes + SECTOR, dtype=torch.uint8)
    shift = -memory.data_ptr() % SECTOR
    rows = memory[shift : shift + count * payload_bytes].view(count, payload_bytes)
    steps = np.arange(count, dtype=np.uint64) * np.uint64(payload_bytes)
    addresses = (np.uint64(rows.data_ptr()) + steps).reshape(count, 1)
    return rows, PageBuffers(addresses, np.array([payload_bytes], np.uint64))
