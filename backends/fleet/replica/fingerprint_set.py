"""FingerprintSet: a set of page fingerprints with one writer and many readers: a sorted array and a log of changes.

Fingerprints come from SHA-256, so they are spread evenly: the top bits of one nearly give its place in the sorted
array (``SortedBase``), its low bits choose a chain of the log (``ChangeTable``). Both are plain memory, in this
process or in files that other processes map. A lookup is work on arrays.

Invariant: a lookup during an append sees each change whole or not at all. A record is complete before a chain
leads to it, and carries a check for CPUs that show writes in another order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from flexkv_sglang.backends.fleet.vocabulary import Op
from flexkv_sglang.types import U32, U64, BoolArray

EMPTY: U64 = np.empty(0, np.uint64)

HEADS_PER_RECORD = 8
"""Chains of a change table per record of its capacity: most lookups then meet an empty chain."""

_MIN_BUCKETS, _BUCKET_PAGES = 16, 2
_MIN_RECORDS, _MAX_RECORDS = 1024, 1 << 22
_PAGES_PER_RECORD = 16
_WIDEST_WINDOW = 32  # fingerprints that are not spread evenly are searched the usual way
_FEW = 24  # up to this many chains are followed one by one, which is quicker
_MASK = (1 << 64) - 1
_STIR = 0xC2B2AE3D27D4EB4F
_STIR_U64, _CHECK_AT, _OP_AT = np.uint64(_STIR), np.uint64(34), np.uint64(32)
_NUMBER, _NOT_CHECK = np.uint64(0xFFFFFFFF), np.uint64(0x3FFFFFFFF)


def bucket_count(count: int) -> int:
    """Number of buckets of a base of ``count`` fingerprints, a power of two: two to four fingerprints in each."""
    return max(_MIN_BUCKETS, 1 << max(count // _BUCKET_PAGES, 1).bit_length() - 1)


def record_count(count: int) -> int:
    """Capacity of the change table of a base of ``count`` fingerprints, in records, a power of two.

    It is in proportion, so that merging the records into the base costs the same per change for every size.
    """
    records = 1 << max(count // _PAGES_PER_RECORD, 1).bit_length() - 1
    return min(max(records, _MIN_RECORDS), _MAX_RECORDS)


def bucket_starts(fingerprints: U64) -> U32:
    """uint32 ``[buckets + 1]``: index in sorted ``fingerprints`` at which each value of the top bits begins."""
    buckets = bucket_count(len(fingerprints))
    shift = np.uint64(65 - buckets.bit_length())
    sizes = np.bincount((fingerprints >> shift).astype(np.intp), minlength=buckets)
    starts = np.zeros(buckets + 1, np.uint32)
    np.cumsum(sizes, out=starts[1:])
    return starts


def words(array: U64 | U32) -> memoryview[int]:
    """View an array's memory to read single elements: three times as quick as through numpy."""
    return array.data


class SortedBase:
    """Sorted, distinct fingerprints with a table of bucket starts. Immutable; any thread."""

    def __init__(self, fingerprints: U64, starts: U32 | None = None) -> None:
        """``fingerprints``: uint64 ``[n]``, sorted, distinct. ``starts``: its ``bucket_starts``, if known."""
        self.fingerprints = fingerprints
        self.starts = bucket_starts(fingerprints) if starts is None else starts
        self._shift = 65 - (len(self.starts) - 1).bit_length()
        self._shift_u64 = np.uint64(self._shift)
        widest = int(np.diff(self.starts).max())
        rows = np.arange(widest, dtype=np.intp)[:, None]
        self._offsets = rows if widest <= _WIDEST_WINDOW else None
        self._fps_view, self._starts_view = words(fingerprints), words(self.starts)

    def __len__(self) -> int:
        return len(self.fingerprints)

    def holds_one(self, fp: int) -> bool:
        """Is ``fp`` in the base?"""
        starts, bucket = self._starts_view, fp >> self._shift
        end = starts[bucket + 1]
        at = bisect_left(self._fps_view, fp, starts[bucket], end)
        return bool(at < end and self._fps_view[at] == fp)

    def holds(self, fingerprints: U64) -> BoolArray:
        """For each of ``fingerprints``: is it in the base?"""
        if not len(self.fingerprints):
            return np.zeros(len(fingerprints), np.bool_)
        if self._offsets is None:
            rows = np.searchsorted(self.fingerprints, fingerprints)
            equal: BoolArray = self.fingerprints.take(rows, mode="clip") == fingerprints
            return equal
        starts = self.starts.take((fingerprints >> self._shift_u64).view(np.int64))
        # a window may reach beyond its bucket: those fingerprints are in the base as well
        window = self.fingerprints.take(self._offsets + starts, mode="clip")
        found: BoolArray = np.logical_or.reduce(window == fingerprints, axis=0)
        return found


class ChangeTable:
    """Changes since a base was made: records in order, chained by the low bits of their fingerprint.

    A record is two words: the fingerprint; and the number of the record before it in its chain (32 bits, 0:
    none), the operation (2 bits: 1 added, 2 dropped), a check over all of it and ``salt`` (30 bits). ``heads``
    has the number of the newest record of each chain. Records are numbered from 1.

    One thread of one process appends, any thread of any process reads. Damage by another process causes wrong
    answers, never an endless chain or an access beyond the arrays.
    """

    def __init__(self, heads: U32, records: U64, salt: int) -> None:
        """``heads`` uint32 ``[8 n]``, ``records`` uint64 ``[n, 2]``, ``n`` a power of two; zeros when new."""
        self._heads, self._records, self._salt = heads, records, salt
        self._mask = len(heads) - 1
        self._mask_u64, self._salt_u64 = np.uint64(self._mask), np.uint64(salt)
        self._heads_view = words(heads)
        self._words = words(records.reshape(-1))
        self._used = 0

    @property
    def room(self) -> int:
        """Number of records that still fit."""
        return len(self._records) - self._used

    def append(self, op: Op, fingerprints: U64) -> None:
        """Add one record per fingerprint, ADD or DROP. There must be ``room``."""
        assert len(fingerprints) <= self.room, (len(fingerprints), self.room)
        numbers = np.arange(self._used + 1, self._used + 1 + len(fingerprints), dtype=np.uint32)
        chains = (fingerprints & self._mask_u64).view(np.int64)
        earlier = self._heads[chains]
        order = np.argsort(chains, kind="stable")
        again = np.flatnonzero(chains[order[1:]] == chains[order[:-1]])
        earlier[order[again + 1]] = numbers[order[again]]
        low = earlier.astype(np.uint64) | np.uint64(op) << _OP_AT
        rows = slice(self._used, self._used + len(fingerprints))
        self._records[rows, 0] = fingerprints
        self._records[rows, 1] = low | self._checks(fingerprints, low)
        self._heads[chains] = numbers  # of equal chains the last one stays
        self._used += len(fingerprints)

    def _checks(self, fingerprints: U64, low: U64) -> U64:
        """Compute the check bits of records, at their place in the word."""
        return (fingerprints ^ low ^ self._salt_u64) * _STIR_U64 >> _CHECK_AT << _CHECK_AT

    def latest_one(self, fp: int) -> int:
        """Return the newest operation on ``fp``; 0: no record of it."""
        number, words, limit = (
            self._heads_view[fp & self._mask],
            self._words,
            len(self._records) + 1,
        )
        while 0 < number < limit:
            found, word = words[2 * number - 2], words[2 * number - 1]
            low = word & 0x3FFFFFFFF
            if ((found ^ low ^ self._salt) * _STIR & _MASK) >> 34 != word >> 34:
                return 0
            if found == fp:
                return int(low >> 32)
            limit, number = number, word & 0xFFFFFFFF
        return 0

    def amend(self, fingerprints: U64, found: BoolArray) -> None:
        """Correct ``found``, the answer of the base for ``fingerprints``, by the changes since."""
        numbers = self._heads.take((fingerprints & self._mask_u64).view(np.int64))
        rows = np.flatnonzero(numbers)
        numbers, limit = numbers[rows].astype(np.int64), len(self._records) + 1
        limits = np.full(len(rows), limit)
        while len(rows) > _FEW:
            records = self._records.take(numbers - 1, axis=0, mode="clip")
            words = records[:, 1]
            low = words & _NOT_CHECK
            whole = (words == low | self._checks(records[:, 0], low)) & (numbers < limits)
            hit = whole & (records[:, 0] == fingerprints[rows])
            found[rows[hit]] = low[hit] >> _OP_AT == Op.ADD
            earlier = (words & _NUMBER).view(np.int64)
            on = whole & ~hit & (earlier > 0)
            limits, numbers, rows = numbers[on], earlier[on], rows[on]
        for row in rows.tolist():
            latest = self.latest_one(int(fingerprints[row]))
            if latest:
                found[row] = latest == Op.ADD

    def written(self) -> tuple[U64, BoolArray]:
        """Return what this object appended, in order: fingerprints, and True for each added one (else dropped)."""
        records = self._records[: self._used]
        return records[:, 0], records[:, 1] >> _OP_AT & np.uint64(3) == Op.ADD


Parts = tuple[SortedBase, ChangeTable]
"""Memory of a set. One object, so that a lookup never sees a new base with old changes."""


def parts_hold(parts: Parts, fingerprints: U64) -> BoolArray:
    """For each of ``fingerprints``: is it in the set?"""
    base, changes = parts
    found = base.holds(fingerprints)
    changes.amend(fingerprints, found)
    return found


def in_memory(fingerprints: U64) -> Parts:
    """Make a set of sorted, distinct ``fingerprints`` in this process's memory."""
    records = record_count(len(fingerprints))
    heads = np.zeros(records * HEADS_PER_RECORD, np.uint32)
    return SortedBase(fingerprints), ChangeTable(heads, np.zeros((records, 2), np.uint64), 0)


def merged(base: U64, fingerprints: U64, added: BoolArray) -> U64:
    """Apply changes in order to sorted ``base``. 64 Ki changes of a million pages take about 15 ms.

    ``np.union1d`` would sort everything again, and take a second.
    """
    order = np.argsort(fingerprints, kind="stable")
    last = np.ones(len(order), np.bool_)
    last[:-1] = fingerprints[order[1:]] != fingerprints[order[:-1]]
    fingerprints, added = fingerprints[order[last]], added[order[last]]
    rows = np.searchsorted(base, fingerprints)
    present = np.zeros(len(fingerprints), np.bool_)
    if len(base):
        present = base.take(rows, mode="clip") == fingerprints
    kept = np.delete(base, rows[present & ~added])
    new = fingerprints[added & ~present]
    return np.insert(kept, np.searchsorted(kept, new), new)


class FingerprintSet:
    """A set of uint64 fingerprints: 11 to 13 bytes each. One thread at a time changes it; any thread may read.

    ``make`` turns sorted, distinct fingerprints into the memory of the set. It is called at the start, and when the
    changes no longer fit beside the base.
    """

    def __init__(self, fingerprints: U64 = EMPTY, make: Callable[[U64], Parts] = in_memory) -> None:
        """``fingerprints``: uint64 ``[n]``, sorted, distinct."""
        self._make = make
        self._parts = make(fingerprints)
        self._count = len(fingerprints)

    def __len__(self) -> int:
        return self._count

    def holds(self, fingerprints: U64) -> BoolArray:
        """For each of ``fingerprints``: is it in the set?"""
        return parts_hold(self._parts, fingerprints)

    def add(self, fingerprints: U64) -> U64:
        """Add ``fingerprints``. Returns those that were not in the set, each once, in order."""
        new = self._select(fingerprints, present=False)
        self._change(Op.ADD, new)
        return new

    def drop(self, fingerprints: U64) -> U64:
        """Remove ``fingerprints``. Returns those that were in the set, each once, in order."""
        gone = self._select(fingerprints, present=True)
        self._change(Op.DROP, gone)
        return gone

    def clear(self) -> None:
        """Remove everything."""
        self._parts, self._count = self._make(EMPTY), 0

    def snapshot(self) -> U64:
        """Return all fingerprints, sorted, in an array that never changes. Only for the changing thread."""
        base, changes = self._parts
        fingerprints, added = changes.written()
        if not len(fingerprints):
            return base.fingerprints
        return merged(base.fingerprints, fingerprints, added)

    def rebase(self) -> None:
        """Move the set to new memory."""
        self._parts = self._make(self.snapshot())

    def _select(self, fingerprints: U64, *, present: bool) -> U64:
        """Return the ``fingerprints`` that are (not) in the set, each once, in order."""
        chosen = fingerprints[self.holds(fingerprints) == present]
        first = np.unique(chosen, return_index=True)[1]
        distinct: U64 = chosen if len(first) == len(chosen) else chosen[np.sort(first)]
        return distinct

    def _change(self, op: Op, fingerprints: U64) -> None:
        if not len(fingerprints):
            return
        base, changes = self._parts
        if len(fingerprints) <= changes.room:
            changes.append(op, fingerprints)
        else:
            earlier, added = changes.written()
            added = np.concatenate([added, np.full(len(fingerprints), op == Op.ADD)])
            self._parts = self._make(
                merged(base.fingerprints, np.concatenate([earlier, fingerprints]), added)
            )
        self._count += len(fingerprints) if op == Op.ADD else -len(fingerprints)
