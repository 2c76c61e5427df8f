"""Host pages: where the pages of SGLang's host pools lie in memory.

``open_pages`` tries one page and chooses one of four ways for a pool:

HostPages        the pool names the addresses of its pages: nothing is copied
HeadGroupPages   the same, for pages that are cut into head groups
FlatPages        pages are copied through the pool's flat-page calls
MarkerPages      the pool has no bytes: a record stands for each page

Buffers have one canonical order, K of all layers before V of all layers, which is also the order of SGLang's flat
pages (``get_data_page(flat=True)``). So a page has the same bytes whichever interface writes it.

Does not import sglang: the pool is a duck type, ``HostPool``.
"""

from __future__ import annotations

import functools
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from flexkv_sglang.pools.head_groups import WHOLE, HeadGroups
from flexkv_sglang.types import SECTOR, U64, PageBuffers, PageKey

logger = logging.getLogger(__name__)

STAGING_BYTES = 64 << 20
"""Bytes that are copied at a time."""

_MARKER_BYTES = 64
_MARKER_TAIL = b"flexkv: this page has no bytes".ljust(_MARKER_BYTES - 32, b".")

PROBE_FAILURES = (
    *(AttributeError, NotImplementedError, ValueError, AssertionError),
    *(TypeError, RuntimeError, IndexError, KeyError),
)
"""A pool raises one of these for a call that it does not support in its layout."""


class HostPool(Protocol):
    """The part of ``sglang.srt.mem_cache.pool_host.base.HostKVCache`` that is used here."""

    layout: str
    page_size: int
    dtype: Any

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]] | None:
        """One index per token -> (addresses, lengths) of all buffers, page after page."""


class UnsupportedPoolError(Exception):
    """The pool offers no page buffers that can be stored: every access is a miss, and one log line says why."""


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Shape of one page. ``lengths``: bytes per buffer, as stored; ``order``: their positions in SGLang's list."""

    lengths: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def payload_bytes(self) -> int:
        """Bytes of one page."""
        return sum(self.lengths)


def _as_they_are(flags: list[bool]) -> list[bool]:
    return flags


@dataclass(frozen=True, slots=True)
class Batch:
    """Pages of one call. ``memory`` keeps ``buffers`` mapped.

    ``landed(flags)``: call it after a read with one flag per page that arrived. It returns the flags of the pages
    that are in the host pool now.
    """

    buffers: PageBuffers
    memory: object = None
    landed: Callable[[list[bool]], list[bool]] = _as_they_are


class PoolPages(Protocol):
    """The pages of one host pool. ``span``: pages that fit one call. Any thread.

    ``groups``: how a page is cut. ``geometry`` and buffers are those of one group: ``groups.count`` per page, page
    after page.

    ``host_indices``: int64 tensor ``[len(keys) * tokens_per_page]``, whole pages (``whole_pages``). A method returns
    None for any other length. ``token_count``: tokens that the pool has room for, 0 if that is not known.
    """

    how: str
    tokens_per_page: int
    token_count: int
    geometry: PageGeometry
    span: int
    groups: HeadGroups = WHOLE

    @abstractmethod
    def outgoing(self, host_indices: Any, keys: Sequence[PageKey]) -> Batch | None:
        """The present content of pages, to be written."""

    @abstractmethod
    def incoming(self, host_indices: Any, keys: Sequence[PageKey]) -> Batch | None:
        """Memory to read pages into."""

    def flat(self, tensors: list[Any], keys: Sequence[PageKey]) -> Batch | None:
        """SGLang's flat page tensors, to be written or read."""
        return flat_batch(tensors, len(keys), self.geometry.payload_bytes)

    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of memory that an I/O engine may pin as long as this object lives."""
        return []


def open_pages(pool: HostPool, groups: HeadGroups = WHOLE) -> PoolPages:
    """Zero-copy where the pool names its buffers, else flat pages. Raises ``UnsupportedPoolError`` if it has neither.

    ``groups``: cut the pages like this. If the pool cannot, pages stay whole, and the log says so.
    """
    try:
        return _open_pages(pool, groups)
    except PROBE_FAILURES as exc:  # it is no pool at all
        text = f"{type(pool).__name__}: {type(exc).__name__} {exc}"
        raise UnsupportedPoolError(text) from exc


def _open_pages(pool: HostPool, groups: HeadGroups) -> PoolPages:
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


class HostPages(PoolPages):
    """Page addresses of one host pool. Raises ``UnsupportedPoolError`` when the pool cannot name them."""

    how = "zero-copy"
    span = 1 << 30

    def __init__(self, pool: HostPool, first_page_indices: Any) -> None:
        """``first_page_indices``: int64 tensor ``[tokens per page]`` of any page, to learn the geometry."""
        self._pool = pool
        self.tokens_per_page, self.token_count = tokens_per_page(pool), token_count(pool)
        try:
            meta = pool.get_page_buffer_meta(first_page_indices)
        except PROBE_FAILURES as exc:
            raise UnsupportedPoolError(f"{type(pool).__name__} ({pool.layout}): {exc}") from exc
        if meta is None or not meta[0]:
            raise UnsupportedPoolError(
                f"{type(pool).__name__} ({pool.layout}) holds no bytes of its own"
            )
        lengths = [int(length) for length in meta[1]]
        if not lengths or min(lengths) < 1 or len(meta[0]) != len(lengths):
            raise UnsupportedPoolError(f"{type(pool).__name__}: a page has no bytes")
        order = _stored_order(pool, len(lengths))
        self.geometry = PageGeometry(tuple(lengths[i] for i in order), order)
        self._order = np.array(order, np.intp)
        self._kept: list[Any] = []  # keeps the memory of memory() mapped
        self._lengths = np.array(self.geometry.lengths, np.uint64)

    def buffers(self, host_indices: Any, page_count: int) -> PageBuffers | None:
        """Addresses of ``page_count`` pages; None unless there are ``page_count * tokens_per_page`` indices (int64)."""
        if page_count == 0 or int(host_indices.numel()) != page_count * self.tokens_per_page:
            return None
        meta = self._meta(host_indices)
        page_count *= self.groups.count
        if meta is None or len(meta[0]) != page_count * len(self._order):
            return None
        addresses = np.array(meta[0], np.uint64).reshape(page_count, len(self._order))
        return PageBuffers(np.ascontiguousarray(addresses[:, self._order]), self._lengths)

    def _meta(self, host_indices: Any) -> tuple[list[int], list[int]] | None:
        return self._pool.get_page_buffer_meta(host_indices)

    def outgoing(self, host_indices: Any, keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``."""
        buffers = self.buffers(host_indices, len(keys))
        return None if buffers is None else Batch(buffers)

    incoming = outgoing

    def memory(self) -> list[tuple[int, int]]:
        """(address, bytes) of the pool's CPU memory; nothing if it is not made of tensors.

        It stays mapped as long as this object lives, so an I/O engine may pin it.
        """
        found = getattr(self._pool, "kv_buffer", None)
        tensors: list[Any] = list(found) if isinstance(found, list | tuple) else [found]
        if not all(hasattr(t, "untyped_storage") and t.device.type == "cpu" for t in tensors):
            return []
        self._kept = tensors
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        return [(address, size) for address, size in storages.items() if size]


class HeadGroupPages(HostPages):
    """Pages in the layout ``page_head``, cut into head groups: K and V of each. Raises ``UnsupportedPoolError``."""

    how = "zero-copy, by head groups"

    def __init__(self, pool: HostPool, first_page_indices: Any, groups: HeadGroups) -> None:
        obstacle = groups.obstacle(pool.layout)
        if obstacle is not None:
            raise UnsupportedPoolError(obstacle)
        super().__init__(pool, first_page_indices)
        whole = self.geometry
        self.groups = groups
        try:
            meta = self._meta(first_page_indices)
        except PROBE_FAILURES as exc:
            raise UnsupportedPoolError(
                f"{groups.count} groups per rank: {type(exc).__name__} {exc}"
            ) from exc
        lengths = {int(length) for length in meta[1]}
        part = whole.lengths[0] // groups.count
        all_of_it = whole.lengths == (part * groups.count,) * 2
        if not all_of_it or len(meta[0]) != 2 * groups.count or lengths != {part}:
            raise UnsupportedPoolError("its head groups are not K and V, or not all of a page")
        self._half = whole.lengths[0]
        self.geometry = PageGeometry((part, part), (0, 1))
        self._lengths = np.array(self.geometry.lengths, np.uint64)

    def _meta(self, host_indices: Any) -> tuple[list[int], list[int]]:
        pool: Any = self._pool
        found: tuple[list[int], list[int]] = pool.get_split_heads_page_buffer_meta(
            host_indices, self.groups.count
        )
        return found

    def flat(self, tensors: list[Any], keys: Sequence[PageKey]) -> Batch | None:
        """See ``PoolPages``. A flat page is K of all heads, then V of all heads."""
        pages = flat_batch(tensors, len(keys), 2 * self._half)
        if pages is None:
            return None
        steps = np.arange(self.groups.count, dtype=np.uint64) * self._lengths[0]
        starts = np.stack([steps, steps + np.uint64(self._half)], axis=1)  # [groups, 2]
        addresses = (pages.buffers.addresses[:, :, None] + starts).reshape(-1, 2)
        return Batch(PageBuffers(addresses, self._lengths), pages.memory)


class FlatPages(PoolPages):
    """Pages copied by ``get_data_page`` and ``set_from_flat_data_page``. Raises ``UnsupportedPoolError``."""

    how = "flat pages"

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.tokens_per_page, self.token_count = tokens_per_page(pool), token_count(pool)
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


class MarkerPages(PoolPages):
    """A pool without bytes, whose pages stand for those of other pools (``LogicalHostPool``).

    A record that names the page is stored, so that lookups stay true; the pool is never touched.
    """

    how = "markers"
    span = STAGING_BYTES // _MARKER_BYTES

    def __init__(self, pool: HostPool) -> None:
        self.tokens_per_page, self.token_count = tokens_per_page(pool), token_count(pool)
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


def _rows(count: int, payload_bytes: int) -> tuple[torch.Tensor, PageBuffers]:
    """Sector-aligned staging for ``count`` pages: uint8 ``[count, payload_bytes]``, and its addresses."""
    memory = torch.empty(count * payload_bytes + SECTOR, dtype=torch.uint8)
    shift = -memory.data_ptr() % SECTOR
    rows = memory[shift : shift + count * payload_bytes].view(count, payload_bytes)
    steps = np.arange(count, dtype=np.uint64) * np.uint64(payload_bytes)
    addresses = (np.uint64(rows.data_ptr()) + steps).reshape(count, 1)
    return rows, PageBuffers(addresses, np.array([payload_bytes], np.uint64))


def tokens_per_page(pool: HostPool) -> int:
    """Entries of ``host_indices`` per page."""
    return int(getattr(pool, "logical_page_size", None) or pool.page_size)


def token_count(pool: HostPool) -> int:
    """``host_indices`` of the pool are less than this; 0: it does not say."""
    return int(getattr(pool, "logical_size", None) or getattr(pool, "size", None) or 0)


def first_page(pages: PoolPages) -> Batch | None:
    """The first page of a pool as reads name it; None if the pool does not."""
    try:
        indices = torch.arange(pages.tokens_per_page, dtype=torch.int64)
        return pages.incoming(indices, [PageKey(bytes(32))])
    except PROBE_FAILURES:
        return None


def whole_pages(pages: PoolPages, host_indices: Any, count: int, *, distinct: bool) -> bool:
    """Are these the indices of ``count`` whole pages inside the pool: aligned runs, one after the other?

    ``distinct``: two keys may not share a page, which can hold the bytes of one. Raises ``AttributeError`` or
    ``RuntimeError`` for what is no tensor of integers.
    """
    size = pages.tokens_per_page
    if host_indices is None or int(host_indices.numel()) != count * size:
        return False
    given = host_indices.detach().cpu().numpy()
    if given.dtype.kind != "i":
        return False
    rows = given.reshape(count, size)
    starts = rows[:, 0]
    inside = starts.min() >= 0 and (not pages.token_count or rows.max() < pages.token_count)
    if not inside or (starts % size).any() or (rows != starts[:, None] + np.arange(size)).any():
        return False
    return not distinct or len(np.unique(starts)) == count


def _stored_order(pool: HostPool, count: int) -> tuple[int, ...]:
    """SGLang lists layer_first MHA buffers as K0 V0 K1 V1 ...; they are stored as K0 K1 ... V0 V1 ..."""
    layers = int(getattr(pool, "layer_num", 0) or 0)
    if pool.layout == "layer_first" and count == 2 * layers:
        return (*range(0, count, 2), *range(1, count, 2))
    return tuple(range(count))


def flat_batch(tensors: list[Any], count: int, payload_bytes: int) -> Batch | None:
    """Flat page tensors (CPU, contiguous, ``payload_bytes`` each) as a batch; None if one differs, or their number."""
    if len(tensors) != count:
        return None
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None
        if tensor.numel() * tensor.element_size() != payload_bytes:
            return None
    addresses: U64 = np.array([[tensor.data_ptr()] for tensor in tensors], np.uint64)
    lengths = np.array([payload_bytes], np.uint64)
    return Batch(PageBuffers(addresses.reshape(count, 1), lengths), tensors)
